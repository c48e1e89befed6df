"""dK and dV on Hopper: a CTA holds keys and moves along their transposed walks, one of each query head.

Formulas and why this is a kernel of its own: `query_gradient.py`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from blockjax.kernels.block_sparse_attention.hopper import SHARED_MEMORY, WG_ROWS, tile_bytes
from blockjax.kernels.block_sparse_attention.hopper.call import Call, LaidCotangents, Operands
from blockjax.kernels.block_sparse_attention.hopper.schedule import (
    Order,
    copy_ring,
    first_token,
    visits,
)
from blockjax.kernels.block_sparse_attention.hopper.tiles import (
    COLUMN,
    Plane,
    Reach,
    Steps,
    gather,
    held_tokens,
    moving_tokens,
    tags,
    tiled,
)
from blockjax.kernels.mosaic_gpu import run, share_out
from jax import lax


class Shared(NamedTuple):
    """Shared memory: what is held, the gradients (None: in place), rings of what moves, barriers.

    `met` is where warpgroups that hold the same keys meet.
    """

    k: Any
    v: Any
    dk: Any
    dv: Any
    q: Any
    do: Any
    lse: Any
    delta: Any
    ready: Any
    free: Any
    met: Any
    q_ready: Any
    do_ready: Any
    q_free: Any
    do_free: Any


@functools.partial(jax.jit, static_argnames=("call", "steps"))
def key_gradients(call: Call, operands: Operands, cotangents: LaidCotangents, steps: Steps):
    """`dk` [B, S, K, H] and `dv` [B, S, K, Hv] in q's dtype, summed over the query heads of a group.

    Scores are transposed here: keys are rows. Where both sums do not fit the registers of a warpgroup, each
    warpgroup holds the same keys and one sums dk, the other dv.
    """
    H, Hv = call.H, call.Hv
    split, rows = call.split_keys, call.held_keys
    wgs = 2 if split else rows.wgs
    order = Order.of(
        rows.units(call.S) * rows.tokens // rows.cta_tokens, call.B * call.K, call.G * call.T * (H + Hv) * 2
    )
    plane = Plane((WG_ROWS, steps.tokens), q_axis=1)
    apart = tile_bytes("dkv", steps.buffers * steps.tokens, rows.wgs * WG_ROWS, H, Hv, apart=True)
    in_place = split or apart > SHARED_MEMORY
    # The copy engine writes to multiples of 128 bytes: smaller pieces are read where they are, and slower.
    copied = steps.piece * 4 % 128 == 0

    def attention_key_gradients(inputs, dk_ref, dv_ref, shared):
        operands, cotangents = inputs
        wg = lax.axis_index("wg")

        def place(turn):
            """Batch entry, key head, first key, and a function that gives the walk of a query head."""
            group, tile = order(turn)
            batch, key_head = lax.div(group, call.K), lax.rem(group, call.K)
            first = tile * rows.cta_tokens
            if operands.order is not None:
                first = first_token(operands.order, batch, key_head, call.K, tile, call.bk, rows.cta_tokens)

            def listed_by(n):
                return visits(operands.walk, batch, n, lax.div(first, call.bk), call.N, steps)

            return batch, key_head, first, listed_by

        def tile(turn, before, want_dk=True, want_dv=True):
            """The gradients of a warpgroup's 64 keys."""
            batch, key_head, first, listed_by = place(turn)
            which = 0 if split else wg
            own = first if split else first + wg * WG_ROWS
            k, v = shared.k.at[which], shared.v.at[which]
            mask = call.mask(operands.scalars)
            keys = held_tokens(operands.k_side, rows, batch, own, mask.kv_offset)

            def accumulate(*sums):
                sums = iter(sums)
                dk, dv = (next(sums) if want else None for want in (want_dk, want_dv))

                def head(g, before):
                    n = key_head * call.G + g
                    listed = listed_by(n)
                    slope = None if operands.slope is None else operands.slope[n]

                    def statistic(s, everywhere, ring):
                        """Of the queries of a step."""
                        if not copied:
                            return gather(steps, listed(s), lambda here: everywhere.at[batch, n, here])
                        return plgpu.load(ring.at[steps.slot(before + s)], layout=COLUMN, optimized=False)

                    def step(s, _, partial):
                        reach = None
                        if partial and steps.gathered == 1:
                            unit, _, _ = listed(s)[0]
                            reach = Reach.of(mask, operands.q_side, unit * steps.tokens, steps.tokens)
                        if reach is None:
                            visit(s, partial)
                            return
                        # At the edge of what is seen one warpgroup may have nothing to do.
                        needed = reach.meets(own + mask.kv_offset, WG_ROWS)
                        pl.when(needed)(lambda: visit(s, partial))
                        pl.when(~needed)(lambda: skip(s))

                    def skip(s):
                        slot = steps.slot(before + s)
                        plgpu.barrier_wait(shared.q_ready.at[slot])
                        plgpu.barrier_wait(shared.do_ready.at[slot])
                        plgpu.barrier_arrive(shared.q_free.at[slot])
                        plgpu.barrier_arrive(shared.do_free.at[slot])

                    def visit(s, partial):
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

                after = lax.fori_loop(0, call.G, head, before)
                return [x[...] for x in (dk, dv) if x is not None], after

            plgpu.barrier_wait(shared.ready.at[which])
            widths = [width for width, want in ((H, want_dk), (Hv, want_dv)) if want]
            accumulators = (plgpu.ACC((WG_ROWS, width), jnp.float32) for width in widths)
            sums, after = pl.run_scoped(accumulate, *accumulators)
            if in_place and split:
                # The other warpgroup may still be reading the keys and values that this one overwrites.
                plgpu.barrier_arrive(shared.met)
                plgpu.barrier_wait(shared.met)
            elif not in_place:
                plgpu.barrier_arrive(shared.free.at[which])
                # The gradients of the turn before have left their buffers long ago.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            results = []
            if want_dk:
                results.append((dk_ref, k if in_place else shared.dk.at[which], sums[0] * call.scores.scale))
            if want_dv:
                results.append((dv_ref, v if in_place else shared.dv.at[which], sums[-1]))
            for _, buffer, x in results:
                buffer[...] = x.astype(call.dtype)
            plgpu.commit_smem()
            for ref, buffer, _ in results:
                there = ref.at[batch, pl.ds(own, rows.tokens), key_head]
                plgpu.copy_smem_to_gmem(buffer.at[pl.ds(0, rows.tokens)], there)
            if in_place:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(shared.free.at[which])
            return after

        def copy(turn, before):
            batch, key_head, first, listed_by = place(turn)
            for i in range(rows.wgs):
                pl.when(turn > 0)(lambda i=i: plgpu.barrier_wait(shared.free.at[i]))
                here = pl.ds(first + i * WG_ROWS, rows.tokens)
                for source, buffers in ((operands.k, shared.k), (operands.v, shared.v)):
                    target = buffers.at[i, pl.ds(0, rows.tokens)]
                    plgpu.copy_gmem_to_smem(source.at[batch, here, key_head], target, shared.ready.at[i])

            def head(g, before):
                n = key_head * call.G + g
                listed = listed_by(n)
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

            return lax.fori_loop(0, call.G, head, before)

        def sums(**want):
            lax.fori_loop(0, order.count, functools.partial(tile, **want), 0)

        def multiply():
            if split:
                pl.when(wg == 0)(functools.partial(sums, want_dv=False))
                pl.when(wg == 1)(functools.partial(sums, want_dk=False))
            else:
                sums()

        share_out(wg, wgs, multiply, lambda: lax.fori_loop(0, order.count, copy, 0))

    ring = functools.partial(plgpu.Barrier, num_barriers=steps.buffers)
    statistics = plgpu.SMEM((steps.buffers, steps.tokens), jnp.float32) if copied else None
    dk, dv = (None if in_place else tiled((rows.wgs, WG_ROWS, width), call.dtype) for width in (H, Hv))
    shared = Shared(
        k=tiled((rows.wgs, WG_ROWS, H), call.dtype),
        v=tiled((rows.wgs, WG_ROWS, Hv), call.dtype),
        dk=dk,
        dv=dv,
        q=tiled((steps.buffers, steps.tokens, H), call.dtype),
        do=tiled((steps.buffers, steps.tokens, Hv), call.dtype),
        lse=statistics,
        delta=statistics,
        ready=plgpu.Barrier(num_arrivals=2, num_barriers=rows.wgs),
        free=plgpu.Barrier(num_arrivals=wgs // rows.wgs, num_barriers=rows.wgs),
        met=plgpu.Barrier(num_arrivals=wgs) if split else None,
        q_ready=ring(num_arrivals=(1 + copied) * steps.gathered),
        do_ready=ring(num_arrivals=(1 + copied) * steps.gathered),
        q_free=ring(num_arrivals=wgs),
        do_free=ring(num_arrivals=wgs),
    )
    out = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (operands.k, operands.v))
    return run(attention_key_gradients, out, shared, order.ctas, wgs, (operands, cotangents))
