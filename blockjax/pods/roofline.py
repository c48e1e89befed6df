"""How long a step takes at least, from what it does and the published rates of the chip."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from blockjax.pods.collectives import Collective
from blockjax.pods.compile import Job
from blockjax.pods.program import Program
from blockjax.train.flops import FlopCounter


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of a step over all devices.

    Attributes:
      useful: that the model asks for: products with weights, and pairs of tokens that see each other.
      executed: with all pairs of the tiles that are computed, and what the backward computes again.
    """

    useful: float
    executed: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of a step, each as if nothing else took time.

    Attributes:
      work: of the step.
      peak: FLOP/s of all devices.
      compute, memory, links: at the peak of the matrix units, of main memory, and of the interconnect.
    """

    work: Work
    peak: float
    compute: float
    memory: float
    links: float

    @property
    def best(self) -> float:
        """If everything happens at once: no step is faster."""
        return max(self.compute, self.memory, self.links)

    @property
    def serial(self) -> float:
        """If devices compute nothing while they communicate."""
        return max(self.compute, self.memory) + self.links

    def mfu(self, seconds: float) -> float:
        """Useful FLOPs over those that the chips could do in this time."""
        return self.work.useful / (seconds * self.peak)


def count_work(job: Job) -> Work:
    """FLOPs of a step if every row of the batch is one document; see `train.flops.FlopCounter`.

    With `run.remat=full` the backward runs the layers forward again: 2 FLOPs a parameter and token, and
    attention's forward, which is 2 of its 7 products.
    """
    model, seq_len = job.model, job.config.data.seq_len
    counter, specs = FlopCounter(model, seq_len), [spec for spec in model.layers() if spec.attends]
    tokens = job.config.data.batch_size * seq_len
    masks = {spec: spec.mask(seq_len, model.attention_block) for spec in set(specs)}
    seen = {spec: float(mask.visible_pairs()) for spec, mask in masks.items()}
    pairs = job.config.data.batch_size * sum(seen[spec] for spec in specs)
    executed = counter.executed(tokens)
    if model.remat == "full":
        dense = counter.useful(tokens, 0)
        head = 6.0 * model.vocab_size * model.width * tokens
        executed += (dense - head) / 3 + (executed - dense) * 2 / 7
    return Work(counter.useful(tokens, pairs), executed)


def estimate(job: Job, program: Program, found: Sequence[Collective]) -> Estimate:
    """The roofline of a compiled step."""
    chip, work = job.topology.chip, count_work(job)
    links = sum(seconds(job, collective) for collective in found)
    peak = chip.peak_flops * job.mesh.size
    return Estimate(work, peak, work.executed / peak, program.hbm_bytes() / chip.hbm_rate, links)


def seconds(job: Job, collective: Collective) -> float:
    """That a collective takes in a step: what a device sends, over the links that its group uses at once."""
    group = [job.mesh.devices.flat[i] for i in collective.group]
    links = 1 if collective.kind == "collective-permute" else job.topology.links(group)
    return collective.sent / (links * job.topology.chip.link_rate)
