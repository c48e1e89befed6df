"""The forward over a ring of devices in one TPU kernel, which moves the keys by itself.

The shard of keys and values in HBM goes to both neighbours, theirs to the next ones, and so on half way round
in both directions: round t brings the shards of the places t before and t after this one, the last one of an
even ring half of the heads of the opposite place by each way. Shards cross a link once a pass; tiles fetched
from a neighbour inside the loop over queries would do so once a tile of queries. While a round's copies run,
the shards that the one before brought are folded.

Each direction has two slots in HBM: one is folded and sent on while the next shard arrives in the other. A
copy needs a credit of its receiver, which grants one for each slot that it has folded and sent on: there is
no other handshake, and a fast sender would otherwise write what its receiver still reads.

The queries visit one shard after the other, so what they have found so far, `(o, lse)`, lies in HBM in
float32. A visit reads and writes it, 2 * 4 * Hv bytes a row, while 2 * (H + Hv) bytes a key stream past each
tile of rows: of 128 features, tiles of 1024 rows and shards of 8192 keys, 1 MiB beside 4 MiB. These copies
overlap the walk, and do not happen where it is empty.

The slots take as much HBM as four shards. Of chips with two cores (v4, v5p) one does all the work: semaphores
belong to a core.

Source: Ring Attention, Liu et al. 2023, arXiv:2310.01889, both ways round, as remote copies.
"""

import functools
import itertools
from dataclasses import dataclass

import jax.numpy as jnp
from blockjax.kernels.block_sparse_attention import plan
from blockjax.kernels.block_sparse_attention.spec import Inputs, Options
from blockjax.kernels.block_sparse_attention.tpu import PER_ROW, Launch, scalars
from blockjax.kernels.block_sparse_attention.tpu import walk as walks
from blockjax.kernels.block_sparse_attention.tpu.kernels import Call, Forward, widen
from blockjax.kernels.block_sparse_attention.tpu.layout import LANES, Route
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from blockjax import partials

SLOTS = 2
"""Of each direction: as many copies may be under way or unread."""

_BARRIERS = itertools.count(16)


def forward_pass(route: Route, visits: list[Inputs], options: Options):
    """The partial of the queries over all shards they visit, inside `shard_map`.

    Args:
        visits: for each of `route.visits` the call on that shard: its mask, and segment ids and positions of
            its keys; q, k and v are those of this device in all of them.

    Returns:
        `o` [B, T, N, Hv] and `lse` [B, N, T], float32.
    """
    launch = RingLaunch(route, visits, options)
    out = launch()
    return launch.q.unlay(out["o"]), launch.per_token(out["lse"])


@functools.cache
def _barrier(axis: str, size: int, stride: int) -> int:
    """A barrier for each ring: neighbours of another one must not be taken for those of this.

    Counted in the order of tracing, which is the same for all processes.
    """
    return next(_BARRIERS)


class RingLaunch(Launch):
    """The ring's kernel on one device's arrays."""

    def __init__(self, route: Route, visits: list[Inputs], options: Options):
        super().__init__("forward", options, visits[0], *map(plan.rows, visits))
        self.name, self.kernel, self.lead = "ring_forward", RingForward, (len(visits),)
        self.visits, self.call = visits, RingCall(**vars(self.call), route=route)
        ints = [scalars(x.mask, x.slope)[0]["ints"] for x in visits]
        self.numbers |= dict(ints=jnp.stack(ints), visits=jnp.array(route.visits, jnp.int32))

    def __call__(self) -> dict:
        x = self.inputs
        anchors, streams = dict(q=self.queries(x.q)), dict(k=self.keys(x.k), v=self.keys(x.v))
        streams = {name: self.stream.extend(x) for name, x in streams.items()}
        anchor_ids, _ = self.ids(x)
        if anchor_ids is not None:
            anchors["anchor_ids"] = anchor_ids
            streams["stream_ids"] = jnp.stack([self.stream.extend(self.ids(x)[1]) for x in self.visits])
        shapes = dict(o=self.output(x.v.shape[-1], jnp.float32), lse=self.output(*PER_ROW))
        shapes |= {f"{n}_slots": self.shape((2, SLOTS, *streams[n].shape), x.k.dtype) for n in ("k", "v")}
        arrays, specs, scratch = self.operands(anchors, streams)
        for name in ("kept", "found"):
            rows = self.anchor.part
            scratch[f"{name}_o"] = pltpu.VMEM((rows, x.v.shape[-1]), jnp.float32)
            scratch[f"{name}_lse"] = pltpu.VMEM((1, max(rows, LANES)), jnp.float32)
        scratch |= dict(
            writing=pltpu.SMEM((1,), jnp.int32),
            carry_sems=pltpu.SemaphoreType.DMA((2,)),
            sent=pltpu.SemaphoreType.DMA((2, SLOTS)),
            arrived=pltpu.SemaphoreType.DMA((2, SLOTS)),
            credits=pltpu.SemaphoreType.REGULAR((2,)),
        )
        far = dict.fromkeys(shapes, pl.BlockSpec(memory_space=pltpu.HBM))
        return self.run(
            arrays, specs, scratch, shapes, far, dimension_semantics=("arbitrary",) * 5,
            collective_id=_barrier(*self.call.route[:3]), has_side_effects=True,
        )  # fmt: skip


