"""The three TPU kernels: forward and dQ hold queries and stream keys, dK/dV holds keys and streams queries.

Scores are kept in float32 and in units of log 2, so that probabilities are powers of two. In all three a tile
of scores is `anchor @ stream.T`, [anchor rows, stream rows]; which side are the queries matters only to masks
and to where lse and delta lie: in a column for dQ, along lanes for dK/dV.
Source of the formulas: FlashAttention-2, arXiv:2307.08691; dlse enters as delta = sum(do o) - dlse.
"""

import functools
import math
import operator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from blockjax.kernels.block_sparse_attention.tpu import walk as walks
from blockjax.kernels.block_sparse_attention.tpu.layout import LANES, LIST_ALIGNMENT, Side, Stream
from blockjax.kernels.block_sparse_attention.tpu.walk import START, Lane, Walker
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LOG2_E = math.log2(math.e)
LEAST = -1e30
"""Where a row's maximum starts: finite, so that a row of only -inf has weights 0 and no NaN."""


@dataclass(frozen=True)
class Call:
    """All that is static about one kernel."""

    anchor: Side
    stream: Stream
    anchor_is_keys: bool
    inner: int  # walks per anchor tile: query heads of a key head that have lists of their own
    rows: int  # of the walk
    ranges: bool
    window: int  # entries copied for a row of lists that stay in HBM; 0 if all are in SMEM
    lists: tuple[int, int]  # over (batch, heads)
    list_length: int  # entries per list
    predicates: jax.tree_util.PyTreeDef
    scalars: tuple[tuple[str, int], ...]  # where each leaf of the predicates lies: array and index
    scale: float
    soft_cap: float | None
    bias: bool
    positions: bool
    segments: bool
    sum_in_product: bool  # row sums as one more column of the product with v

    @property
    def tile(self) -> tuple[int, int]:
        return self.anchor.part, self.stream.rows


