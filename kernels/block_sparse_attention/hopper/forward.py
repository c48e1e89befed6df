"""Forward on Hopper: a CTA holds query rows and moves along their walk.

One warpgroup copies the listed tiles of keys and values into a ring of buffers; two multiply and pass the
tensor cores to and fro, so that the softmax of one hides behind the products of the other
(FlashAttention-3, arXiv:2407.08608, section 3.1).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from blockjax.kernels.block_sparse_attention.hopper.call import Call
from blockjax.kernels.block_sparse_attention.hopper.tiles import (
    ROW,
    WG_ROWS,
    WGMMA,
    Order,
    Plane,
    Steps,
    held_slope,
    held_tokens,
    moving_tokens,
    run,
    tags,
    tiled,
    visits,
)
from jax import lax

TURNS = 4
"""Tiles that a CTA serves, if there are many."""

SHARED_BYTES = 224 << 10
"""Of the 227 KiB of shared memory, what tiles may take."""


class Shared(NamedTuple):
    """Shared memory: queries, the output (None: in their place), rings of keys and values, lse, barriers."""

    q: Any
    o: Any
    k: Any
    v: Any
    lse: Any
    q_ready: Any
    q_free: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any
    turn: Any


@functools.partial(jax.jit, static_argnames=("call", "steps"))
def forward(call: Call, operands, steps: Steps):
    """`o` [B, T, N, Hv] in q's dtype and `lse` [B, N, T] float32."""
    rows, H, Hv = call.held, call.H, call.Hv
    units = rows.units(call.T)
    tiles, groups = units * rows.tokens // rows.cta_tokens, call.N // rows.cta_heads
    order = Order.of(tiles, call.B * groups, call.S * (H + Hv) * 2 * call.K // groups, turns=TURNS)
    ring_bytes = steps.buffers * steps.tokens * (H + Hv) * 2
    in_place = Hv == H and ring_bytes + 2 * rows.wgs * WG_ROWS * H * 2 > SHARED_BYTES

    def attention_forward(operands, o_ref, lse_ref, shared):
        wg = lax.axis_index("wg")

        def place(turn):
            group, tile = order(turn)
            batch, head = lax.div(group, groups), lax.rem(group, groups) * rows.cta_heads
            # The last rows see most under a causal mask: they start first.
            first = (tiles - 1 - tile) * rows.cta_tokens
            listed = visits(operands.walk, batch, head, lax.div(first, call.bq), call.N, steps)
            return batch, head, first, listed

        @pl.when(wg < rows.wgs)
        def _():
            plgpu.set_max_registers(232, action="increase")
            q, lse = shared.q.at[wg], shared.lse.at[wg]
            o = q if in_place else shared.o.at[wg]

            def tile(turn, before):
                batch, head, first, listed = place(turn)
                own, own_head = rows.share(wg, first, head)
                plgpu.barrier_wait(shared.q_ready.at[wg])
                where = batch, own, own_head
                mixed, sums = _attend(call, operands, shared, steps, listed, wg, where, before)
                # The output of the turn before has left its buffer long ago.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                o[...], lse[...] = mixed.astype(call.dtype), sums
                plgpu.commit_smem()
                for ref, piece in rows.pieces(o_ref, o, batch, own, own_head):
                    plgpu.copy_smem_to_gmem(piece, ref)
                unit = lax.div(own, rows.tokens)
                plgpu.copy_smem_to_gmem(lse, lse_ref.at[batch, lax.div(own_head, rows.heads), unit])
                if in_place:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.barrier_arrive(shared.q_free.at[wg])
                return before + listed.total

            pass_turn = functools.partial(_pass_turn, rows, shared)
            pl.when(wg == 1)(pass_turn)
            lax.fori_loop(0, order.count, tile, 0)
            pl.when(wg == 0)(pass_turn)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg == rows.wgs)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def tile(turn, before):
                batch, head, first, listed = place(turn)
                for i in range(rows.wgs):
                    q, ready, free = (x.at[i] for x in (shared.q, shared.q_ready, shared.q_free))
                    pl.when(turn > 0)(lambda free=free: plgpu.barrier_wait(free))
                    for ref, piece in rows.pieces(operands.q, q, batch, *rows.share(i, first, head)):
                        plgpu.copy_gmem_to_smem(ref, piece, ready)
                key_head = lax.div(head, call.G)
                copy_ring(
                    steps,
                    listed,
                    (shared.k_ready, shared.k_free, (operands.k.at[batch, :, key_head], shared.k)),
                    (shared.v_ready, shared.v_free, (operands.v.at[batch, :, key_head], shared.v)),
                    before=before,
                )
                return before + listed.total

            lax.fori_loop(0, order.count, tile, 0)

    ring = functools.partial(plgpu.Barrier, num_barriers=steps.buffers)
    shared = Shared(
        q=tiled((rows.wgs, WG_ROWS, H), call.dtype),
        o=None if in_place else tiled((rows.wgs, WG_ROWS, Hv), call.dtype),
        k=tiled((steps.buffers, steps.tokens, H), call.dtype),
        v=tiled((steps.buffers, steps.tokens, Hv), call.dtype),
        lse=plgpu.SMEM((rows.wgs, WG_ROWS), jnp.float32),
        q_ready=plgpu.Barrier(num_arrivals=rows.heads, num_barriers=rows.wgs),
        q_free=plgpu.Barrier(num_barriers=rows.wgs),
        k_ready=ring(num_arrivals=steps.gathered),
        v_ready=ring(num_arrivals=steps.gathered),
        k_free=ring(num_arrivals=rows.wgs),
        v_free=ring(num_arrivals=rows.wgs),
        turn=plgpu.Barrier(num_arrivals=rows.wgs),
    )
    out = (
        jax.ShapeDtypeStruct((call.B, call.T, call.N, Hv), call.dtype),
        jax.ShapeDtypeStruct((call.B, call.N // rows.heads, units, WG_ROWS), jnp.float32),
    )
    o, lse = run(attention_forward, out, shared, order.ctas, rows.wgs, operands)
    return o, rows.restore(lse, call.T)


def copy_ring(steps: Steps, listed, *rings, before=0):
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


def _pass_turn(rows, shared: Shared):
    """Gives the tensor cores to the other warpgroup and waits for them to come back."""
    if rows.wgs > 1:
        plgpu.barrier_arrive(shared.turn)
        plgpu.barrier_wait(shared.turn)


def _attend(call: Call, operands, shared: Shared, steps: Steps, listed, wg, where, before):
    """`o` [64, Hv] and `lse` [64] float32 of a warpgroup's rows; `before` steps have gone through the rings.

    q is given back after the last product with it, unless the output takes its place.
    """
    batch, first, head = where
    rows, plane = call.held, Plane((WG_ROWS, steps.tokens), q_axis=0)
    q = shared.q.at[wg]
    mask = call.mask(operands.scalars)
    queries = held_tokens(operands.q_side, rows, batch, first, mask.q_offset)
    slope = held_slope(operands.slope, rows, head)

    def await_keys(s):
        plgpu.barrier_wait(shared.k_ready.at[steps.slot(before + s)])

    def release_queries():
        if shared.o is not None:
            plgpu.barrier_arrive(shared.q_free.at[wg])

    def step(s, carry, partial):
        acc, top, total = carry
        slot = steps.slot(before + s)

        def products(acc):
            plgpu.wgmma(acc, q, shared.k.at[slot].T)
            _pass_turn(rows, shared)
            return acc[...]

        z = pl.run_scoped(products, plgpu.ACC(plane.shape, jnp.float32))
        plgpu.barrier_arrive(shared.k_free.at[slot])
        pl.when(s + 1 == listed.total)(release_queries)
        penalty = None
        if partial or slope is not None:
            pieces = listed(s)
            keys = moving_tokens(operands.k_side, steps, pieces, batch, mask.kv_offset)
        if slope is not None:
            penalty = plane.of_query(slope) * plane.distance(queries, keys)
        z, c, _ = call.scores(z, penalty)
        if partial:
            limits = None, call.key_limit(steps.gathered)
            seen = plane.visible(mask.predicates, tags(steps, pieces), queries, keys, limits)
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
            plgpu.wgmma(acc, weights, shared.v.at[slot])
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
