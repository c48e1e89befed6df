"""The training step of a config, compiled for a pod that is not here."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from blockjax import data
from blockjax.errors import UsageError
from blockjax.models import TransformerConfig
from blockjax.parallel.mesh import make_mesh
from blockjax.pods.chips import GIB
from blockjax.pods.topology import Topology
from blockjax.train import config as configs
from blockjax.train.config import ConfigDict
from blockjax.train.run import padded_vocab
from blockjax.train.state import TrainState, plan_state
from blockjax.train.step import lower_train_step, make_dial

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": GIB, "T": 1 << 40}
# What libtpu says against a program; what it calls temporaries has arguments and results in it.
OUT_OF_MEMORY = (
    re.compile(r"memory required for [\w ]+ \(([\d.]+)([KMGT]?)B?\) exceeds available HBM"),
    re.compile(r"Used ([\d.]+)([KMGT]?)B? of [\d.]+[KMGT]?B? hbm"),
)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be compiled.

    Attributes:
      config: of the run, checked, with the mesh in `mesh`.
      model: its model.
      topology: the pod.
      mesh: its devices.
    """

    config: ConfigDict
    model: TransformerConfig
    topology: Topology
    mesh: Mesh

    @property
    def axes(self) -> str:
        """The mesh as `--mesh` takes it."""
        return ",".join(f"{axis}:{n}" for axis, n in self.mesh.shape.items() if n > 1) or "data:1"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device, and what there is.

    Attributes:
      params, optimizer, batch: of what the step is given; without the padding of tiles.
      temporaries: what it needs beside.
      code: the program.
      total: everything, padding included.
      limit: what a program may have.
    """

    params: int
    optimizer: int
    batch: int
    temporaries: int
    code: int
    total: int
    limit: int

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A step, compiled or refused.

    Attributes:
      memory: what it takes.
      seconds: that compiling took.
      executable: None if it does not fit.
      state: shapes and places of the state.
    """

    memory: Memory
    seconds: float
    executable: jax.stages.Compiled | None
    state: TrainState


def plan_job(
    config: ConfigDict, topology: Topology, mesh: Mapping[str, int], vocab_size: int | None = None
) -> Job:
    """Checks that a config runs on a mesh of a topology.

    Args:
      config: of the run; its own `mesh` does not count.
      topology: the pod.
      mesh: sizes of the axes, of which one may be -1.
      vocab_size: rows of the embedding; default: those for the config's tokenizer.

    Raises:
      UsageError: something does not divide, or the config is wrong.
    """
    config = config.copy_and_resolve_references()
    config.mesh.update(mesh)
    configs.check(config)
    if vocab_size is None:
        vocab_size = padded_vocab(data.open_tokenizer(config.data.tokenizer))
    elif vocab_size < 1:
        raise UsageError(f"--vocab_size={vocab_size} must be at least 1.")
    devices = make_mesh(config.mesh, topology.devices)
    configs.check_mesh(config, devices)
    config.mesh.update(devices.shape)
    return Job(config, configs.check(config, vocab_size), topology, devices)


def compile_job(job: Job) -> Outcome:
    """Compiles the step that `train.loop` runs; takes minutes.

    Raises:
      UsageError: a dimension of a parameter does not divide over the mesh.
    """
    begin = time.monotonic()
    with jax.set_mesh(job.mesh):
        plan = plan_state(job.model, job.config, job.mesh)
        dial = make_dial(job.model, job.config.optimizer.locality_warmup)
        lowered = lower_train_step(plan, job.config, job.mesh, dial)
        try:
            executable = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            executable, needs = None, needed_bytes(str(error))
            if needs is None:
                raise
    state = plan.abstract
    limit = job.topology.chip.hbm_bytes
    held = local_bytes(state.params), local_bytes(state.opt_state), batch_bytes(job)
    if executable is None:
        memory = Memory(*held, needs - sum(held), 0, needs, limit)
    else:
        seen = executable.memory_analysis()
        given = seen.argument_size_in_bytes + seen.output_size_in_bytes - seen.alias_size_in_bytes
        code, temporaries = seen.generated_code_size_in_bytes, seen.temp_size_in_bytes
        memory = Memory(*held, temporaries, code, given + temporaries + code, limit)
    return Outcome(memory, time.monotonic() - begin, executable, state)


def needed_bytes(refusal: str) -> int | None:
    """All bytes that a program needs, from libtpu's words against it; None if memory is not what it lacks."""
    for pattern in OUT_OF_MEMORY:
        if found := pattern.search(refusal):
            return int(float(found[1]) * UNITS[found[2]])
    return None


def local_bytes(tree) -> int:
    """Bytes of `ShapeDtypeStruct`s with shardings on each device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def batch_bytes(job: Job) -> int:
    """Bytes of a batch on each device: four arrays of int32."""
    return (
        16 * job.config.data.batch_size * job.config.data.seq_len * job.mesh.shape["tensor"] // job.mesh.size
    )
