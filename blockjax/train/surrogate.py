"""A tied surrogate of a trained decoder: one block of weights for each phase of its layers.

The block-recurrent hypothesis (Raptor) says that the layers of a trained network fall into few phases, in
each of which one block, applied again and again, can stand for all. `find_phases` cuts a teacher into them,
`start` gives each phase a tied layer (`model.loop`), and `train` trains these: first every block alone, going
over from the teacher's activations to its own, then the whole on its own. Embedding, final norm and head are
the teacher's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from blockjax.errors import UsageError
from blockjax.models import Transformer, TransformerConfig, logical_axes
from blockjax.models.tied import Tied
from blockjax.recurrence.phases import dissimilarity, phases, surrogate_loss
from blockjax.train.optimizer import make_optimizer
from blockjax.train.step import Batch, context

TRAINED = ("periods", "tail", "condition")


class Phases(NamedTuple):
    """How alike layers are, and which of them belong together.

    Attributes:
      weights: [L, L] float32 of `recurrence.phases.dissimilarity`, of the outputs of layers.
      starts: the first layer of each phase.
    """

    weights: np.ndarray
    starts: list[int]


def find_phases(teacher: Transformer, batches: Iterable[Batch], count: int) -> Phases:
    """The best cut of a teacher's layers into so many phases, from its activations on some batches."""
    graph, params = nnx.split(teacher)

    @jax.jit
    def measure(params, batch):
        x = nnx.merge(graph, params).activations(batch["tokens"], **context(batch))
        return dissimilarity(x[1:], batch["segment_ids"] >= 0)

    found = [np.asarray(measure(params, batch)) for batch in batches]
    weights = np.mean(found, axis=0)
    return Phases(weights, phases(weights, count))


def surrogate_config(teacher: TransformerConfig, starts: list[int]) -> TransformerConfig:
    """The teacher with one tied layer for each phase.

    Raises:
      UsageError: its layers are of several kinds, or not all its own.
    """
    if (
        len(teacher.period) > 1
        or teacher.table() is not None
        or teacher.loop
        or teacher.residual != "prenorm"
    ):
        raise UsageError(
            "A tied surrogate needs a teacher whose layers are all alike and have weights of their own: "
            f"model.pattern of one layer, not {teacher.pattern!r}, model.locality='' ({teacher.locality!r}), "
            f"model.loop='' ({teacher.loop!r}) and model.residual='prenorm' ({teacher.residual!r})."
        )
    sizes = np.diff([*starts, teacher.depth])
    loop = ",".join(f"1*{size}" for size in sizes)
    return dataclasses.replace(teacher, loop=loop, condition=teacher.condition or 16)


def start(teacher: Transformer, starts: list[int], *, seed: int = 0) -> Transformer:
    """The surrogate before training: each tied layer is a copy of the first one of its phase."""
    config = surrogate_config(teacher.config, starts)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(seed)))
    values = nnx.to_pure_dict(nnx.state(teacher, nnx.Param))
    first = np.asarray(starts)
    values["periods"] = jax.tree.map(lambda leaf: leaf[first], values["periods"])
    condition = type(model.condition)(config.conditioned, config.width, config.condition, rngs=nnx.Rngs(seed))
    values["condition"] = nnx.to_pure_dict(nnx.state(condition, nnx.Param))
    return nnx.merge(nnx.graphdef(model), values)


def blocks_alone(
    student: Transformer, teacher: jax.Array, batch: Batch, forced: jax.Array | float
) -> jax.Array:
    """`recurrence.phases.surrogate_loss` of each tied layer over its phase, summed.

    Args:
      teacher: [L + 1, B, T, M] from `Transformer.activations`.
      forced: weight of teacher forcing, from `recurrence.phases.forcing`.
    """
    rope, total, layer = student.rope(batch["positions"]), 0.0, 0
    see = student.sees(student.config.period[0], batch["segment_ids"])
    for i, (run, block) in enumerate(zip(student.config.runs, student.distinct(), strict=True)):

        def step(x, time, i=i, block=block):
            return student.through(x, Tied(block, student.condition(i, time)), rope, see)

        total += surrogate_loss(step, teacher[layer : layer + run.repeats + 1], forced)
        layer += run.repeats
    return total


def whole(student: Transformer, teacher: jax.Array, batch: Batch) -> jax.Array:
    """Mean over layers of the mean square error, of the surrogate on its own from the embedding on."""
    own = student.activations(batch["tokens"], **context(batch))
    error = own[1:].astype(jnp.float32) - jax.lax.stop_gradient(teacher)[1:].astype(jnp.float32)
    return jnp.mean(jnp.square(error))


Loss = Callable[[Transformer, jax.Array, Batch, jax.Array], jax.Array]


def train(
    loss: Loss,
    student: Transformer,
    teacher: Transformer,
    batches: Iterable[Batch],
    optimizer: ConfigDict,
    steps: int,
    *,
    say: Callable[[int, float], None] = lambda step, loss: None,
) -> Transformer:
    """Trains the tied layers and what tells them the time; the rest stays as it is.

    Args:
      loss: `(student, activations of the teacher, batch, step) -> scalar`, from `blocks_alone` or `whole`.
      batches: at least `steps`.
      optimizer: as `config.optimizer`.
      steps: updates, the length of its schedule.
      say: is called with the number of each step, from 1, and its loss.
    """
    (graph, params), (teaching, fixed) = nnx.split(student), nnx.split(teacher)
    params, axes = nnx.to_pure_dict(params), logical_axes(student)
    mine = lambda tree: {key: x for key, x in tree.items() if key in TRAINED}  # noqa: E731
    update = make_optimizer(optimizer, mine(axes), steps)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained, state, rest, fixed, batch, number):
        target = nnx.merge(teaching, fixed).activations(batch["tokens"], **context(batch))

        of = lambda trained: loss(nnx.merge(graph, rest | trained), target, batch, number)  # noqa: E731
        value, gradient = jax.value_and_grad(of)(trained)
        updates, state = update.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value

    trained = jax.tree.map(jnp.copy, mine(params))  # given away by each step
    state, rest = update.init(trained), {key: x for key, x in params.items() if key not in TRAINED}
    for number, batch in zip(range(steps), batches, strict=False):
        trained, state, value = step(trained, state, rest, fixed, batch, number)
        say(number + 1, float(value))
    return nnx.merge(graph, rest | trained)


def layer_errors(student: Transformer, teacher: Transformer, batch: Batch) -> np.ndarray:
    """RMS of the surrogate's error after each layer, on its own, over the RMS of the activation; [L]."""
    (graph, params), (teaching, fixed) = nnx.split(student), nnx.split(teacher)

    @jax.jit
    def measure(params, fixed):
        own, target = (
            nnx.merge(*model).activations(batch["tokens"], **context(batch))[1:].astype(jnp.float32)
            for model in ((graph, params), (teaching, fixed))
        )
        real = (batch["segment_ids"] >= 0)[..., None]
        square = lambda x: jnp.sum(jnp.square(x) * real, axis=(1, 2, 3))  # noqa: E731
        return jnp.sqrt(square(own - target) / square(target))

    return np.asarray(measure(params, fixed))
