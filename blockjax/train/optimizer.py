"""AdamW and Muon from optax, told by logical axis names what each parameter is."""

from __future__ import annotations

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from blockjax.errors import UsageError, nearest

SCHEDULES = ("cosine", "stable_decay")
OPTIMIZERS = ("adamw", "muon")


def is_matrix(axes: tuple[str, ...]) -> bool:
    """Whether a parameter maps features to features: not an embedding, head, gain or depth query."""
    return not {"vocab", "gain", "reader"}.intersection(axes)


def muon_dimensions(axes: tuple[str, ...]) -> MuonDimensionNumbers | None:
    """Which dimensions Muon reads as the rows and columns of one matrix.

    Weights are laid out (layers?, inputs..., outputs...) with "model" or "rank" alone
    on one side; "layers" is in neither and so a batch. None leaves a parameter to
    AdamW. Without this optax would orthogonalise the embedding and stacked
    gains (they have two dimensions) and skip every stacked weight (three).
    """
    if not is_matrix(axes):
        return None
    dims = [i for i, name in enumerate(axes) if name != "layers"]
    cut = 1 if axes[dims[0]] in ("model", "rank") else len(dims) - 1
    return MuonDimensionNumbers(reduction_axis=tuple(dims[:cut]), output_axis=tuple(dims[cut:]))


def make_schedule(config, steps: int) -> optax.Schedule:
    """Step -> multiplier of the peak learning rate, in [0, 1].

    Linear warm-up over `warmup_steps`, then `cosine` to `final_scale` at the
    last step, or `stable_decay`: constant, then linear to `final_scale` over
    the last `decay_fraction` of all steps (arXiv:2404.06395, sec. 4).

    Raises:
      UsageError: unknown schedule, or a warm-up as long as the run.
    """
    c = config
    if c.schedule not in SCHEDULES:
        raise UsageError(f"Unknown optimizer.schedule {c.schedule!r}.{nearest(c.schedule, SCHEDULES)}")
    if not 0 <= c.warmup_steps < steps:
        raise UsageError(
            f"optimizer.warmup_steps={c.warmup_steps} must be below run.steps={steps}; "
            "shorten the warm-up or train longer."
        )
    if c.schedule == "cosine":
        body = optax.cosine_decay_schedule(1.0, steps - c.warmup_steps, alpha=c.final_scale)
        return _after_warmup(body, c.warmup_steps)
    decay = max(1, min(round(c.decay_fraction * steps), steps - c.warmup_steps))
    fall = optax.linear_schedule(1.0, c.final_scale, decay)
    body = optax.join_schedules([optax.constant_schedule(1.0), fall], [steps - c.warmup_steps - decay])
    return _after_warmup(body, c.warmup_steps)


def _after_warmup(body: optax.Schedule, warmup: int) -> optax.Schedule:
    # The first update already moves: step 0 has 1/(warmup + 1) of the peak.
    rise = optax.linear_schedule(1.0 / (warmup + 1), 1.0, warmup) if warmup else None
    return optax.join_schedules([rise, body], [warmup]) if rise else body


def make_optimizer(config, axes, steps: int) -> optax.GradientTransformation:
    """The optimizer that `config.optimizer` describes.

    Args:
      config: `name`, `learning_rate`, `weight_decay` (of matrices only),
        `clip_norm` (0: off) and the schedule; for Muon `adam_learning_rate`
        drives embeddings, head and gains. `query_rate` scales the rate of
        depth queries and gates.
      axes: tree of logical axis names from `models.logical_axes`.
      steps: length of the schedule.

    Raises:
      UsageError: unknown name or schedule.
    """
    c = config
    if c.name not in OPTIMIZERS:
        raise UsageError(f"Unknown optimizer.name {c.name!r}.{nearest(c.name, OPTIMIZERS)}")
    multiplier = make_schedule(c, steps)
    rate = lambda peak: lambda step: peak * multiplier(step)  # noqa: E731
    leaf = lambda x: isinstance(x, tuple)  # noqa: E731
    if c.name == "adamw":
        decayed = jax.tree.map(is_matrix, axes, is_leaf=leaf)
        update = optax.adamw(
            rate(c.learning_rate), c.beta1, c.beta2, c.eps, weight_decay=c.weight_decay, mask=decayed
        )
    else:
        update = optax.contrib.muon(
            rate(c.learning_rate),
            beta=c.momentum,
            eps=c.eps,
            weight_decay=c.weight_decay,
            adam_b1=c.beta1,
            adam_b2=c.beta2,
            adam_learning_rate=rate(c.adam_learning_rate),
            muon_weight_dimension_numbers=jax.tree.map(muon_dimensions, axes, is_leaf=leaf),
        )
    clip = optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity()
    queries = jax.tree.map(lambda names: "reader" in names, axes, is_leaf=leaf)
    return optax.chain(clip, update, optax.masked(optax.scale(c.query_rate), queries))
