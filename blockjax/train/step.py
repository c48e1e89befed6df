"""One training step and one evaluation step, as pure functions of a `TrainState`."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from blockjax.models import LayerSpec
from blockjax.train.loss import LossSums, cross_entropy
from blockjax.train.state import TrainState

BATCH_KEYS = ("tokens", "targets", "positions", "segment_ids")  # each [B, T] int32
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def loss_sums(graph: nnx.GraphDef, params, batch: Batch) -> LossSums:
    """Cross-entropy sums of a batch with at least `BATCH_KEYS`."""
    model = nnx.merge(graph, params)
    hidden = model.hidden(batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
    return cross_entropy(hidden, model.head_weight(), batch["targets"])


def visible_pairs(layers: Sequence[LayerSpec], positions: jax.Array) -> jax.Array:
    """Pairs of a query and a key that it sees, summed over layers and tokens; float32.

    Args:
      positions: [B, T] int32, offset of each token in its document.
    """
    counts = collections.Counter(spec.window for spec in layers)
    sees = lambda window: positions + 1 if window is None else jnp.minimum(positions + 1, window)  # noqa: E731
    return sum(n * jnp.sum(sees(window).astype(jnp.float32)) for window, n in counts.items())


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    layers: Sequence[LayerSpec],
    z_loss: float = 0.0,
    accumulate: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """`(state, batch) -> (state, metrics)`.

    The loss is the mean over all target tokens of the batch of
    -log p(target) + z_loss * log(Z)^2 (arXiv:2204.02311, sec. 5). With
    `accumulate` microbatches the sums are added and divided once, so unequal
    numbers of targets weigh as they do in one batch.
    """

    def objective(params, batch: Batch) -> tuple[jax.Array, LossSums]:
        sums = loss_sums(graph, params, batch)
        return sums.nats + z_loss * sums.squared_lse, sums

    gradient = jax.grad(objective, has_aux=True)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if accumulate == 1:
            grads, sums = gradient(state.params, batch)
        else:
            # Microbatch i takes every accumulate-th row, which are spread over all devices.
            rows = lambda a: a.reshape(-1, accumulate, *a.shape[1:]).swapaxes(0, 1)  # noqa: E731
            add = lambda carry, part: (jax.tree.map(jnp.add, carry, gradient(state.params, part)), None)  # noqa: E731
            zero = jax.tree.map(
                lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(gradient, state.params, batch)
            )
            (grads, sums), _ = jax.lax.scan(add, zero, jax.tree.map(rows, batch))
        tokens = jnp.maximum(sums.tokens, 1.0)
        grads = jax.tree.map(lambda g: g / tokens, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": sums.nats / tokens,
            "z_loss": z_loss * sums.squared_lse / tokens,
            "grad_norm": optax.tree.norm(grads),
            "target_tokens": sums.tokens,
            "visible_pairs": visible_pairs(layers, batch["positions"]),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def make_eval_step(graph: nnx.GraphDef) -> Callable[[Any, Batch], Metrics]:
    """`(params, batch) -> {nats, tokens, bytes}`, sums over the targets of the batch."""

    def step(params, batch: Batch) -> Metrics:
        sums = loss_sums(graph, params, batch)
        return {"nats": sums.nats, "tokens": sums.tokens, "bytes": jnp.sum(batch["target_bytes"])}

    return step
