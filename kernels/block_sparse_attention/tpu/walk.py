"""How a TPU kernel follows a walk: which blocks come next, their copies into fast memory, and their masks.

A kernel holds a tile of one side still, the *anchor*, and streams tiles of the other side past it: queries
hold still for the forward and for dQ, keys for dK/dV. A streamed tile is `slots` units of `part` rows, each
copied by itself from wherever its block lies, into one of two buffers, so that small blocks fill a large
tile. The next tile's copies run while this one is multiplied, across rows of the walk too.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from blockjax.kernels.block_sparse_attention.plan import TAG_BITS
from blockjax.kernels.block_sparse_attention.tpu.layout import LANES, Side, Stream
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

START, PARTIAL, TOTAL = 0, 1, 2  # rows of a table of lists
LO, FULL_LO, FULL_HI, HI = 0, 1, 2, 3  # rows of a table of ranges
UNROLLED = 8
"""Copies of a tile written out one by one; beyond, a loop issues them."""


class Row(NamedTuple):
    """One row of a walk: its fields in the table, and for lists where its entries begin."""

    fields: tuple[jax.Array, ...]
    entries: jax.Array | None


@dataclass(frozen=True)
class Walker:
    """Reads a walk: positions `p` count units of the stream along a row.

    `table` and `following` are [1, fields * rows] in SMEM, for this walk and for the next one, and lists
    have their `entries` in SMEM. All the rest is static.
    """

    stream: Stream
    rows: int
    ranges: bool
    table: object
    following: object
    entries: object = None

    def row(self, row, entries=None, following=False) -> Row:
        return Row(tuple(self.field(f, row, following) for f in range(4 if self.ranges else 3)), entries)

    def field(self, field: int, row, following):
        table = self.following if following else self.table
        return table[0, field * self.rows + row]

    def units(self, row: Row):
        """Number of units of the stream to visit."""
        f = row.fields
        return (f[HI] - f[LO] if self.ranges else f[TOTAL]) * self.stream.side.parts

    def steps(self, row: Row):
        return lax.div(self.units(row) + (self.stream.slots - 1), self.stream.slots)

    def masked(self, row: Row, step):
        """Whether the tile holds a partial block, or fewer units than it has room for."""
        parts, slots, f = self.stream.side.parts, self.stream.slots, row.fields
        first, stop = step * slots, (step + 1) * slots
        if self.ranges:
            first, stop = f[LO] * parts + first, f[LO] * parts + stop
            return (first < f[FULL_LO] * parts) | (stop > f[FULL_HI] * parts)
        return (first < f[PARTIAL] * parts) | (stop > f[TOTAL] * parts)

    def unit(self, row: Row, p):
        """Unit of the stream and tag at position p; behind the end any unit that may be read, with tag 0."""
        parts, f = self.stream.side.parts, row.fields
        if self.ranges:
            unit = f[LO] * parts + p
            return unit, jnp.where(unit < f[HI] * parts, 1, 0)
        total = f[TOTAL] * parts
        at = jnp.minimum(p, total - 1)
        entry = self.entries[row.entries + lax.div(at, parts)]
        tag = jnp.where(p < total, entry & (1 << TAG_BITS) - 1, 0)
        return lax.shift_right_logical(entry, TAG_BITS) * parts + lax.rem(at, parts), tag

    def live_rows(self, row: Row, step):
        """How many rows of a tile of consecutive units are inside the range."""
        left = self.units(row) - step * self.stream.slots
        return jnp.minimum(left, self.stream.slots) * self.stream.side.part


class Lane(NamedTuple):
    """A streamed array: in HBM, its two buffers, and whether it holds numbers along lanes."""

    source: object
    buffers: object
    along_lanes: bool


def start_copies(walker: Walker, lanes: list[Lane], sems, row: Row, step, buffer, where):
    """Starts the copies of one tile into `buffer`; `where(along_lanes)` gives batch entry and head."""
    stream = walker.stream
    part = stream.side.part

    def copy(lane: Lane, unit, slot, count):
        batch, head = where(lane)
        if lane.along_lanes:
            source = lane.source.at[batch, head, pl.ds(unit, count)]
            target = lane.buffers.at[buffer, pl.ds(slot, count)]
        else:
            source = lane.source.at[batch, head, pl.ds(pl.multiple_of(unit * part, part), count * part)]
            target = lane.buffers.at[buffer, pl.ds(pl.multiple_of(slot * part, part), count * part)]
        pltpu.make_async_copy(source, target, sems.at[buffer]).start()

    def one(slot, _=None):
        unit, _ = walker.unit(row, step * stream.slots + slot)
        for lane in lanes:
            copy(lane, unit, slot, 1)

    if stream.consecutive:
        unit, _ = walker.unit(row, step * stream.slots)
        for lane in lanes:
            copy(lane, unit, 0, stream.slots)
    elif stream.slots <= UNROLLED:
        for slot in range(stream.slots):
            one(slot)
    else:
        lax.fori_loop(0, stream.slots, lambda slot, _: one(slot), None)


def wait_copies(lanes: list[Lane], sems, buffer):
    for lane in lanes:
        whole = lane.buffers.at[buffer]
        pltpu.make_async_copy(whole, whole, sems.at[buffer]).wait()


def ramp(starts: list, piece: int, shape: tuple[int, int], axis: int):
    """`starts[i], starts[i] + 1, ...` in rows (axis 0) or lanes (axis 1) `i * piece ..`, int32."""
    at = lax.broadcasted_iota(jnp.int32, shape, axis)
    shift = starts[0]
    for i, start in enumerate(starts[1:], 1):
        shift = jnp.where(at >= i * piece, start - i * piece, shift)
    return at + shift


def steps_of(values: list, piece: int, shape: tuple[int, int], axis: int):
    """`values[i]` in rows or lanes `i * piece ..`."""
    if len(values) == 1:
        return jnp.full(shape, values[0])
    at = lax.broadcasted_iota(jnp.int32, shape, axis)
    x = values[0]
    for i, value in enumerate(values[1:], 1):
        x = jnp.where(at >= i * piece, value, x)
    return x


def tokens(side: Side, units: list, shape, axis: int):
    """Index on its side of each row of these units, int32; behind its block's end for a padded one."""
    starts = []
    for unit in units:
        block, part = lax.div(unit, side.parts), lax.rem(unit, side.parts)
        starts += [block * side.block + part * side.part] * side.pack
    return ramp(starts, side.piece, shape, axis)


