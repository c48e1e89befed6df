"""What moves where: the schedules of attention over a sequence axis, forward and backward.

Each is two functions of one place's shards, which run inside `shard_map`:
`forward(job, queries, keys) -> (o, lse)`, a partial over all keys, and
`backward(job, queries, keys, statistics) -> (dq, dslope), (dk, dv)`, both summed in float32. `refuses(job)`
is a reason or None, and `rounds(job, K, backward)` how many transfers of a pass wait for one another.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from blockjax import partials
from blockjax.kernels.block_sparse_attention.spec import Cotangents
from blockjax.masks import Between, Ranges
from blockjax.parallel.circulate import Journey, Trip, circulate, in_turn
from blockjax.parallel.remote_dma import RemoteDma
from blockjax.parallel.shards import Job, Keys, Queries, add, heads


class Leg(NamedTuple):
    """A trip of some heads: part `part` of `parts`."""

    trip: Trip
    part: int = 0
    parts: int = 1

    def cut(self, x, axis: int):
        n = x.shape[axis] // self.parts
        return lax.slice_in_dim(x, self.part * n, (self.part + 1) * n, axis=axis)


@dataclass(frozen=True)
class Circulating:
    """Keys or queries go round, in one direction or in both.

    `both="offsets"`: whole parts in both directions, each half way: half the rounds. Results that travel with
    them would end half way from home, so the backward splits heads, as `both="heads"` always does.
    """

    moving: str
    home: str = "follow"
    both: str | None = None

    def refuses(self, job: Job) -> str | None:
        return None

    def rounds(self, job: Job, K: int, backward: bool) -> int:
        """Transfers that wait for one another: the visits, and what must then come home."""
        home = backward or self.moving == "queries"
        return max(
            len(leg.trip.offsets) + (home and bool(leg.trip.offsets)) for leg in self.legs(job, K, backward)
        )

    def legs(self, job: Job, K: int, backward: bool) -> list[Leg]:
        P = job.ring.size
        live = [o for o in range(1, P) if job.ring.live(o, self.moving).any()]
        # What must come home hides its way behind the local shard, which therefore comes last.
        local = "last" if backward or self.moving == "queries" else "first"
        if self.both is None or (K % 2 and (backward or self.both == "heads")):
            return [Leg(Trip(self.moving, tuple(live), self.home, local))]
        if self.both == "offsets" and not backward:
            there = tuple(o for o in live if o <= P // 2)
            back = tuple(o - P for o in reversed(live) if o > P // 2)
            legs = [Leg(Trip(self.moving, there, self.home, local))]
            return legs + [Leg(Trip(self.moving, back, self.home, None))] * bool(back)
        back = tuple(o - P for o in reversed(live))
        return [
            Leg(Trip(self.moving, offsets, self.home, local), part, 2)
            for part, offsets in enumerate((tuple(live), back))
        ]

    def forward(self, job: Job, queries: Queries, keys: Keys) -> partials.Partial:
        keys_move = self.moving == "keys"

        def journey(leg: Leg) -> Journey:
            own, q, k = (heads(x, leg.cut) for x in (job, queries, keys))

            def visit(part, offset):
                places = _places(own, offset, self.moving)
                if keys_move:
                    return own.forward(q, part, own.piece(q.lists, *places)), None
                return None, own.forward(part, k, own.piece(part.lists, *places))

            return Journey(leg.trip, k if keys_move else q, visit, partials.merge, (0, -jnp.inf))

        legs = self.legs(job, keys.k.shape[2], backward=False)
        found = [x[not keys_move] for x in circulate(job.ring, [journey(leg) for leg in legs])]
        if legs[0].parts == 1:
            return partials.fold(x for x in found if x is not None)
        return tuple(jnp.concatenate(x, 2) for x in zip(*found, strict=True))

    def backward(self, job: Job, queries: Queries, keys: Keys, statistics: Cotangents):
        keys_move = self.moving == "keys"

        def journey(leg: Leg) -> Journey:
            own, q, k, stats = (heads(x, leg.cut) for x in (job, queries, keys, statistics))

            def visit(part, offset):
                places = _places(own, offset, self.moving)
                if keys_move:
                    found = own.backward(q, part, own.piece(q.lists, *places), stats)
                    # Not as rounded: libtpu hides so short a transfer behind no kernel.
                    return jax.tree.map(partials.wide, found)
                part, stats_of_part = part
                (dq, dslope), dkv = own.backward(part, k, own.piece(part.lists, *places), stats_of_part)
                return (dkv, dslope), dq

            part = k if keys_move else (q, stats)
            return Journey(leg.trip, part, visit, add)

        legs = self.legs(job, keys.k.shape[2], backward=True)
        found = []
        for here, back in circulate(job.ring, [journey(leg) for leg in legs]):
            (dq, dslope), dkv = (here, back) if keys_move else ((back, here[1]), here[0])
            found.append((dq, dslope, *dkv))
        dq, dslope, dk, dv = (x[0] if len(legs) == 1 else x for x in zip(*found, strict=True))
        if len(legs) == 1:
            return (dq, dslope), (dk, dv)
        dq, dk, dv = (jnp.concatenate(x, 2) for x in (dq, dk, dv))
        return (dq, None if job.slope is None else jnp.concatenate(dslope)), (dk, dv)


def _places(job: Job, offset: int, moving: str):
    """Of queries and keys, where a part is at work `offset` places from home."""
    here = job.ring.place
    there = (here - offset) % job.ring.size
    return (here, there) if moving == "keys" else (there, here)


@dataclass(frozen=True)
class AllGather:
    """Every place gathers the keys of all, some heads at a time, so that the next ones come meanwhile."""

    groups: int = 4

    def refuses(self, job: Job) -> str | None:
        return None

    def rounds(self, job: Job, K: int, backward: bool) -> int:
        """To gather, and to scatter gradients; the second waits for the first of the same heads only."""
        return 1 + backward

    def forward(self, job: Job, queries: Queries, keys: Keys) -> partials.Partial:
        found = []
        for own, q, k, _ in self.parts(job, queries, keys):
            k, found = in_turn((self.gather(own, k), found))
            found.append(own.forward(q, k, own.piece(q.lists, own.ring.place, None)))
        return tuple(jnp.concatenate(x, 2) for x in zip(*found, strict=True))

    def backward(self, job: Job, queries: Queries, keys: Keys, statistics: Cotangents):
        dqs, found = [], []
        for own, q, k, stats in self.parts(job, queries, keys, statistics):
            k, dqs = in_turn((self.gather(own, k), dqs))
            (dq, dslope), dkv = own.backward(q, k, own.piece(q.lists, own.ring.place, None), stats)
            dqs.append(dq)
            found.append((dslope, *(own.ring.scatter(partials.wide(d)) for d in dkv)))
        dslope, dk, dv = zip(*found, strict=True)
        dq, dk, dv = (jnp.concatenate(x, 2) for x in (dqs, dk, dv))
        return (dq, None if job.slope is None else jnp.concatenate(dslope)), (dk, dv)

    def parts(self, job, queries, keys, statistics=None):
        K = keys.k.shape[2]
        n = max(d for d in range(1, self.groups + 1) if K % d == 0)
        for i in range(n):
            cut = Leg(None, i, n).cut
            yield tuple(None if x is None else heads(x, cut) for x in (job, queries, keys, statistics))

    @staticmethod
    def gather(job: Job, keys: Keys) -> Keys:
        return jax.tree.map(job.ring.gather, keys)


@dataclass(frozen=True)
class Halo:
    """Of a window no longer than a shard, only the keys that a neighbour's queries see are sent."""

    def refuses(self, job: Job) -> str | None:
        if not job.consecutive or not isinstance(job.mask, Ranges):
            return "it needs the layout 'contiguous' and a mask whose keys are one interval: a window"
        if self.reach(job) is None:
            return "the window must be known before tracing and be no longer than a shard"
        return None

    def rounds(self, job: Job, K: int, backward: bool) -> int:
        return 1 + backward

    def reach(self, job: Job) -> tuple[int, int] | None:
        """Blocks needed of the place before and of the one after; None if not known or too many."""
        mask, nq, nk = job.mask, job.q_blocks.shape[1], job.kv_blocks.shape[1]
        try:
            lo, _, _, hi = (np.asarray(x) for x in mask.bounds(np.arange(mask.nq)))
        except jax.errors.TracerArrayConversionError:
            return None
        place = np.arange(mask.nq) // nq
        some = hi > lo
        before = np.max(np.where(some, place * nk - lo, 0), initial=0)
        after = np.max(np.where(some, hi - (place + 1) * nk, 0), initial=0)
        return (int(before), int(after)) if max(before, after) <= nk else None

    def forward(self, job: Job, queries: Queries, keys: Keys) -> partials.Partial:
        return job.forward(queries, self.widen(job, keys), self.piece(job))

    def backward(self, job: Job, queries: Queries, keys: Keys, statistics: Cotangents):
        dq, dkv = job.backward(queries, self.widen(job, keys), self.piece(job), statistics)
        before, after = (n * job.mask.bk for n in self.reach(job))
        S = keys.k.shape[1]

        def back(x, by, start):
            """What a neighbour found, among zeros: XLA's GPU compiler dies of a scatter over a shard."""
            x = partials.wide(self.send(job, x, by))
            return jnp.pad(x, ((0, 0), (start, S - start - x.shape[1]), (0, 0), (0, 0)))

        def home(d):
            own = partials.wide(lax.slice_in_dim(d, before, before + S, axis=1))
            own = own + back(d[:, :before], -1, S - before) if before else own
            return own + back(d[:, before + S :], 1, 0) if after else own

        return dq, jax.tree.map(home, dkv)

    def widen(self, job: Job, keys: Keys) -> Keys:
        before, after = (n * job.mask.bk for n in self.reach(job))

        def wide(x):
            parts = [self.send(job, x[:, x.shape[1] - before :], 1)] if before else []
            parts += [x, *([self.send(job, x[:, :after], -1)] if after else [])]
            return jnp.concatenate(parts, 1)

        return jax.tree.map(wide, keys)

    def send(self, job: Job, x, by: int):
        """To the next place, or the one before; nothing goes round the end."""
        senders = np.ones(job.ring.size, bool)
        senders[-1 if by == 1 else 0] = False
        return job.ring.shift(x, by, senders)

    def piece(self, job: Job):
        nq, nk, place = job.q_blocks.shape[1], job.kv_blocks.shape[1], job.ring.place
        mask, (before, after) = job.mask, self.reach(job)
        # Zeros arrive at both ends of the sequence.
        real = Between(mask.kv_offset, mask.kv_offset + mask.S)
        rows = replace(mask, predicate=mask.predicate & real).rows(place * nq, nq)
        return rows.columns(place * nk - before, before + nk + after)


SCHEDULES = {
    "all_gather": AllGather(),
    "ring": Circulating("keys"),
    "two_stream_ring": Circulating("keys", both="offsets"),
    "ring_dma": RemoteDma(otherwise=Circulating("keys", both="offsets")),
    "token_ring": Circulating("queries", both="heads"),
    "token_ring_direct": Circulating("queries", home="direct"),
    "halo": Halo(),
}
