"""What a schedule sends, counted by running it without computing anything, and the choice by these counts."""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from blockjax.kernels.block_sparse_attention.spec import Cotangents
from blockjax.parallel.circulate import Ring
from blockjax.parallel.schedules import SCHEDULES
from blockjax.parallel.shards import Job, Keys, Queries


class Send(NamedTuple):
    """`bytes` that a device sends `by` places on, mean over devices; 0 places: to all others, both ways."""

    by: int
    bytes: float


@dataclass(frozen=True)
class Traffic:
    """All sends of one pass of one device."""

    sends: tuple[Send, ...]
    places: int

    @property
    def injected(self) -> float:
        """Bytes that leave a device: what counts where every device is linked to every other."""
        return sum(x.bytes for x in self.sends)

    @property
    def busiest(self) -> float:
        """Bytes over a link in the busier direction, of a ring of neighbours: each send occupies its way."""
        ways = [0.0, 0.0]
        for by, size in self.sends:
            if by == 0:
                ways = [way + size / 2 for way in ways]
            else:
                near = (by + self.places // 2) % self.places - self.places // 2
                ways[near > 0] += abs(near) * size
        return max(ways)


@dataclass(frozen=True, eq=False)
class _DryRing(Ring):
    loops = False  # a loop's body is traced once
    sent: list = field(default_factory=list)

    @property
    def place(self):
        return 0

    def shift(self, x, by, senders, empty=0):
        self.sent.append(Send(by, sum(map(_bytes, jax.tree.leaves(x))) * float(senders.mean())))
        return x

    def gather(self, x):
        self.sent.append(Send(0, _bytes(x) * (self.size - 1)))
        return jnp.concatenate([x] * self.size, 1)

    def scatter(self, x):
        self.sent.append(Send(0, _bytes(x) * (self.size - 1) / self.size))
        return x[:, : x.shape[1] // self.size]


def _bytes(x) -> int:
    return x.size * x.dtype.itemsize


class _DryJob(Job):
    def piece(self, lists, q_place, kv_place):
        return None

    def forward(self, queries, keys, mask):
        B, T, N, _ = queries.q.shape
        return jnp.zeros((B, T, N, keys.v.shape[-1]), queries.q.dtype), jnp.zeros((B, T, N))

    def forward_round(self, queries, keys, route):
        for by, shards in zip((1, -1), route.shards, strict=True):
            self.ring.sent.append(Send(by, shards * (_bytes(keys.k) + _bytes(keys.v))))
        jax.tree.map(self.ring.gather, keys[2:])
        return self.forward(queries, keys, None)

    def backward(self, queries, keys, mask, statistics):
        slope = None if self.slope is None else jnp.zeros(self.slope.shape)
        dq, dk, dv = (jnp.zeros(x.shape, x.dtype) for x in (queries.q, keys.k, keys.v))
        return (dq, slope), (dk, dv)


def traffic(name: str, job: Job, queries: Queries, keys: Keys, backward: bool) -> Traffic:
    """Of a pass by the schedule of this name; arrays or their shapes are those of one device."""
    ring = _DryRing(**{f: getattr(job.ring, f) for f in ("axis", "size", "stride", "uses")})
    B, T, N, _ = queries.q.shape
    do = jax.ShapeDtypeStruct((B, T, N, keys.v.shape[-1]), queries.q.dtype)
    lse = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    statistics = (Cotangents(do, lse, lse),) if backward else ()

    def run(slope, queries, keys, *statistics):
        dry = _DryJob(**{**vars(job), "ring": ring, "slope": slope})
        schedule = SCHEDULES[name]
        return (schedule.backward if backward else schedule.forward)(dry, queries, keys, *statistics)

    jax.eval_shape(run, job.slope, queries, keys, *statistics)
    return Traffic(tuple(ring.sent), job.ring.size)


AUTO = ("halo", "ring", "two_stream_ring", "token_ring", "token_ring_direct")
"""What `choose` chooses from; of equals the first. Gathering all keys, and a kernel that moves them,
are left to those who ask for it."""


def exchanged(queries: Queries, keys: Keys, ulysses: int, devices: int, linked: bool) -> float:
    """Bytes that an exchange of tokens for heads adds to either pass of a schedule.

    Arrays or their shapes are those of a device after it: queries, keys and values go there and outputs come
    back, and in the backward their gradients the other way.
    """
    B, T, N, _ = queries.q.shape
    outputs = B * T * N * (keys.v.shape[-1] * queries.q.dtype.itemsize + 4)
    size = _bytes(queries.q) + _bytes(keys.k) + _bytes(keys.v) + outputs
    if linked:
        return size * (ulysses - 1) / ulysses
    # Each of u parts goes to one of u devices: u^2 / 8 parts cross a link of a ring in either direction, and
    # twice as many the middle one of a line.
    return 0 if ulysses == 1 else size * ulysses / (8 if ulysses == devices else 4)


def choose(job: Job, queries: Queries, keys: Keys, linked: bool) -> dict[str, dict[str, float]]:
    """Bytes of each schedule that serves the call, by pass: `{"forward": {name: bytes}, "backward": ...}`.

    The least comes first. `linked`: every device is linked to every other, else they are a ring.
    """
    found = {}
    for way in ("forward", "backward"):
        counts = {}
        for name in AUTO:
            if SCHEDULES[name].refuses(job) is None:
                sent = traffic(name, job, queries, keys, backward=way == "backward")
                counts[name] = sent.injected if linked else sent.busiest
        found[way] = dict(sorted(counts.items(), key=lambda item: item[1]))
    return found