class Kernel:
    """One grid point: an anchor tile and its walk. `refs` holds every array by name."""

    streamed: tuple[str, ...]
    lead = 0
    """Axes of the grid before those of batch entries, heads, tiles and turns."""

    def __init__(self, call: Call, refs: dict):
        self.call, self.refs = call, refs
        axes = range(self.lead, self.lead + 4)
        self.batch, self.head, self.tile, self.turn = map(pl.program_id, axes)
        _, self.heads, self.tiles, _ = map(pl.num_programs, axes)
        self.walker = Walker(
            call.stream, call.rows, call.ranges, refs["table"], refs["following"],
            refs["window" if call.window else "entries"] if not call.ranges else None,
        )  # fmt: skip
        self.lanes = [
            Lane(refs[name], refs[f"{name}_buffers"], name in ("stats", "stream_ids"))
            for name in (*self.streamed, *(["stream_ids"] if "stream_ids" in refs else []))
        ]

    def run(self):
        """Walks the row: each tile's copies start one tile ahead, those of the next row's first one too."""
        call, refs = self.call, self.refs
        pl.when(self.turn == 0)(self.begin)
        t = self.tile * call.inner + self.turn
        following = t + 1
        more = following < self.tiles * call.inner
        refs["phase"][0] = jnp.where(t == 0, 0, refs["phase"][0])
        phase = refs["phase"][0]

        if call.window:

            @pl.when(t == 0)
            def _():
                self.copy_list(t, self.tile).start()
                self.copy_list(t, self.tile).wait()

            pl.when(more)(lambda: self.copy_list(following, self.next_tile, True).start())

        row = self.row(t, self.tile)
        steps = self.walker.steps(row)

        @pl.when((t == 0) & (steps > 0))
        def _():
            self.copy(row, 0, phase, self.turn)

        def start_next(last, step, buffer):
            if call.window:
                pl.when(last & more)(lambda: self.copy_list(following, self.next_tile, True).wait())
            after = self.row(following, jnp.where(more, self.next_tile, self.tile), following=True)
            exists = more & (self.walker.steps(after) > 0)
            chosen = jax.tree.map(functools.partial(jnp.where, last), after, row)
            turn = jnp.where(last, lax.rem(following, call.inner), self.turn)

            @pl.when(~last | exists)
            def _():
                self.copy(chosen, jnp.where(last, 0, step), buffer, turn)

        def visit(step, _):
            buffer = (phase + step) & 1
            start_next(step + 1 == steps, step + 1, 1 - buffer)
            walks.wait_copies(self.lanes, refs["sems"], buffer)
            masked = self.walker.masked(row, step)
            pl.when(masked)(lambda: self.visit(row, step, buffer, masked=True))
            pl.when(~masked)(lambda: self.visit(row, step, buffer, masked=False))

        lax.fori_loop(0, steps, visit, None)
        pl.when(steps == 0)(lambda: start_next(jnp.bool_(True), 0, phase))
        refs["phase"][0] = (phase + steps) & 1
        pl.when(self.turn == call.inner - 1)(self.finish)

    @property
    def next_tile(self):
        return lax.div(self.tile * self.call.inner + self.turn + 1, self.call.inner)

    def query_head(self, turn):
        """The head of queries, as packed, that this turn deals with."""
        return self.head * self.call.inner + turn if self.call.anchor_is_keys else self.head

    def row(self, t, tile, following=False):
        row, call = lax.div(tile, self.call.anchor.parts), self.call
        if call.ranges:
            return self.walker.row(row, following=following)
        first = self.list_start(t, tile, following)
        entries = (t & 1) * call.window + lax.rem(first, LIST_ALIGNMENT) if call.window else first
        return self.walker.row(row, entries, following)

    def list_index(self, t):
        b, h = self.call.lists
        head = self.query_head(lax.rem(t, self.call.inner))
        heads = self.heads * (self.call.inner if self.call.anchor_is_keys else 1)
        batch = self.batch if b > 1 else 0
        return batch * h + (lax.div(head * h, heads) if h > 1 else 0)

    def list_start(self, t, tile, following):
        """Where the entries of this row begin among those of all lists."""
        row = lax.div(tile, self.call.anchor.parts)
        return self.list_index(t) * self.call.list_length + self.walker.field(START, row, following)

    def copy_list(self, t, tile, following=False):
        """Of a row of lists in HBM, from the aligned entry before its first, into one half of the window."""
        size, refs = self.call.window, self.refs
        first = lax.div(self.list_start(t, tile, following), LIST_ALIGNMENT) * LIST_ALIGNMENT
        source = refs["entries"].at[pl.ds(pl.multiple_of(first, LIST_ALIGNMENT), size)]
        target = refs["window"].at[pl.ds(pl.multiple_of((t & 1) * size, LIST_ALIGNMENT), size)]
        return pltpu.make_async_copy(source, target, refs["list_sems"].at[t & 1])

    def copy(self, row, step, buffer, turn):
        self.start(self.lanes, row, step, buffer, turn)

    def start(self, lanes, row, step, buffer, turn):
        """The copies of a tile of the stream from these lanes."""
        call = self.call

        def where(lane):
            b, h = lane.source.shape[:2]
            head = self.query_head(turn) if call.anchor_is_keys else lax.div(self.head * h, self.heads)
            return self.batch if b > 1 else 0, head if h > 1 else 0

        walks.start_copies(self.walker, lanes, self.refs["sems"], row, step, buffer, where)

    def begin(self):
        """Before the first tile of the stream."""
        if "anchor_ids" in self.refs:
            ids = self.refs["anchor_ids"]
            for i in range(ids.shape[0]):
                column = walks.to_int_column(ids[i : i + 1], self.call.anchor.part)
                self.refs["columns"][i] = jnp.broadcast_to(column, (self.call.anchor.part, LANES))

    def visit(self, row, step, buffer, masked: bool):
        raise NotImplementedError

    def finish(self):
        raise NotImplementedError

    def data(self, name, row, step, buffer, masked):
        """A streamed tile of rows; those of blocks that are not listed are zeroed."""
        x = self.refs[f"{name}_buffers"][buffer]
        if masked and self.call.stream.consecutive:
            at = lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
            live = at < self.walker.live_rows(row, step)
            x = jnp.where(live, x.astype(jnp.float32), 0.0).astype(x.dtype)
        return x

    def scores(self, a, s, row, step, buffer, masked):
        """Scores [anchor, stream] in units of log 2, d(capped)/d(scaled product), distance, visibility."""
        call = self.call
        z = dot(a, s, transposed=True)
        dcap = distance = seen = None
        if call.soft_cap is None:
            z = z * (call.scale * LOG2_E)
        else:
            ratio = jnp.tanh(z * (call.scale / call.soft_cap))
            z, dcap = ratio * (call.soft_cap * LOG2_E), 1 - ratio * ratio
        if not masked and not call.bias:
            return z, dcap, distance, seen
        slots = range(call.stream.slots)
        units, tags = zip(*(self.walker.unit(row, step * call.stream.slots + i) for i in slots), strict=True)
        if call.stream.consecutive:
            units = [units[0] + i for i in slots]
        here, there = self.places(units, buffer)
        if call.bias:
            distance = jnp.abs(here - there).astype(jnp.float32)
            z = z - self.slope() * distance
        if masked:
            seen = self.seen(row, step, buffer, units, tags, here, there)
            z = jnp.where(seen, z, -jnp.inf)
        return z, dcap, distance, seen

    def places(self, units, buffer):
        """Positions of the anchor, [rows, 1], and of the stream, [1, rows]."""
        call = self.call
        if call.positions:
            return self.refs["columns"][0][:, :1], self.stream_ids(buffer)[0]
        q_offset, kv_offset = self.refs["ints"][0], self.refs["ints"][1]
        here, there = (kv_offset, q_offset) if call.anchor_is_keys else (q_offset, kv_offset)
        rows, columns = call.tile
        return (
            here + walks.tokens(call.anchor, [self.tile], (rows, 1), 0),
            there + walks.tokens(call.stream.side, units, (1, columns), 1),
        )

    def stream_ids(self, buffer):
        return walks.spread(self.refs["stream_ids_buffers"][buffer], self.call.stream)

    def slope(self):
        """[rows, 1] or a scalar, in units of log 2."""
        call = self.call
        pack = call.stream.side.pack if call.anchor_is_keys else call.anchor.pack
        first = self.query_head(self.turn) * pack
        slopes = [self.refs["floats"][first + i] * LOG2_E for i in range(pack)]
        if pack == 1:
            return slopes[0]
        if call.anchor_is_keys:
            side = call.stream
            return walks.steps_of(slopes * side.slots, side.side.piece, (1, side.rows), 1)
        return walks.steps_of(slopes, call.anchor.piece, (call.anchor.part, 1), 0)

    def seen(self, row, step, buffer, units, tags, here, there):
        call, refs = self.call, self.refs
        pq, pk = (there, here) if call.anchor_is_keys else (here, there)
        lanes = (1, call.stream.rows)
        predicates = self.predicates()
        terms = []
        if call.stream.consecutive:
            terms.append(lax.broadcasted_iota(jnp.int32, call.tile, 1) < self.walker.live_rows(row, step))
        elif call.stream.slots > 1 or len(predicates) > 1:
            tag = jnp.broadcast_to(walks.steps_of(tags, call.stream.side.part, lanes, 1), call.tile)
        if len(predicates) > 1:
            granted = [
                ((tag & (1 << i)) != 0) & _full(p.visible(pq, pk), call.tile)
                for i, p in enumerate(predicates)
            ]
            terms.append(functools.reduce(operator.or_, granted))
        else:
            if call.stream.slots > 1 and not call.stream.consecutive:
                terms.append(tag != 0)
            terms.append(_full(predicates[0].visible(pq, pk), call.tile))
        if call.segments:
            mine = refs["columns"][int(call.positions)][:, :1]
            terms.append((mine == self.stream_ids(buffer)[-1]) & (jnp.broadcast_to(mine, call.tile) >= 0))
        if not call.anchor_is_keys:
            side = call.stream.side
            terms += [_full(x, call.tile) for x in walks.real(side, units, lanes, 1)]
        return functools.reduce(operator.and_, terms)

    def predicates(self):
        """The mask's predicates, their scalars read from SMEM."""
        return jax.tree.unflatten(self.call.predicates, [self.refs[name][i] for name, i in self.call.scalars])