def real(side: Side, units: list, shape, axis: int) -> list:
    """Conditions for a row to be a token and no padding."""
    conditions = []
    if side.length % side.block:
        conditions.append(tokens(side, units, shape, axis) < side.length)
    if side.block != side.padded:
        offsets = [lax.rem(unit, side.parts) * side.part for unit in units for _ in range(side.pack)]
        conditions.append(ramp(offsets, side.piece, shape, axis) < side.block)
    return conditions


def spread(x, stream: Stream):
    """Numbers along lanes `[slots, n, lanes]`, as copied, to n rows `[1, stream.rows]`."""
    part, n = stream.side.part, x.shape[1]
    if part >= LANES:
        return [jnp.concatenate([x[slot, i : i + 1] for slot in range(stream.slots)], 1) for i in range(n)]
    each, at = LANES // part, lax.broadcasted_iota(jnp.int32, (1, LANES), 1)

    def group(first, i):
        row = x[first, i : i + 1]
        for j in range(1, each):
            row = jnp.where(at >= j * part, x[first + j, i : i + 1], row)
        return row

    return [jnp.concatenate([group(first, i) for first in range(0, stream.slots, each)], 1) for i in range(n)]


def to_lanes(x):
    """A column repeated over lanes, [rows, 128] float32, as `[1, max(rows, 128)]`."""
    pieces = []
    for first in range(0, x.shape[0], LANES):
        piece = x[first : first + LANES]
        diagonal = _diagonal(piece.shape)
        pieces.append(jnp.sum(jnp.where(diagonal, piece, 0.0), 0, keepdims=True))
    return jnp.concatenate(pieces, 1)


def to_column(x, rows: int):
    """Numbers along lanes, [1, max(rows, 128)] float32, as a column [rows, 1]."""
    pieces = []
    for first in range(0, rows, LANES):
        shape = min(LANES, rows - first), LANES
        piece = jnp.broadcast_to(x[:, first : first + LANES], shape)
        pieces.append(jnp.sum(jnp.where(_diagonal(shape), piece, 0.0), 1, keepdims=True))
    return jnp.concatenate(pieces, 0)


def to_int_column(x, rows: int):
    """`to_column` of int32 numbers, exactly: by halves that float32 holds."""
    high, low = lax.shift_right_arithmetic(x, 16), x & 0xFFFF
    high, low = (to_column(half.astype(jnp.float32), rows).astype(jnp.int32) for half in (high, low))
    return lax.shift_left(high, 16) | low


def _diagonal(shape):
    return lax.broadcasted_iota(jnp.int32, shape, 0) == lax.broadcasted_iota(jnp.int32, shape, 1)
