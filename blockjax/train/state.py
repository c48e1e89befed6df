"""What training carries from step to step, and where it lives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from blockjax.models import Transformer, TransformerConfig, logical_axes
from blockjax.parallel.mesh import partition_spec, shardings
from blockjax.train.config import ConfigDict
from blockjax.train.health import Health, healthy
from blockjax.train.optimizer import make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training carries from step to step; what a checkpoint holds.

    Attributes:
      step: int32 scalar, batches seen so far; batch number `step` comes next.
      params: dict of float32 parameters, from `nnx.to_pure_dict`.
      opt_state: state of the optimizer.
      health: counters of skipped steps and of losses, from `train.health`.
      memory: of the recurrent layers, from `Transformer.memory`, with `data.carry`; else None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    health: Health
    memory: Any = None


def init_state(model: Transformer, optimizer: optax.GradientTransformation, carried: int = 0) -> TrainState:
    """The state before the first step; `carried` is the number of rows whose memory is carried."""
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    memory = model.memory(carried) if carried else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), healthy(), memory)


@dataclasses.dataclass(frozen=True)
class StatePlan:
    """The state, decided but not allocated.

    Attributes:
      graph: of the model; `nnx.merge(graph, params)` is the model.
      optimizer: of the run.
      abstract: `TrainState` of `jax.ShapeDtypeStruct` with shardings.
      make: makes the first state on the mesh.
    """

    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    abstract: TrainState
    make: Callable[[], TrainState]


def plan_state(model_config: TransformerConfig, config: ConfigDict, mesh: Mesh) -> StatePlan:
    """Decides shapes and places of the state on a mesh."""
    build = lambda: Transformer(model_config, rngs=nnx.Rngs(config.seed))  # noqa: E731
    skeleton = nnx.eval_shape(build)
    axes = logical_axes(skeleton)
    optimizer = make_optimizer(config.optimizer, axes, config.run.steps)
    carried = config.data.batch_size if config.data.carry else 0
    make = lambda: init_state(build(), optimizer, carried)  # noqa: E731
    shapes = jax.eval_shape(make)
    placed = state_shardings(mesh, shapes, axes)
    abstract = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed)
    return StatePlan(nnx.graphdef(skeleton), optimizer, abstract, jax.jit(make, out_shardings=placed))


def state_shardings(mesh: Mesh, shapes: TrainState, axes) -> TrainState:
    """Where each leaf of the state lives.

    Parameters by name, moments beside them, memories with the rows of the batch, scalars everywhere.
    """
    params = shardings(mesh, shapes.params, axes)
    everywhere = NamedSharding(mesh, P())
    by_path = dict(jax.tree_util.tree_flatten_with_path(params)[0])

    def moment(path, _):
        # The path of a moment ends with the path of its parameter.
        return next((by_path[path[i:]] for i in range(len(path)) if path[i:] in by_path), everywhere)

    rows = NamedSharding(mesh, partition_spec(("batch",)))
    memory = jax.tree.map(lambda _: rows, shapes.memory)
    health = jax.tree.map(lambda _: everywhere, shapes.health)
    moments = jax.tree_util.tree_map_with_path(moment, shapes.opt_state)
    return TrainState(everywhere, params, moments, health, memory)