@dataclass(frozen=True)
class RingCall(Call):
    route: Route


class RingForward(Forward):
    """One grid point: a shard, and a tile of queries that visits it."""

    lead = 1

    def __init__(self, call: RingCall, refs: dict):
        self.shard = pl.program_id(0)
        self.offset = refs["visits"][self.shard]
        refs["ints"] = refs["ints"].at[self.shard]
        if "stream_ids" in refs:
            refs["stream_ids"] = refs["stream_ids"].at[self.shard]
        super().__init__(call, refs)
        _, heads, *_ = refs["k"].shape
        late = 2 * lax.div(self.head * heads, self.heads) >= heads
        way = jnp.where(self.split(self.offset), late, self.offset < 0).astype(jnp.int32)
        slot = lax.rem(jnp.abs(self.offset), SLOTS)
        n = len(self.streamed)
        slots = [refs[f"{name}_slots"].at[way, slot] for name in self.streamed]
        brought = [lane._replace(source=x) for lane, x in zip(self.lanes[:n], slots, strict=True)]
        self.brought = brought + self.lanes[n:]

    @property
    def number(self):
        """Of the tile of queries among all, from 1 on."""
        return (self.batch * self.heads + self.head) * self.tiles + self.tile + 1

    def run(self):
        pl.when(self.number == 1)(self.advance)
        super().run()
        last = (self.shard == pl.num_programs(0) - 1) & (
            self.number == pl.num_programs(1) * self.heads * self.tiles
        )
        pl.when(last)(self.written)

    def list_index(self, t):
        b, h = self.call.lists
        return self.shard * (b * h) + super().list_index(t)

    def copy(self, *place):
        pl.when(self.offset == 0)(lambda: self.start(self.lanes, *place))
        pl.when(self.offset != 0)(lambda: self.start(self.brought, *place))

    # What the queries have found.

    @property
    def idle(self):
        """Whether this shard has nothing for the tile."""
        return (self.shard > 0) & (self.walker.units(self.row(self.tile, self.tile)) == 0)

    def begin(self):
        super().begin()
        refs = self.refs

        @pl.when(self.shard == 0)
        def _():
            refs["kept_o"][...] = jnp.zeros_like(refs["kept_o"])
            refs["kept_lse"][...] = jnp.full_like(refs["kept_lse"], -jnp.inf)
            refs["writing"][0] = jnp.where(self.number == 1, 0, refs["writing"][0])

        @pl.when((self.shard > 0) & ~self.idle)
        def _():
            pl.when(refs["writing"][0] == self.number)(self.written)
            for copy in self.carry("kept"):
                copy.start()

    def finish(self):
        pl.when(~self.idle)(self.merge)

    def merge(self):
        refs, (o, lse) = self.refs, self.partial()

        @pl.when(self.shard > 0)
        def _():
            for copy in self.carry("kept"):
                copy.wait()

        rows, width = o.shape
        kept = jnp.broadcast_to(walks.to_column(refs["kept_lse"][...], rows), lse.shape)
        before, now, lse = partials.shares(kept, lse)
        self.written()
        refs["found_o"][...] = widen(before, width) * refs["kept_o"][...] + widen(now, width) * o
        refs["found_lse"][...] = walks.to_lanes(lse)
        for copy in self.carry("found"):
            copy.start()
        refs["writing"][0] = self.number

    def written(self):
        """Waits until what a tile has found is in HBM, if any is on its way."""

        @pl.when(self.refs["writing"][0] != 0)
        def _():
            for copy in self.carry("found"):
                copy.wait()
            self.refs["writing"][0] = 0

    def carry(self, name: str):
        """Copies of `(o, lse)` of this tile: `kept` from HBM, `found` to it."""
        refs, part = self.refs, self.call.anchor.part
        rows = pl.ds(pl.multiple_of(self.tile * part, part), part)
        far = refs["o"].at[self.batch, self.head, rows], refs["lse"].at[self.batch, self.head, self.tile]
        near, sem = (refs[f"{name}_o"], refs[f"{name}_lse"]), refs["carry_sems"].at[int(name == "found")]
        pairs = zip(far, near, strict=True) if name == "kept" else zip(near, far, strict=True)
        return [pltpu.make_async_copy(*pair, sem) for pair in pairs]

    # How the shards move. Way 0 leads to the next place, way 1 to the one before.

    def advance(self):
        """Begins all rounds up to that of this shard."""
        before = self.refs["visits"][jnp.maximum(self.shard - 1, 0)]
        begun = jnp.where(self.shard == 0, 0, jnp.abs(before) + 1)
        lax.fori_loop(begun, jnp.abs(self.offset) + 1, lambda t, _: self.begin_round(t), None)

    def begin_round(self, t):
        """Round t has the copies t, and sends copies t + 1."""
        pl.when(t == 0)(self.enter)
        copies = self.call.route.copies
        for way in (0, 1):

            @pl.when((t > 0) & (t <= copies[way]))
            def _(way=way):
                self.send(way, t, lambda copy: copy.wait())

            # Its place for copy t + 1 was folded in round t - 1, and has been sent on.
            pl.when((t > 1) & (t < copies[way]))(functools.partial(self.grant, way))

        for way in (0, 1):

            @pl.when(t < copies[way])
            def _(way=way):
                pl.semaphore_wait(self.refs["credits"].at[way], 1)
                for own in (True, False):
                    pl.when((t == 0) == own)(lambda own=own: self.send(way, t + 1, lambda x: x.start(), own))

    def enter(self):
        """Waits for both neighbours, and grants each a credit for each slot that it will fill.

        The next call may share this barrier: nobody leaves before both its neighbours have entered, as it has
        the keys of one and credits of the other.
        """
        barrier = pltpu.get_barrier_semaphore()
        for way in (0, 1):
            pl.semaphore_signal(barrier, 1, device_id=self.neighbour(way))
        pl.semaphore_wait(barrier, 2)
        for way, copies in enumerate(self.call.route.copies):
            if copies:
                self.grant(way, min(SLOTS, copies))

    def grant(self, way, credits=1):
        """To the sender: so many of the slots for what comes this way are free."""
        pl.semaphore_signal(self.refs["credits"].at[way], credits, device_id=self.neighbour(1 - way))

    def split(self, t):
        """Whether what a place visits, or is sent, as its t-th comes by halves."""
        return (t == self.call.route.size // 2) & self.call.route.halves

    def send(self, way, t, act, own=False):
        """Acts on the copies to the neighbour as its t-th: of the own shard, or of the t - 1-th that came."""
        refs, side = self.refs, self.call.stream.side
        rows, heads = pl.ds(0, side.blocks * side.rows), refs["k"].shape[1]
        here, there = lax.rem(t - 1, SLOTS), lax.rem(t, SLOTS)

        def copies(heads):
            for name in self.streamed:
                slots = refs[f"{name}_slots"]
                source, target = refs[name] if own else slots.at[way, here], slots.at[way, there]
                copy = pltpu.make_async_remote_copy(
                    source.at[:, heads, rows], target.at[:, heads, rows],
                    refs["sent"].at[way, here], refs["arrived"].at[way, there], device_id=self.neighbour(way),
                )  # fmt: skip
                act(copy)

        pl.when(~self.split(t))(lambda: copies(pl.ds(0, heads)))
        if self.call.route.halves:
            pl.when(self.split(t))(lambda: copies(pl.ds(way * heads // 2, heads // 2)))

    def neighbour(self, way) -> dict:
        """The device one place on; those of other mesh axes are this one's own."""
        axis, size, stride, *_ = self.call.route
        here, devices = lax.axis_index(axis), size * stride
        return {axis: lax.rem(here + (stride if way == 0 else devices - stride), devices)}
