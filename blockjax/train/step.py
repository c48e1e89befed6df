"""One training step and one evaluation step, as pure functions of a `TrainState`."""

from __future__ import annotations

import functools
import itertools
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
from blockjax.models import Transformer, TransformerConfig
from blockjax.parallel.mesh import compiler_options, partition_spec
from blockjax.recurrence import forget
from blockjax.train.config import ConfigDict
from blockjax.train.health import choose, observe
from blockjax.train.loss import LossSums, cross_entropy, token_nats
from blockjax.train.state import StatePlan, TrainState

BATCH_KEYS = ("tokens", "targets", "positions", "segment_ids")  # each [B, T] int32
FIRST_EDGE = 64  # tokens of the first group of positions, see `position_edges`
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
    """`cross_entropy` of a batch with the keys of `Batch`; `locality` as in `Transformer.hidden`."""
    loss, (sums, _) = carried_loss(graph, params, batch, None, locality, z_loss)
    return loss, sums


def carried_loss(
    graph: nnx.GraphDef, params, batch: Batch, memory: dict | None, locality=None, z_loss: float = 0.0
) -> tuple[jax.Array, tuple[LossSums, dict | None]]:
    """`batch_loss` of rows that go on where `memory` ends, except where they start a document.

    No gradient goes through the memory: it is truncated at each step. Without one (None) rows start anew.

    Returns:
      The loss; its sums, and the memory after the batch.
    """
    model = nnx.merge(graph, params)
    hidden, after = carried_hidden(model, batch, memory, locality)
    targets, layout = batch["targets"], model.layout(batch["targets"].shape[1])
    targets = targets if layout is None else layout.apply(targets)
    loss, sums = cross_entropy(hidden, model.head_weight(), targets, z_loss)
    return loss, (sums, after)


def carried_hidden(
    model: Transformer, batch: Batch, memory: dict | None, locality=None
) -> tuple[jax.Array, dict | None]:
    """`Transformer.hidden` of rows that go on where `memory` ends, and the memory after them."""
    if memory is None:
        return model.hidden(batch["tokens"], **context(batch), locality=locality), None
    memory = forget(memory, batch["starts"][:, 0])
    return model.advance(batch["tokens"], memory, **context(batch), locality=locality)


def batch_keys(config: ConfigDict) -> tuple[str, ...]:
    """What a training step takes of a batch; `starts` [B, T] bool if memories are carried."""
    return (*BATCH_KEYS, "starts") if config.data.carry else BATCH_KEYS


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
    numbers of targets weigh as they do in one batch. Where the loss or the
    norm of the gradient is not finite, parameters, optimizer and memory stay
    as they are, and `skipped_steps` rises.
    """

    gradient = jax.grad(functools.partial(carried_loss, graph, z_loss=z_loss), has_aux=True)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        locality = dial(state.step)
        if accumulate == 1:
            grads, (sums, memory) = gradient(state.params, batch, state.memory, locality)
        else:
            # Microbatch i takes every accumulate-th row, which are spread over all devices.
            rows = lambda a: a.reshape(-1, accumulate, *a.shape[1:]).swapaxes(0, 1)  # noqa: E731

            def add(carry, part):
                return jax.tree.map(jnp.add, carry, gradient(state.params, part, None, locality)), None

            shapes = jax.eval_shape(gradient, state.params, batch, None, locality)
            zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
            (grads, (sums, memory)), _ = jax.lax.scan(add, zero, jax.tree.map(rows, batch))
        tokens = jnp.maximum(sums.tokens, 1.0)
        grads = jax.tree.map(lambda g: g / tokens, grads)
        loss, z_term = sums.nats / tokens, z_loss * sums.squared_lse / tokens
        grad_norm = optax.tree.norm(grads)
        finite, health, seen = observe(state.health, loss + z_term, grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updated = optax.apply_updates(state.params, updates), opt_state, memory
        params, opt_state, memory = choose(finite, updated, (state.params, state.opt_state, state.memory))
        metrics = seen | {
            "loss": loss,
            "z_loss": z_term,
            "grad_norm": grad_norm,
            "target_tokens": sums.tokens,
            "visible_pairs": nnx.merge(graph, state.params).visible_pairs(
                batch["tokens"], **context(batch), locality=locality
            ),
        }
        return TrainState(state.step + 1, params, opt_state, health, memory), metrics

    return step


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where the arrays [B, T] of a batch live."""
    return NamedSharding(mesh, partition_spec(("batch", "time")))


