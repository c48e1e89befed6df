"""One training step and one evaluation step, as pure functions of a `TrainState`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from blockjax.masks.predicates import array_module
from blockjax.models import TransformerConfig
from blockjax.parallel.mesh import compiler_options, partition_spec
from blockjax.train.config import ConfigDict
from blockjax.train.loss import LossSums, cross_entropy
from blockjax.train.state import StatePlan, TrainState

BATCH_KEYS = ("tokens", "targets", "positions", "segment_ids")  # each [B, T] int32
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


Dial = Callable[[jax.Array | int], jax.Array | np.ndarray | None]  # step -> locality [L], None: the config's


def make_dial(config: TransformerConfig, warmup: int) -> Dial:
    """The locality of the layers at each step: rising from 0 to the schedule's over `warmup` steps."""
    if not config.locality or not warmup:
        return lambda step: None
    table = config.local_rule.table(config.depth)
    return lambda step: table * array_module(step).clip(step / warmup, 0.0, 1.0)


def batch_loss(
    graph: nnx.GraphDef, params, batch: Batch, locality=None, z_loss: float = 0.0
) -> tuple[jax.Array, LossSums]:
    """`cross_entropy` of a batch with at least `BATCH_KEYS`; `locality` as in `Transformer.hidden`."""
    model = nnx.merge(graph, params)
    hidden = model.hidden(batch["tokens"], **context(batch), locality=locality)
    targets, layout = batch["targets"], model.layout(batch["targets"].shape[1])
    targets = targets if layout is None else layout.apply(targets)
    return cross_entropy(hidden, model.head_weight(), targets, z_loss)


def context(batch: Batch) -> dict[str, jax.Array]:
    """What a model is told of a batch beside its tokens."""
    return {key: batch[key] for key in ("positions", "segment_ids")}


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    z_loss: float = 0.0,
    accumulate: int = 1,
    dial: Dial = lambda step: None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """`(state, batch) -> (state, metrics)`.

    The loss is the mean over all target tokens of the batch of
    -log p(target) + z_loss * log(Z)^2 (arXiv:2204.02311, sec. 5). With
    `accumulate` microbatches the sums are added and divided once, so unequal
    numbers of targets weigh as they do in one batch.
    """

    gradient = jax.grad(functools.partial(batch_loss, graph, z_loss=z_loss), has_aux=True)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        locality = dial(state.step)
        if accumulate == 1:
            grads, sums = gradient(state.params, batch, locality)
        else:
            # Microbatch i takes every accumulate-th row, which are spread over all devices.
            rows = lambda a: a.reshape(-1, accumulate, *a.shape[1:]).swapaxes(0, 1)  # noqa: E731

            def add(carry, part):
                return jax.tree.map(jnp.add, carry, gradient(state.params, part, locality)), None

            shapes = jax.eval_shape(gradient, state.params, batch, locality)
            zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
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
            "visible_pairs": nnx.merge(graph, state.params).visible_pairs(
                batch["tokens"], **context(batch), locality=locality
            ),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where the arrays [B, T] of a batch live."""
    return NamedSharding(mesh, partition_spec(("batch", "time")))


def lower_train_step(plan: StatePlan, config: ConfigDict, mesh: Mesh, dial: Dial) -> jax.stages.Lowered:
    """The step of a run on a mesh in use, ready to be compiled; `(state, batch) -> (state, metrics)`.

    Nothing is allocated, so the devices of the mesh need not exist. The step overwrites the state.
    """
    step = make_train_step(
        plan.graph,
        plan.optimizer,
        z_loss=config.optimizer.z_loss,
        accumulate=config.run.accumulate,
        dial=dial,
    )
    shape, placement = (config.data.batch_size, config.data.seq_len), batch_sharding(mesh)
    batch = {key: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placement) for key in BATCH_KEYS}
    placed = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract)
    jitted = jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(placed, NamedSharding(mesh, P())),
        compiler_options=compiler_options(mesh),
    )
    return jitted.lower(plan.abstract, batch)


def make_eval_step(
    graph: nnx.GraphDef, dial: Dial = lambda step: None
) -> Callable[[Any, jax.Array, Batch], Metrics]:
    """`(params, step, batch) -> {nats, tokens, bytes}`, sums over the targets of the batch."""

    def evaluate(params, step: jax.Array, batch: Batch) -> Metrics:
        _, sums = batch_loss(graph, params, batch, dial(step))
        return {"nats": sums.nats, "tokens": sums.tokens, "bytes": jnp.sum(batch["target_bytes"])}

    return evaluate
