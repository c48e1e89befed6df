"""Forward on Hopper: a CTA holds query rows and moves along their walk.

One warpgroup copies the listed tiles of keys and values into a ring of buffers; two multiply and pass the
tensor cores to and fro, so that the softmax of one hides behind the products of the other
(FlashAttention-3, arXiv:2407.08608, section 3.1).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from blockjax.kernels.block_sparse_attention.hopper import SHARED_MEMORY, WG_ROWS, tile_bytes
from blockjax.kernels.block_sparse_attention.hopper.call import Call
from blockjax.kernels.block_sparse_attention.hopper.schedule import (
    Place,
    QueryTiles,
    Visits,
)
from blockjax.kernels.block_sparse_attention.hopper.tiles import (
    ROW,
    WGMMA,
    Plane,
    Reach,
    Steps,
    held_slope,
    held_tokens,
    moving_tokens,
    tags,
    tiled,
)
from blockjax.kernels.mosaic_gpu import run, share_out
from jax import lax


class Shared(NamedTuple):
    """Shared memory: queries, the output (None: in their place), rings of keys and values, lse, barriers."""

    q: Any
    o: Any
    k: Any
    v: Any
    lse: Any
    ready: Any
    free: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any
    turn: Any


@functools.partial(jax.jit, static_argnames=("call", "steps"))
def forward(call: Call, operands, steps: Steps):
    """`o` [B, T, N, Hv] in q's dtype and `lse` [B, N, T] float32."""
    rows, H, Hv = call.held, call.H, call.Hv
    tiles, units = QueryTiles(call, steps), rows.units(call.T)
    apart = tile_bytes("forward", steps.buffers * steps.tokens, rows.wgs * WG_ROWS, H, Hv, apart=True)
    in_place = Hv == H and apart > SHARED_MEMORY

    def attention_forward(operands, o_ref, lse_ref, shared):
        wg = lax.axis_index("wg")

        def tile(turn, before):
            place = tiles.place(operands, turn)
            first, head = rows.share(wg, place.first, place.head)
            lse, o = shared.lse.at[wg], (shared.q if in_place else shared.o).at[wg]
            # Turns begin and end with a tile. Waiting for the other's next one would be waiting for ever: it
            # is not copied before both have let go of this one.
            taking_turns = (rows.wgs > 1) & (place.listed.total > 0)

            plgpu.barrier_wait(shared.ready.at[wg])
            pl.when(taking_turns & (wg == 1))(lambda: _pass_turn(rows, shared))
            mixed, sums = _attend(call, operands, shared, steps, place, wg, before)
            pl.when(taking_turns & (wg == 0))(lambda: plgpu.barrier_arrive(shared.turn))
            # The output of the turn before has left its buffer long ago.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            o[...], lse[...] = mixed.astype(call.dtype), sums
            plgpu.commit_smem()
            for ref, piece in rows.pieces(o_ref, o, place.batch, first, head):
                plgpu.copy_smem_to_gmem(piece, ref)
            unit = lax.div(first, rows.tokens)
            plgpu.copy_smem_to_gmem(lse, lse_ref.at[place.batch, lax.div(head, rows.heads), unit])
            if in_place:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(shared.free.at[wg])
            pl.when(taking_turns & (wg == 0))(lambda: plgpu.barrier_wait(shared.turn))
            return before + place.listed.total

        share_out(
            wg,
            rows.wgs,
            lambda: lax.fori_loop(0, tiles.order.count, tile, 0),
            lambda: tiles.copy(operands, shared, (operands.q, shared.q)),
        )

    shared = Shared(
        q=tiled((rows.wgs, WG_ROWS, H), call.dtype),
        o=None if in_place else tiled((rows.wgs, WG_ROWS, Hv), call.dtype),
        lse=plgpu.SMEM((rows.wgs, WG_ROWS), jnp.float32),
        ready=plgpu.Barrier(num_arrivals=rows.heads, num_barriers=rows.wgs),
        free=plgpu.Barrier(num_barriers=rows.wgs),
        turn=plgpu.Barrier(num_arrivals=rows.wgs),
        **tiles.ring(),
    )
    out = (
        jax.ShapeDtypeStruct((call.B, call.T, call.N, Hv), call.dtype),
        jax.ShapeDtypeStruct((call.B, call.N // rows.heads, units, WG_ROWS), jnp.float32),
    )
    o, lse = run(attention_forward, out, shared, tiles.order.ctas, rows.wgs, operands)
    return o, rows.restore(lse, call.T)


def _pass_turn(rows, shared: Shared):
    """Gives the tensor cores to the other warpgroup and waits for them to come back."""
    if rows.wgs > 1:
        plgpu.barrier_arrive(shared.turn)
        plgpu.barrier_wait(shared.turn)


class _Part(NamedTuple):
    """Of a step: all of it, or half number `which`."""

    steps: Steps
    which: jax.Array | None = None

    def rows(self, tile):
        """Of a tile of keys or values in shared memory."""
        n = self.steps.tokens
        return tile if self.which is None else tile.at[pl.ds(self.which * n, n)]

    def pieces(self, listed: Visits, s) -> list[tuple]:
        if self.which is None:
            return listed(s)
        ((unit, tag, _),) = listed(s)
        return [(2 * unit + self.which, tag, None)]


def _visit_edge(visit: Callable, s, carry, listed: Visits, reach, kv_offset):
    """`visit(s, carry, part)` of a step in which a warpgroup may need only half of a tile.

    `reach` says which keys its queries may see, None if that is not known.
    """
    steps = listed.steps
    if reach is None or steps.gathered > 1 or steps.tokens < 2 * WG_ROWS:
        return visit(s, carry, _Part(steps))
    half, (unit, _, _) = steps.half, listed(s)[0]
    first = unit * steps.tokens + kv_offset
    low, high = (reach.meets(first + i * half.tokens, half.tokens) for i in range(2))
    return lax.cond(
        low & high,
        lambda carry: visit(s, carry, _Part(steps)),
        lambda carry: visit(s, carry, _Part(half, jnp.where(low, 0, 1))),
        carry,
    )


def _attend(call: Call, operands, shared: Shared, steps: Steps, place: Place, wg, before):
    """`o` [64, Hv] and `lse` [64] float32 of a warpgroup's rows; `before` steps have gone through the rings.

    q is given back after the last product with it, unless the output takes its place.
    """
    batch, listed = place.batch, place.listed
    first, head = call.held.share(wg, place.first, place.head)
    rows = call.held
    q = shared.q.at[wg]
    mask = call.mask(operands.scalars)
    queries = held_tokens(operands.q_side, rows, batch, first, mask.q_offset)
    slope = held_slope(operands.slope, rows, head)
    reach = Reach.of(mask, queries, first, rows.tokens)

    def await_keys(s):
        plgpu.barrier_wait(shared.k_ready.at[steps.slot(before + s)])

    def release_queries():
        if shared.o is not None:
            plgpu.barrier_arrive(shared.free.at[wg])

    def step(s, carry, partial):
        if not partial:
            return visit(s, carry, _Part(steps), partial)
        return _visit_edge(functools.partial(visit, partial=True), s, carry, listed, reach, mask.kv_offset)

    def visit(s, carry, part: _Part, partial):
        acc, top, total = carry
        slot, plane = steps.slot(before + s), Plane((WG_ROWS, part.steps.tokens), q_axis=0)
        k, v = part.rows(shared.k.at[slot]), part.rows(shared.v.at[slot])

        def products(acc):
            plgpu.wgmma(acc, q, k.T)
            _pass_turn(rows, shared)
            return acc[...]

        z = pl.run_scoped(products, plgpu.ACC(plane.shape, jnp.float32))
        plgpu.barrier_arrive(shared.k_free.at[slot])
        pl.when(s + 1 == listed.total)(release_queries)
        penalty = None
        if partial or slope is not None:
            pieces = part.pieces(listed, s)
            keys = moving_tokens(operands.k_side, part.steps, pieces, batch, mask.kv_offset)
        if slope is not None:
            penalty = plane.of_query(slope) * plane.distance(queries, keys)
        z, c, _ = call.scores(z, penalty)
        if partial:
            limits = None, call.key_limit(steps.gathered)
            seen = plane.visible(mask.predicates, tags(part.steps, pieces), queries, keys, limits)
            z = z if seen is None else jnp.where(seen, z, -jnp.inf)

        # `top` is kept times c, so that exp2 takes one fused multiply-add.
        new_top = jnp.maximum(top, z.max(axis=1) * c)
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top) if partial else new_top
        kept = jnp.exp2(top - base)
        p = jnp.exp2(z * c - plane.of_query(base))
        acc *= lax.broadcast_in_dim(kept, acc.shape, [0])
        total = total * kept + p.sum(axis=1)
        weights = p.astype(call.dtype)
        # All of the softmax is done before the tensor cores are asked for.
        acc, new_top, total, weights = lax.optimization_barrier((acc, new_top, total, weights))
        if rows.wgs > 1:
            plgpu.barrier_arrive(shared.turn)
        plgpu.barrier_wait(shared.v_ready.at[slot])
        if rows.wgs > 1:
            plgpu.barrier_wait(shared.turn)

        def mix(acc):
            plgpu.wgmma(acc, weights, v)
            pl.when(s + 1 < listed.total)(lambda: await_keys(s + 1))

        acc = pl.run_state(mix)(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(shared.v_free.at[slot])
        return acc, new_top, total

    acc = plgpu.layout_cast(jnp.zeros((WG_ROWS, call.Hv), jnp.float32), WGMMA)
    top = plgpu.layout_cast(jnp.full((WG_ROWS,), -jnp.inf, jnp.float32), ROW)
    total = plgpu.layout_cast(jnp.zeros((WG_ROWS,), jnp.float32), ROW)

    pl.when(listed.total > 0)(lambda: await_keys(0))
    pl.when(listed.total == 0)(release_queries)
    carry = lax.fori_loop(0, listed.partial, functools.partial(step, partial=True), (acc, top, total))
    acc, top, total = lax.fori_loop(
        listed.partial, listed.total, functools.partial(step, partial=False), carry
    )

    some = total > 0
    lse = jnp.where(some, top * math.log(2) + jnp.log(total), -jnp.inf)
    return acc * lax.broadcast_in_dim(jnp.where(some, 1 / total, 0.0), acc.shape, [0]), lse