def lower_train_step(plan: StatePlan, config: ConfigDict, mesh: Mesh, dial: Dial) -> jax.stages.Lowered:
    """The step of a run on a mesh in use, ready to be compiled; `(state, batch) -> (state, metrics)`.

    Nothing is allocated, so the devices of the mesh need not exist. The step overwrites the state. With
    `run.deterministic`, XLA leaves out what adds in an order that changes from run to run.
    """
    step = make_train_step(
        plan.graph,
        plan.optimizer,
        z_loss=config.optimizer.z_loss,
        accumulate=config.run.accumulate,
        dial=dial,
    )
    shape, placement = (config.data.batch_size, config.data.seq_len), batch_sharding(mesh)
    dtypes = dict.fromkeys(BATCH_KEYS, jnp.int32) | dict(starts=jnp.bool_)
    batch = {key: jax.ShapeDtypeStruct(shape, dtypes[key], sharding=placement) for key in batch_keys(config)}
    placed = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract)
    jitted = jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(placed, NamedSharding(mesh, P())),
        compiler_options=compiler_options(mesh) | deterministic_options(config, mesh),
    )
    return jitted.lower(plan.abstract, batch)


def deterministic_options(config: ConfigDict, mesh: Mesh) -> dict[str, bool]:
    """Options of XLA with which two runs agree bit for bit; CPUs and TPUs need none.

    The one for GPUs also turns off autotuning, which may choose other kernels in another run.
    """
    gpu = mesh.devices.flat[0].platform == "gpu"
    return {"xla_gpu_deterministic_ops": True} if gpu and config.run.deterministic else {}


def make_eval_step(
    graph: nnx.GraphDef, longest: int, dial: Dial = lambda step: None
) -> Callable[[Any, jax.Array, Batch, dict | None], tuple[Metrics, dict | None]]:
    """`(params, step, batch, memory) -> ({nats, tokens, bytes}, memory)`, sums over the targets of the batch.

    `nats` and `tokens` are arrays: sums over the targets at positions in the document from each of
    `position_edges(longest)` to the next. Rows go on where `memory` ends, except where they start a
    document; without one (None) they start anew.
    """

    def evaluate(params, step: jax.Array, batch: Batch, memory: dict | None) -> tuple[Metrics, dict | None]:
        model = nnx.merge(graph, params)
        hidden, after = carried_hidden(model, batch, memory, dial(step))
        layout = model.layout(batch["tokens"].shape[1])
        lay = lambda x: x if layout is None else layout.apply(x)  # noqa: E731
        targets, offsets = lay(batch["targets"]), lay(batch["offsets"])
        nats = token_nats(hidden, model.head_weight(), targets)
        edges = (*position_edges(longest), np.iinfo(np.int32).max)
        inside = [(offsets >= a) & (offsets < b) for a, b in itertools.pairwise(edges)]
        sums = {
            "nats": jnp.stack([jnp.sum(jnp.where(here, nats, 0.0)) for here in inside]),
            "tokens": jnp.stack([jnp.sum(here & (targets >= 0), dtype=jnp.float32) for here in inside]),
            "bytes": jnp.sum(batch["target_bytes"]),
        }
        return sums, after

    return evaluate


def position_edges(longest: int) -> list[int]:
    """Where groups of positions in a document begin: 0, 64, 128, 256, ..., as far as the longest goes."""
    edges = [0, FIRST_EDGE]
    while edges[-1] < longest:
        edges.append(2 * edges[-1])
    return edges[:-1]