class Forward(Kernel):
    streamed = ("k", "v")

    @staticmethod
    def scratch(call, H, Hv):
        rows = call.anchor.part
        shapes = dict(top=LANES, acc=Hv + LANES if call.sum_in_product else Hv)
        if not call.sum_in_product:
            shapes["total"] = LANES
        return {name: ((rows, width), jnp.float32) for name, width in shapes.items()}

    def begin(self):
        super().begin()
        refs = self.refs
        refs["top"][...] = jnp.full_like(refs["top"], LEAST)
        refs["acc"][...] = jnp.zeros_like(refs["acc"])
        if not self.call.sum_in_product:
            refs["total"][...] = jnp.zeros_like(refs["total"])

    def visit(self, row, step, buffer, masked):
        refs = self.refs
        k, v = (self.data(name, row, step, buffer, masked) for name in ("k", "v"))
        z, *_ = self.scores(refs["q"][...], k, row, step, buffer, masked)
        before = refs["top"][...]
        top = jnp.maximum(before, z.max(1, keepdims=True))
        p = jnp.exp2(z - widen(top, z.shape[1]))
        kept = jnp.exp2(before - top)
        refs["top"][...] = top
        if self.call.sum_in_product:
            v = jnp.concatenate([v, jnp.ones((v.shape[0], LANES), v.dtype)], 1)
        else:
            refs["total"][...] = refs["total"][...] * kept + lane_sums(p)
        acc = refs["acc"]
        acc[...] = acc[...] * widen(kept, acc.shape[1]) + dot(p.astype(v.dtype), v)

    def partial(self):
        """`o` [rows, Hv] and `lse` [rows, 128], the same in all lanes, float32."""
        refs, width = self.refs, self.refs["o"].shape[-1]
        acc = refs["acc"][...]
        if self.call.sum_in_product:
            total = acc[:, width:]
        else:
            total = jnp.broadcast_to(refs["total"][...].sum(1, keepdims=True), refs["total"].shape)
        some = total > 0
        safe = jnp.where(some, total, 1.0)
        o = acc[:, :width] * widen(jnp.where(some, 1.0 / safe, 0.0), width)
        return o, jnp.where(some, (refs["top"][...] + jnp.log2(safe)) / LOG2_E, -jnp.inf)

    def finish(self):
        o, lse = self.partial()
        self.refs["o"][...] = o.astype(self.refs["o"].dtype)
        self.refs["lse"][...] = walks.to_lanes(lse)


