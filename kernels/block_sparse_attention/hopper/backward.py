"""Backward on Hopper: two kernels, neither with atomics, so that every run gives the same bits.

dQ: a CTA holds query rows and moves along their walk. dK and dV: a CTA holds keys and moves along their
transposed walks, one of each query head of the group. Both recompute the probabilities from `lse`: seven
products a tile, where a fused kernel has five but must add tiles of dQ in memory.

Formulas: FlashAttention-2, arXiv:2307.08691, algorithm 2, with delta = sum(do o) - dlse.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from blockjax.kernels.block_sparse_attention.hopper.call import Call, Operands
from blockjax.kernels.block_sparse_attention.hopper.forward import SHARED_BYTES, TURNS, copy_ring
from blockjax.kernels.block_sparse_attention.hopper.tiles import (
    COLUMN,
    ROW,
    WG_ROWS,
    WGMMA,
    Order,
    Plane,
    Steps,
    gather,
    held_slope,
    held_tokens,
    moving_tokens,
    run,
    tags,
    tiled,
    visits,
)
from jax import lax


class Cotangents(NamedTuple):
    """`do` [B, T, N, Hv]; `lse` in units of ln 2, +inf where a row sees nothing, and `delta`, float32.

    The last two are `[B, groups, units, 64]` for the rows that dQ holds, and `[B, N, tokens]`, padded as by
    `Steps.pad`, for dK and dV.
    """

    do: Any
    lse: Any
    delta: Any


class QueryShared(NamedTuple):
    """`dq` is None where it takes the place of q."""

    q: Any
    do: Any
    k: Any
    v: Any
    dq: Any
    dslope: Any
    ready: Any
    free: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any


@functools.partial(jax.jit, static_argnames=("call", "steps"))
def query_gradient(call: Call, operands: Operands, cotangents: Cotangents, steps: Steps):
    """`dq` [B, T, N, H] in q's dtype, and the gradient of each row's slope [B, N, T] if there is a bias."""
    rows, H, Hv = call.held, call.H, call.Hv
    units = rows.units(call.T)
    tiles, groups = units * rows.tokens // rows.cta_tokens, call.N // rows.cta_heads
    order = Order.of(tiles, call.B * groups, call.S * (H + Hv) * 2 * call.K // groups, turns=TURNS)
    plane = Plane((WG_ROWS, steps.tokens), q_axis=0)
    bias = operands.slope is not None
    tile_bytes = (steps.buffers * steps.tokens + rows.wgs * WG_ROWS) * (H + Hv) * 2
    in_place = bias or tile_bytes + rows.wgs * WG_ROWS * H * 2 > SHARED_BYTES

    def attention_query_gradient(inputs, dq_ref, dslope_ref, shared):
        operands, cotangents = inputs
        wg = lax.axis_index("wg")

        def place(turn):
            group, tile = order(turn)
            batch, head = lax.div(group, groups), lax.rem(group, groups) * rows.cta_heads
            first = (tiles - 1 - tile) * rows.cta_tokens
            listed = visits(operands.walk, batch, head, lax.div(first, call.bq), call.N, steps)
            return batch, head, first, listed

        def multiply(turn, before):
            batch, head, first, listed = place(turn)
            own, own_head = rows.share(wg, first, head)
            q, do = shared.q.at[wg], shared.do.at[wg]
            where = batch, lax.div(own_head, rows.heads), lax.div(own, rows.tokens)
            lse, delta = (
                plgpu.load(x.at[*where], layout=ROW, optimized=False)
                for x in (cotangents.lse, cotangents.delta)
            )
            mask = call.mask(operands.scalars)
            queries = held_tokens(operands.q_side, rows, batch, own, mask.q_offset)
            slope = held_slope(operands.slope, rows, own_head)

            def release():
                if not in_place:
                    plgpu.barrier_arrive(shared.free.at[wg])

            def step(s, carry, partial):
                acc, dslope = carry
                slot = steps.slot(before + s)
                plgpu.barrier_wait(shared.k_ready.at[slot])

                def products(z, dp):
                    plgpu.wgmma(z, q, shared.k.at[slot].T)
                    plgpu.barrier_wait(shared.v_ready.at[slot])
                    plgpu.wgmma(dp, do, shared.v.at[slot].T)
                    return plgpu.wgmma_accumulator_load(z, wait_n=1), dp[...]

                z, dp = pl.run_scoped(products, *[plgpu.ACC(plane.shape, jnp.float32)] * 2)
                plgpu.barrier_arrive(shared.v_free.at[slot])
                pl.when(s + 1 == listed.total)(release)
                penalty = None
                if partial or slope is not None:
                    pieces = listed(s)
                    keys = moving_tokens(operands.k_side, steps, pieces, batch, mask.kv_offset)
                if slope is not None:
                    distance = plane.distance(queries, keys)
                    penalty = plane.of_query(slope) * distance
                z, c, dcap = call.scores(z, penalty)
                p = jnp.exp2(z * c - plane.of_query(lse))
                if partial:
                    limits = None, call.key_limit(steps.gathered)
                    seen = plane.visible(mask.predicates, tags(steps, pieces), queries, keys, limits)
                    p = p if seen is None else jnp.where(seen, p, 0.0)
                dz = p * (dp - plane.of_query(delta))
                if slope is not None:
                    dslope -= jnp.sum(dz * distance, axis=1)
                dz = (dz if dcap is None else dz * dcap).astype(call.dtype)
                acc = pl.run_state(lambda acc: plgpu.wgmma(acc, dz, shared.k.at[slot]))(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(shared.k_free.at[slot])
                return acc, dslope

            plgpu.barrier_wait(shared.ready.at[wg])
            pl.when(listed.total == 0)(release)
            acc = plgpu.layout_cast(jnp.zeros((WG_ROWS, H), jnp.float32), WGMMA)
            dslope = None
            if slope is not None:
                dslope = plgpu.layout_cast(jnp.zeros((WG_ROWS,), jnp.float32), ROW)
            carry = lax.fori_loop(0, listed.partial, functools.partial(step, partial=True), (acc, dslope))
            carry = lax.fori_loop(listed.partial, listed.total, functools.partial(step, partial=False), carry)
            acc, dslope = carry
            # The gradient of the turn before has left its buffer long ago.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            dq = q if in_place else shared.dq.at[wg]
            dq[...] = (acc * call.scores.scale).astype(call.dtype)
            if slope is not None:
                shared.dslope[wg] = dslope
            plgpu.commit_smem()
            for ref, piece in rows.pieces(dq_ref, dq, batch, own, own_head):
                plgpu.copy_smem_to_gmem(piece, ref)
            if slope is not None:
                plgpu.copy_smem_to_gmem(shared.dslope.at[wg], dslope_ref.at[*where])
            if in_place:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(shared.free.at[wg])
            return before + listed.total

        def copy(turn, before):
            batch, head, first, listed = place(turn)
            for i in range(rows.wgs):
                pl.when(turn > 0)(lambda i=i: plgpu.barrier_wait(shared.free.at[i]))
                own, own_head = rows.share(i, first, head)
                for source, target in ((operands.q, shared.q), (cotangents.do, shared.do)):
                    for ref, piece in rows.pieces(source, target.at[i], batch, own, own_head):
                        plgpu.copy_gmem_to_smem(ref, piece, shared.ready.at[i])
            key_head = lax.div(head, call.G)
            copy_ring(
                steps,
                listed,
                (shared.k_ready, shared.k_free, (operands.k.at[batch, :, key_head], shared.k)),
                (shared.v_ready, shared.v_free, (operands.v.at[batch, :, key_head], shared.v)),
                before=before,
            )
            return before + listed.total

        @pl.when(wg < rows.wgs)
        def _():
            plgpu.set_max_registers(232, action="increase")
            lax.fori_loop(0, order.count, multiply, 0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg == rows.wgs)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            lax.fori_loop(0, order.count, copy, 0)

    ring = functools.partial(plgpu.Barrier, num_barriers=steps.buffers)
    shared = QueryShared(
        q=tiled((rows.wgs, WG_ROWS, H), call.dtype),
        do=tiled((rows.wgs, WG_ROWS, Hv), call.dtype),
        k=tiled((steps.buffers, steps.tokens, H), call.dtype),
        v=tiled((steps.buffers, steps.tokens, Hv), call.dtype),
        dq=None if in_place else tiled((rows.wgs, WG_ROWS, H), call.dtype),
        dslope=plgpu.SMEM((rows.wgs, WG_ROWS), jnp.float32) if bias else None,
        ready=plgpu.Barrier(num_arrivals=2 * rows.heads, num_barriers=rows.wgs),
        free=plgpu.Barrier(num_barriers=rows.wgs),
        k_ready=ring(num_arrivals=steps.gathered),
        v_ready=ring(num_arrivals=steps.gathered),
        k_free=ring(num_arrivals=rows.wgs),
        v_free=ring(num_arrivals=rows.wgs),
    )
    per_row = jax.ShapeDtypeStruct((call.B, call.N // rows.heads, units, WG_ROWS), jnp.float32)
    out = jax.ShapeDtypeStruct((call.B, call.T, call.N, H), call.dtype), per_row if bias else None
    dq, dslope = run(attention_query_gradient, out, shared, order.ctas, rows.wgs, (operands, cotangents))
    return dq, None if dslope is None else rows.restore(dslope, call.T)


class KeyShared(NamedTuple):
    k: Any
    v: Any
    q: Any
    do: Any
    lse: Any
    delta: Any
    ready: Any
    q_ready: Any
    do_ready: Any
    q_free: Any
    do_free: Any


@functools.partial(jax.jit, static_argnames=("call", "steps"))
def key_gradients(call: Call, operands: Operands, cotangents: Cotangents, steps: Steps):
    """`dk` [B, S, K, H] and `dv` [B, S, K, Hv] in q's dtype, summed over the query heads of a group.

    Scores are transposed here: keys are rows. Where both sums do not fit the registers of a warpgroup, each
    warpgroup holds the same keys and one sums dk, the other dv.
    """
    H, Hv = call.H, call.Hv
    split, rows = call.split_keys, call.held_keys
    tiles = rows.units(call.S) * rows.tokens // rows.cta_tokens
    wgs = 2 if split else rows.wgs
    order = Order.of(tiles, call.B * call.K, call.G * call.T * (H + Hv) * 2)
    plane = Plane((WG_ROWS, steps.tokens), q_axis=1)
    # The copy engine writes to multiples of 128 bytes: smaller pieces are read where they are, and slower.
    copied = steps.piece * 4 % 128 == 0

    def attention_key_gradients(inputs, dk_ref, dv_ref, shared):
        operands, cotangents = inputs
        group, tile = order(0)
        batch, key_head = lax.div(group, call.K), lax.rem(group, call.K)
        first = tile * rows.cta_tokens
        wg = lax.axis_index("wg")

        def listed_by(g):
            row = lax.div(first, call.bk)
            return visits(operands.walk, batch, key_head * call.G + g, row, call.N, steps)

        def multiply(own, which, want_dk, want_dv):
            """The gradients of the 64 keys from `own` on, in buffers number `which`."""
            k, v = shared.k.at[which], shared.v.at[which]
            here = pl.ds(own, rows.tokens)
            mask = call.mask(operands.scalars)
            keys = held_tokens(operands.k_side, rows, batch, own, mask.kv_offset)

            def accumulate(*sums):
                sums = iter(sums)
                dk, dv = (next(sums) if want else None for want in (want_dk, want_dv))

                def head(g, before):
                    listed, n = listed_by(g), key_head * call.G + g
                    slope = None if operands.slope is None else operands.slope[n]

                    def statistic(s, everywhere, ring):
                        """Of the queries of a step."""
                        if not copied:
                            return gather(steps, listed(s), lambda here: everywhere.at[batch, n, here])
                        return plgpu.load(ring.at[steps.slot(before + s)], layout=COLUMN, optimized=False)

                    def step(s, _, partial):
                        slot = steps.slot(before + s)
                        plgpu.barrier_wait(shared.q_ready.at[slot])
                        lse = statistic(s, cotangents.lse, shared.lse)

                        def product(z):
                            plgpu.wgmma(z, k, shared.q.at[slot].T)
                            return z[...]

                        z = pl.run_scoped(product, plgpu.ACC(plane.shape, jnp.float32))
                        penalty = None
                        if partial or slope is not None:
                            pieces = listed(s)
                            queries = moving_tokens(operands.q_side, steps, pieces, batch, mask.q_offset)
                        if slope is not None:
                            penalty = slope * plane.distance(queries, keys)
                        z, c, dcap = call.scores(z, penalty)
                        p = jnp.exp2(z * c - plane.of_query(lse))
                        if partial:
                            limits = call.T if steps.gathered > 1 else None, call.key_limit(gathered=1)
                            seen = plane.visible(mask.predicates, tags(steps, pieces), queries, keys, limits)
                            p = p if seen is None else jnp.where(seen, p, 0.0)
                        plgpu.barrier_wait(shared.do_ready.at[slot])

                        def mix(dp):
                            plgpu.wgmma(dp, v, shared.do.at[slot].T)
                            if want_dv:
                                plgpu.wgmma(dv, p.astype(call.dtype), shared.do.at[slot])
                            # dp is taken while dv is still being added to.
                            return plgpu.wgmma_accumulator_load(dp, wait_n=int(want_dv))

                        if want_dk:
                            delta = statistic(s, cotangents.delta, shared.delta)
                            dp = pl.run_scoped(mix, plgpu.ACC(plane.shape, jnp.float32))
                            dz = p * (dp - plane.of_query(delta))
                            dz = dz if dcap is None else dz * dcap
                            plgpu.wgmma(dk, dz.astype(call.dtype), shared.q.at[slot])
                            if want_dv:
                                plgpu.wgmma_wait(1)
                            plgpu.barrier_arrive(shared.do_free.at[slot])
                            plgpu.wgmma_wait(0)
                            plgpu.barrier_arrive(shared.q_free.at[slot])
                        else:
                            plgpu.barrier_arrive(shared.q_free.at[slot])
                            plgpu.wgmma(dv, p.astype(call.dtype), shared.do.at[slot])
                            plgpu.wgmma_wait(0)
                            plgpu.barrier_arrive(shared.do_free.at[slot])

                    lax.fori_loop(0, listed.partial, functools.partial(step, partial=True), None)
                    lax.fori_loop(listed.partial, listed.total, functools.partial(step, partial=False), None)
                    return before + listed.total

                lax.fori_loop(0, call.G, head, 0)
                return [x[...] for x in (dk, dv) if x is not None]

            widths = [width for width, want in ((H, want_dk), (Hv, want_dv)) if want]
            sums = iter(
                pl.run_scoped(accumulate, *(plgpu.ACC((WG_ROWS, width), jnp.float32) for width in widths))
            )
            if split:
                # The other warpgroup may still be reading the keys and values that this one would overwrite.
                plgpu.barrier_arrive(shared.ready.at[1])
                plgpu.barrier_wait(shared.ready.at[1])
            if want_dk:
                k[...] = (next(sums) * call.scores.scale).astype(call.dtype)
            if want_dv:
                v[...] = next(sums).astype(call.dtype)
            plgpu.commit_smem()
            own_rows = pl.ds(0, rows.tokens)
            if want_dk:
                plgpu.copy_smem_to_gmem(k.at[own_rows], dk_ref.at[batch, here, key_head])
            if want_dv:
                plgpu.copy_smem_to_gmem(v.at[own_rows], dv_ref.at[batch, here, key_head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg < wgs)
        def _():
            plgpu.set_max_registers(232, action="increase")
            which = 0 if split else wg
            own = first if split else first + wg * WG_ROWS

            def load():
                here = pl.ds(own, rows.tokens)
                for source, target in ((operands.k, shared.k), (operands.v, shared.v)):
                    plgpu.copy_gmem_to_smem(
                        source.at[batch, here, key_head],
                        target.at[which, pl.ds(0, rows.tokens)],
                        shared.ready.at[which],
                    )

            if split:
                pl.when(wg == 0)(load)
                plgpu.barrier_wait(shared.ready.at[0])
                pl.when(wg == 0)(lambda: multiply(own, 0, True, False))
                pl.when(wg == 1)(lambda: multiply(own, 0, False, True))
            else:
                load()
                plgpu.barrier_wait(shared.ready.at[wg])
                multiply(own, wg, True, True)

        @pl.when(wg == wgs)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def head(g, before):
                listed, n = listed_by(g), key_head * call.G + g
                lse, delta = (
                    [(x.at[batch, n, pl.ds(steps.tokens, x.shape[-1] - steps.tokens)], ring)] * copied
                    for x, ring in ((cotangents.lse, shared.lse), (cotangents.delta, shared.delta))
                )
                copy_ring(
                    steps,
                    listed,
                    (shared.q_ready, shared.q_free, (operands.q.at[batch, :, n], shared.q), *lse),
                    (shared.do_ready, shared.do_free, (cotangents.do.at[batch, :, n], shared.do), *delta),
                    before=before,
                )
                return before + listed.total

            lax.fori_loop(0, call.G, head, 0)

    ring = functools.partial(plgpu.Barrier, num_barriers=steps.buffers)
    statistics = plgpu.SMEM((steps.buffers, steps.tokens), jnp.float32) if copied else None
    shared = KeyShared(
        k=tiled((rows.wgs, WG_ROWS, H), call.dtype),
        v=tiled((rows.wgs, WG_ROWS, Hv), call.dtype),
        q=tiled((steps.buffers, steps.tokens, H), call.dtype),
        do=tiled((steps.buffers, steps.tokens, Hv), call.dtype),
        lse=statistics,
        delta=statistics,
        ready=plgpu.Barrier(num_arrivals=2, num_barriers=2),
        q_ready=ring(num_arrivals=(1 + copied) * steps.gathered),
        do_ready=ring(num_arrivals=(1 + copied) * steps.gathered),
        q_free=ring(num_arrivals=wgs),
        do_free=ring(num_arrivals=wgs),
    )
    out = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (operands.k, operands.v))
    return run(attention_key_gradients, out, shared, order.ctas, wgs, (operands, cotangents))
