"""dQ on Hopper: a CTA holds query rows and moves along their walk.

It and `key_gradients.py` recompute the probabilities from `lse`: seven products a tile where a fused kernel
has five. But no tile is added to in memory by several CTAs, so every run gives the same bits.

Formulas: FlashAttention-2, arXiv:2307.08691, algorithm 2, with delta = sum(do o) - dlse.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from blockjax.kernels.block_sparse_attention.hopper import SHARED_MEMORY, WG_ROWS, tile_bytes
from blockjax.kernels.block_sparse_attention.hopper.call import Call, LaidCotangents, Operands
from blockjax.kernels.block_sparse_attention.hopper.schedule import QueryTiles
from blockjax.kernels.block_sparse_attention.hopper.tiles import (
    ROW,
    WGMMA,
    Plane,
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
    """Shared memory: what is held, the gradient (None: in place of q), rings of keys and values, barriers."""

    q: Any
    do: Any
    dq: Any
    k: Any
    v: Any
    dslope: Any
    ready: Any
    free: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any


@functools.partial(jax.jit, static_argnames=("call", "steps"))
def query_gradient(call: Call, operands: Operands, cotangents: LaidCotangents, steps: Steps):
    """`dq` [B, T, N, H] in q's dtype, and the gradient of each row's slope [B, N, T] if there is a bias."""
    rows, H, Hv = call.held, call.H, call.Hv
    tiles, units = QueryTiles(call, steps), rows.units(call.T)
    plane = Plane((WG_ROWS, steps.tokens), q_axis=0)
    bias = operands.slope is not None
    apart = tile_bytes("dq", steps.buffers * steps.tokens, rows.wgs * WG_ROWS, H, Hv, apart=True)
    in_place = bias or apart > SHARED_MEMORY

    def attention_query_gradient(inputs, dq_ref, dslope_ref, shared):
        operands, cotangents = inputs
        wg = lax.axis_index("wg")

        def tile(turn, before):
            batch, cta_head, cta_first, listed = tiles.place(operands, turn)
            first, head = rows.share(wg, cta_first, cta_head)
            q, do = shared.q.at[wg], shared.do.at[wg]
            where = batch, lax.div(head, rows.heads), lax.div(first, rows.tokens)
            lse, delta = (
                plgpu.load(x.at[*where], layout=ROW, optimized=False)
                for x in (cotangents.lse, cotangents.delta)
            )
            mask = call.mask(operands.scalars)
            queries = held_tokens(operands.q_side, rows, batch, first, mask.q_offset)
            slope = held_slope(operands.slope, rows, head)

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
            dq = (shared.q if in_place else shared.dq).at[wg]
            dq[...] = (acc * call.scores.scale).astype(call.dtype)
            if bias:
                shared.dslope[wg] = dslope
            plgpu.commit_smem()
            for ref, piece in rows.pieces(dq_ref, dq, batch, first, head):
                plgpu.copy_smem_to_gmem(piece, ref)
            if bias:
                plgpu.copy_smem_to_gmem(shared.dslope.at[wg], dslope_ref.at[*where])
            if in_place:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(shared.free.at[wg])
            return before + listed.total

        held = (operands.q, shared.q), (cotangents.do, shared.do)
        share_out(
            wg,
            rows.wgs,
            lambda: lax.fori_loop(0, tiles.order.count, tile, 0),
            lambda: tiles.copy(operands, shared, *held),
        )

    shared = Shared(
        q=tiled((rows.wgs, WG_ROWS, H), call.dtype),
        do=tiled((rows.wgs, WG_ROWS, Hv), call.dtype),
        dq=None if in_place else tiled((rows.wgs, WG_ROWS, H), call.dtype),
        dslope=plgpu.SMEM((rows.wgs, WG_ROWS), jnp.float32) if bias else None,
        ready=plgpu.Barrier(num_arrivals=2 * rows.heads, num_barriers=rows.wgs),
        free=plgpu.Barrier(num_barriers=rows.wgs),
        **tiles.ring(),
    )
    per_row = jax.ShapeDtypeStruct((call.B, call.N // rows.heads, units, WG_ROWS), jnp.float32)
    out = jax.ShapeDtypeStruct((call.B, call.T, call.N, H), call.dtype), per_row if bias else None
    dq, dslope = run(
        attention_query_gradient, out, shared, tiles.order.ctas, rows.wgs, (operands, cotangents)
    )
    return dq, None if dslope is None else rows.restore(dslope, call.T)