class Backward(Kernel):
    """`dz` [anchor, stream], the gradient of the capped scores before the bias, and the weights `p`."""

    def weights(self, a, s, grad_a, grad_s, lse, delta, place):
        z, dcap, distance, seen = self.scores(a, s, *place)
        p = jnp.exp2(z - lse)
        dz = p * (dot(grad_a, grad_s, transposed=True) - delta)
        if seen is not None:
            dz = jnp.where(seen, dz, 0.0)
        return p, dz, dz if dcap is None else dz * dcap, distance


class QueryGradient(Backward):
    streamed = ("k", "v")

    @staticmethod
    def scratch(call, H, Hv):
        rows = call.anchor.part
        shapes = dict(stat_columns=(2, rows, LANES), acc=(rows, H))
        if call.bias:
            shapes["total"] = (rows, LANES)
        return {name: (shape, jnp.float32) for name, shape in shapes.items()}

    def begin(self):
        super().begin()
        refs, rows = self.refs, self.call.anchor.part
        for i in range(2):
            column = walks.to_column(refs["stats"][i : i + 1], rows)
            refs["stat_columns"][i] = jnp.broadcast_to(column, (rows, LANES))
        refs["acc"][...] = jnp.zeros_like(refs["acc"])
        if self.call.bias:
            refs["total"][...] = jnp.zeros_like(refs["total"])

    def visit(self, row, step, buffer, masked):
        refs = self.refs
        k, v = (self.data(name, row, step, buffer, masked) for name in ("k", "v"))
        lse, delta = (widen(refs["stat_columns"][i], k.shape[0]) for i in range(2))
        place = row, step, buffer, masked
        _, ds, dz, distance = self.weights(refs["q"][...], k, refs["do"][...], v, lse, delta, place)
        if distance is not None:
            refs["total"][...] += lane_sums(ds * distance)
        refs["acc"][...] += dot(dz.astype(k.dtype), k)

    def finish(self):
        refs = self.refs
        refs["dq"][...] = (self.call.scale * refs["acc"][...]).astype(refs["dq"].dtype)
        if self.call.bias:
            total = refs["total"][...].sum(1, keepdims=True)
            refs["dslope"][...] = walks.to_lanes(jnp.broadcast_to(-total, refs["total"].shape))


class KeyGradient(Backward):
    streamed = ("q", "do", "stats")

    @staticmethod
    def scratch(call, H, Hv):
        rows = call.anchor.part
        return dict(dk_acc=((rows, H), jnp.float32), dv_acc=((rows, Hv), jnp.float32))

    def begin(self):
        super().begin()
        for name in ("dk_acc", "dv_acc"):
            self.refs[name][...] = jnp.zeros_like(self.refs[name])

    def visit(self, row, step, buffer, masked):
        refs = self.refs
        q, do = (self.data(name, row, step, buffer, masked) for name in ("q", "do"))
        lse, delta = walks.spread(refs["stats_buffers"][buffer], self.call.stream)
        place = row, step, buffer, masked
        p, _, dz, _ = self.weights(refs["k"][...], q, refs["v"][...], do, lse, delta, place)
        refs["dv_acc"][...] += dot(p.astype(do.dtype), do)
        refs["dk_acc"][...] += dot(dz.astype(q.dtype), q)

    def finish(self):
        refs = self.refs
        refs["dk"][...] = (self.call.scale * refs["dk_acc"][...]).astype(refs["dk"].dtype)
        refs["dv"][...] = refs["dv_acc"][...].astype(refs["dv"].dtype)


def _full(x, shape):
    return x if x.shape == shape else jnp.broadcast_to(x, shape)


def dot(a, b, transposed: bool = False):
    """`a @ b` or `a @ b.T`, accumulated in float32; float32 operands keep their precision."""
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def widen(x, n: int):
    """A column repeated over lanes, [rows, 128], as [rows, n]."""
    x = jnp.tile(x, (1, -(-n // LANES))) if n > LANES else x
    return x if x.shape[1] == n else x[:, :n]


def lane_sums(x):
    """Sums over lanes 128 apart, [rows, 128]: the rest is summed once per row of tiles."""
    return functools.reduce(operator.add, (x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)))
