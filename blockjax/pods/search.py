"""Which mesh suits a pod: all that divide, ranked by a cheap model, before the best are compiled."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from blockjax import data
from blockjax.errors import UsageError
from blockjax.models import TransformerConfig
from blockjax.parallel.mesh import MESH_AXES
from blockjax.pods.collectives import SENT
from blockjax.pods.compile import Job, plan_job
from blockjax.pods.roofline import Estimate, Work, count_work
from blockjax.pods.topology import Topology
from blockjax.train.config import ConfigDict
from blockjax.train.run import padded_vocab
from blockjax.train.state import TrainState, plan_state

# Two programs of libtpu 0.0.52 (7b on v5p:8x8x8, 1.3b on v5e:16x16) gave these, within a fifth of each other:
# without remat a layer keeps this many times what matmuls read and write, and a step moves it so often.
UNREMATTED, MOVED = 2.3, 12


@dataclasses.dataclass(frozen=True)
class Guess:
    """What a job may take, without compiling.

    Attributes:
      job: the job, on a mesh.
      bytes: on each device.
      estimate: of a step.
    """

    job: Job
    bytes: float
    estimate: Estimate

    @property
    def fits(self) -> bool:
        return self.bytes <= self.job.topology.chip.hbm_bytes


def search(config: ConfigDict, topology: Topology, vocab_size: int | None = None) -> list[Guess]:
    """Every mesh on which the config runs: those that fit first, fastest first.

    Raises:
      UsageError: there is none, or the config is wrong whatever the mesh.
    """
    vocab_size = vocab_size or padded_vocab(data.open_tokenizer(config.data.tokenizer))
    guesses, refusal, state, work = [], None, None, None
    for mesh in meshes(len(topology.devices)):
        try:
            job = plan_job(config, topology, mesh, vocab_size)
            if state is None:  # shapes and logical places, the same on every mesh
                state, work = plan_state(job.model, job.config, job.mesh).abstract, count_work(job)
        except UsageError as error:
            refusal = refusal or error
        else:
            guesses.append(guess(job, state, work))
    if not guesses:
        raise UsageError(f"No mesh of {topology.name} takes this config. With all devices on data: {refusal}")
    return sorted(guesses, key=lambda g: (not g.fits, g.estimate.serial if g.fits else g.bytes))


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """All sizes of the axes whose product is `devices`; all on data first."""
    divisors = [n for n in range(devices, 0, -1) if devices % n == 0]
    for sizes in itertools.product(divisors, repeat=len(MESH_AXES)):
        if math.prod(sizes) == devices:
            yield dict(zip(MESH_AXES, sizes, strict=True))


def guess(job: Job, state: TrainState, work: Work) -> Guess:
    """Memory and roofline of a job from its sizes.

    Args:
      job: the job.
      state: shapes and places of its state, on any mesh.
      work: FLOPs of a step.
    """
    model, mesh, chip = job.model, dict(job.mesh.shape), job.topology.chip
    micro = job.config.run.accumulate
    tokens = job.config.data.batch_size * job.config.data.seq_len * mesh["tensor"] // (job.mesh.size * micro)
    size = jnp.dtype(model.dtype).itemsize
    layers = model.num_params(embedding=False, applied=True) - model.vocab_size * model.width
    weights = size * layers / mesh["tensor"]  # of all layers, gathered
    kept = activations(model, mesh["tensor"])
    params = cut_bytes(state.params, mesh)
    # A gradient beside each parameter, two gathered layers, and the layer that the backward is at.
    held = cut_bytes(state.opt_state, mesh) + 2 * params + 2 * weights / model.depth
    held += tokens * (model.depth * kept[model.remat] + kept["matmuls"])
    moved = micro * (MOVED * tokens * model.depth * kept["matmuls"] + 4 * weights) + 8 * params
    links = sum(
        micro * sent / (job.topology.links(along(job, axis)) * chip.link_rate)
        for axis, sent in traffic(job, tokens, weights).items()
        if mesh[axis] > 1
    )
    peak = chip.peak_flops * job.mesh.size
    bounds = Estimate(work, peak, work.executed / peak, moved / chip.hbm_rate, links)
    return Guess(job, held, bounds)


def activations(model: TransformerConfig, tensor: int) -> dict[str, float]:
    """Bytes a token that each policy of `transformer.REMAT` keeps of a layer cut over `tensor` devices."""
    heads, kv, ffn = (n / tensor for n in (model.heads, model.kv_heads, model.ffn))
    size = jnp.dtype(model.dtype).itemsize
    full = size * model.width
    # What the layer's products result in, and what attention works on.
    dots = full + size * (2 * model.width + 2 * ffn + model.head_dim * (3 * heads + 4 * kv))
    matmuls = dots + size * (2 * model.width + ffn)
    return dict(full=full, dots=dots, matmuls=matmuls, none=UNREMATTED * matmuls)


def traffic(job: Job, tokens: int, weights: float) -> dict[str, float]:
    """Bytes that a device sends along each axis in a microbatch.

    Weights are gathered forward and backward, their gradients scattered over fsdp and then summed over data
    and seq; each product that is cut by tensor is summed; keys and values go around seq.
    """
    model, n = job.model, job.mesh.shape
    size = jnp.dtype(model.dtype).itemsize
    again = model.remat == "full"
    own = weights / n["fsdp"]
    near = (n["seq"] - 1) / n["seq"] * job.config.data.seq_len
    rows = tokens * n["seq"] / job.config.data.seq_len
    specs = [spec for spec in model.layers() if spec.attends]
    far = sum(near if spec.full else min(near, float(spec.window)) for spec in specs)
    keys = 2 * size * model.kv_heads * model.head_dim / n["tensor"] * rows * far
    summed = SENT["all-reduce"]
    return dict(
        data=summed(own, n["data"]),
        fsdp=2 * SENT["all-gather"](own, n["fsdp"]) + SENT["reduce-scatter"](weights, n["fsdp"]),
        seq=summed(own, n["seq"]) + (3 + again) * keys,
        tensor=(4 + 2 * again) * model.depth * summed(size * tokens * model.width, n["tensor"]),
    )


def cut_bytes(tree, mesh: Mapping[str, int]) -> float:
    """Bytes of `ShapeDtypeStruct`s on each device if their axes had these sizes."""

    def cut(x: jax.ShapeDtypeStruct) -> float:
        axes = jax.tree.leaves(tuple(x.sharding.spec))
        return math.prod(x.shape) * x.dtype.itemsize / math.prod(mesh[axis] for axis in axes)

    return sum(map(cut, jax.tree.leaves(tree)))


def along(job: Job, axis: str) -> list[jax.Device]:
    """The first devices along an axis of the mesh."""
    return job.mesh.devices[tuple(slice(None) if name == axis else 0 for name in job.mesh.shape)].tolist()
