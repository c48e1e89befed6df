"""In which order tiles start, what each visits, and how it is copied.

A cooperative thread array (CTA) serves one tile at a time: rows of queries in the forward and in dQ, keys in
dK and dV. It *holds* that tile and *moves* along the walk of the other side. Of its three warpgroups (WG) two
multiply, 64 rows each, and one copies.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from blockjax.kernels.block_sparse_attention import plan
from blockjax.kernels.block_sparse_attention.hopper.call import Call, Operands
from blockjax.kernels.block_sparse_attention.hopper.tiles import Steps, tiled
from jax import lax

L2_BYTES = 32 << 20
"""Of the 50 MB of level-2 cache, what the operands shared by the CTAs in flight may fill."""

TURNS = 4
"""Most tiles that a CTA serves."""

MULTIPROCESSORS = 132
WAVES = 6
"""CTAs serve several tiles each where there are at least this many CTAs to a multiprocessor."""


@dataclass(frozen=True)
class Order:
    """In which order tiles start: by sections of heads whose moving operands fit the cache.

    Inside a section a tile of every head starts before the next tile of any. A CTA serves `turns` tiles, one
    after the other, so that the copies for the next one hide behind this one's end; the hardware hands out
    CTAs as multiprocessors fall free, which balances walks of unequal length.
    """

    tiles: int
    heads: int  # over the whole batch
    section: int  # heads in a section
    turns: int

    @staticmethod
    def of(tiles: int, heads: int, bytes_per_head: int) -> "Order":
        most = max(1, L2_BYTES // bytes_per_head)
        section = max(d for d in range(1, heads + 1) if heads % d == 0 and d <= most)
        turns = TURNS
        while turns > 1 and tiles * heads < turns * WAVES * MULTIPROCESSORS:
            turns //= 2
        return Order(tiles, heads, section, turns)

    @property
    def ctas(self) -> int:
        return pl.cdiv(self.tiles * self.heads, self.turns)

    @property
    def count(self):
        """Tiles of this CTA."""
        return jnp.minimum(self.turns, self.tiles * self.heads - lax.axis_index("cta") * self.turns)

    def __call__(self, turn):
        """`(head, tile)` of a turn of this CTA."""
        item, size = lax.axis_index("cta") * self.turns + turn, self.tiles * self.section
        rest = lax.rem(item, size)
        head = lax.div(item, size) * self.section + lax.rem(rest, self.section)
        return head, lax.div(rest, self.section)


def first_token(order, batch, head, heads: int, tile, block: int, cta_tokens: int):
    """Of the `tile`-th tile to start, in the order of `Operands.order`; `heads` in all."""
    b, h, _ = order.shape
    per_block = max(1, block // cta_tokens)
    row = order[0 if b == 1 else batch, lax.div(head, heads // h), lax.div(tile, per_block)]
    return row * block + lax.rem(tile, per_block) * cta_tokens


class Visits(NamedTuple):
    """One row of a walk, inside a kernel: `partial` steps to test, then full ones up to `total`."""

    steps: Steps
    blocks: jax.Array
    partial: jax.Array
    total: jax.Array
    entry: Callable  # slot -> (block, tag)

    def __call__(self, s) -> list[tuple]:
        """The pieces of step `s`: their number in units of `steps.piece` tokens, tag, and whether they count.

        A row of too few blocks repeats its first one: in the first step, which is therefore partial.
        """
        n, per_block = self.steps.gathered, self.steps.block // self.steps.piece
        if n == 1:
            block, tag = self.entry(s if per_block == 1 else lax.div(s, per_block))
            return [(block if per_block == 1 else block * per_block + lax.rem(s, per_block), tag, None)]
        pieces = []
        for i in range(n):
            e = s * n + i - (self.total * n - self.blocks)
            pieces.append((*self.entry(jnp.maximum(e, 0)), e >= 0))
        return pieces


def visits(walk: plan.Walk, batch, head, row, heads: int, steps: Steps) -> Visits:
    """The walk of one row of blocks, its arrays being references to global memory; `heads` in all."""
    if isinstance(walk, plan.RangeWalk):
        batch = 0 if walk.bounds.shape[0] == 1 else batch
        lo, full_lo, full_hi, hi = (walk.bounds[batch, i, row] for i in range(4))
        left = full_lo - lo
        partial, blocks = left + hi - full_hi, hi - lo

        def entry(e):
            tested = jnp.where(e < left, lo + e, full_hi - left + e)
            return jnp.where(e < partial, tested, full_lo - partial + e), jnp.int32(1)

    else:
        b, h, _ = walk.start.shape
        batch, head = 0 if b == 1 else batch, lax.div(head, heads // h)
        start, partial, blocks = (x[batch, head, row] for x in (walk.start, walk.partial, walk.total))
        last = walk.entries.shape[2] - 1

        def entry(e):
            x = walk.entries[batch, head, jnp.minimum(start + e, last)]
            return lax.shift_right_logical(x, plan.TAG_BITS), x & (1 << plan.TAG_BITS) - 1

    n = steps.gathered
    if n == 1:
        per_block = steps.block // steps.piece
        return Visits(steps, blocks, partial * per_block, blocks * per_block, entry)
    total = lax.div(blocks + n - 1, n)
    tested = lax.div(total * n - blocks + partial + n - 1, n)
    return Visits(steps, blocks, jnp.minimum(tested, total), total, entry)


def copy_ring(steps: Steps, listed: Visits, *rings, before):
    """Keeps rings full; each is given as barriers for ready and free, then pairs of source and buffers.

    `before` steps have gone through them already.
    """

    def step(s, pieces):
        # The next entries are read while a buffer is awaited.
        following = [unit for unit, _, _ in listed(jnp.minimum(s + 1, listed.total - 1))]
        slot = steps.slot(before + s)
        for ready, free, *copies in rings:
            pl.when(before + s >= steps.buffers)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            for i, unit in enumerate(pieces):
                here, there = pl.ds(unit * steps.piece, steps.piece), pl.ds(i * steps.piece, steps.piece)
                for source, buffers in copies:
                    plgpu.copy_gmem_to_smem(source.at[here], buffers.at[slot, there], ready.at[slot])
        return following

    lax.fori_loop(0, listed.total, step, [unit for unit, _, _ in listed(0)])


class Place(NamedTuple):
    """Where a tile of query rows is, inside a kernel."""

    batch: jax.Array
    head: jax.Array
    first: jax.Array  # token
    listed: Visits


@dataclass(frozen=True)
class QueryTiles:
    """The tiles of the forward and of dQ."""

    call: Call
    steps: Steps

    @property
    def count(self) -> int:
        rows = self.call.held
        return rows.units(self.call.T) * rows.tokens // rows.cta_tokens

    @property
    def groups(self) -> int:
        """Of the heads that a CTA holds together."""
        return self.call.N // self.call.held.cta_heads

    @property
    def order(self) -> Order:
        call = self.call
        moving = call.S * (call.H + call.Hv) * 2 * call.K // self.groups
        return Order.of(self.count, call.B * self.groups, moving)

    def place(self, operands: Operands, turn) -> Place:
        call, (group, tile) = self.call, self.order(turn)
        batch, head = lax.div(group, self.groups), lax.rem(group, self.groups) * call.held.cta_heads
        if operands.order is None:
            # The last rows see most under a causal mask: they start first.
            first = (self.count - 1 - tile) * call.held.cta_tokens
        else:
            first = first_token(operands.order, batch, head, call.N, tile, call.bq, call.held.cta_tokens)
        row = lax.div(first, call.bq)
        return Place(batch, head, first, visits(operands.walk, batch, head, row, call.N, self.steps))

    def ring(self) -> dict:
        """Shared memory for the keys and values in flight, and its barriers, by name."""
        call, steps = self.call, self.steps
        ready = plgpu.Barrier(num_arrivals=steps.gathered, num_barriers=steps.buffers)
        free = plgpu.Barrier(num_arrivals=call.held.wgs, num_barriers=steps.buffers)
        k, v = (tiled((steps.buffers, steps.tokens, width), call.dtype) for width in (call.H, call.Hv))
        return dict(k=k, v=v, k_ready=ready, v_ready=ready, k_free=free, v_free=free)

    def copy(self, operands: Operands, shared, *held):
        """What the copying warpgroup does; `held` are pairs of a source and its buffers, one a warpgroup.

        In `shared` are `ready` and `free`, barriers of what is held, and what `ring` made.
        """
        rows, order = self.call.held, self.order

        def tile(turn, before):
            batch, head, first, listed = self.place(operands, turn)
            for i in range(rows.wgs):
                pl.when(turn > 0)(lambda i=i: plgpu.barrier_wait(shared.free.at[i]))
                for source, buffers in held:
                    for ref, piece in rows.pieces(source, buffers.at[i], batch, *rows.share(i, first, head)):
                        plgpu.copy_gmem_to_smem(ref, piece, shared.ready.at[i])
            key_head = lax.div(head, self.call.G)
            copy_ring(
                self.steps,
                listed,
                (shared.k_ready, shared.k_free, (operands.k.at[batch, :, key_head], shared.k)),
                (shared.v_ready, shared.v_free, (operands.v.at[batch, :, key_head], shared.v)),
                before=before,
            )
            return before + listed.total

        lax.fori_loop(0, order.count, tile, 0)
