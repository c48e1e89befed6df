"""The delta rule's two walks of the backward: one back in time, then one forward.

With S the state that enters a chunk and R the gradient of the one that leaves it, in the notation of
`delta_parts.py`, P = scale QK^T D and s = scale:

    dW = P^T dO + Lambda K R,       Y = dW + U^T b dW,          dV = b Y,       dbeta = rowsum(Y E)
    R <- e^(G_C) R + (s Gamma Q)^T dO - (Gamma K)^T dV
    dK_write = b (Lambda E R^T + (s E dO^T D^T) Q - (E dV^T D^T below) K)
    dQ = s Gamma dO S^T + (s dO E^T D) b K
    dK_read = -(Gamma dV S^T + (dV E^T D below) b K)

(Gated DeltaNet, arXiv:2412.06464; no gradient passes through U.) `back` does all that has an R, `ahead` all
that has an S: both are decayed linear attention once E and dV are known. States stay in registers, none are
stored. That of a log-decay sums q dQ + k dK_read - k dK_write over the tokens that follow.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from blockjax.kernels.linear_attention.hopper import SHARED_MEMORY, TILE
from blockjax.kernels.linear_attention.hopper.delta_forward import MARK, Walk
from blockjax.kernels.linear_attention.hopper.delta_parts import (
    BETA,
    ENTER,
    LEAVE,
    Chunk,
    added,
    ask_again,
    meet,
    off_diagonal,
    products,
    ring,
    tile,
)
from blockjax.kernels.linear_attention.hopper.parts import WGMMA, block, load, piece, publish, store, tiles
from blockjax.kernels.mosaic_gpu import run, share_out
from jax import lax


class Back(NamedTuple):
    """What `back` and `added_back` read; references inside a kernel.

    Attributes:
      q, k: [B, T, K, Hk]; do: [B, T, K, Hv]; solve: U [B, K, chunks, 64, 64].
      numbers: see `delta_parts.py`.
      errors: E like do; entries: [B, K, pieces, Hk, Hv] float32, the R that enter the pieces at their ends.
        Both None for `added_back`.
    """

    q: Any
    k: Any
    do: Any
    solve: Any
    numbers: Any
    errors: Any = None
    entries: Any = None


class BackShared(NamedTuple):
    """Shared memory: a ring, another of what is used first; each warpgroup's R and buffers; barriers."""

    q: Any
    k: Any
    do: Any
    errors: Any
    solve: Any
    numbers: Any
    state: Any
    values: Any
    writes: Any
    dv: Any
    ready: Any
    free: Any
    first_ready: Any
    first_free: Any
    met: Any


@functools.partial(jax.jit, static_argnames=("call",))
def back(call: Walk, operands: Back):
    """dv like do, dK_write like k, dbeta, the sums of k dK_write, the gradients of the first state and
    of those at marks.

    For marks see `delta_forward.outputs`. Both sums are float32 [B, K, tiles of 64 channels, tokens of whole
    chunks].
    """
    (B, _, K, Hk), Hv = operands.k.shape, operands.do.shape[-1]
    tokens = call.cut.chunks * TILE
    out = (
        jax.ShapeDtypeStruct(operands.do.shape, operands.do.dtype),
        jax.ShapeDtypeStruct(operands.k.shape, operands.k.dtype),
        jax.ShapeDtypeStruct((B, K, Hv // TILE, tokens), jnp.float32),
        jax.ShapeDtypeStruct((B, K, Hk // TILE, tokens), jnp.float32),
        jax.ShapeDtypeStruct((B, K, Hk, Hv), jnp.float32),
        call.marked(operands.do, Hk),
    )
    return _back(call, operands, out)


@functools.partial(jax.jit, static_argnames=("call",))
def added_back(call: Walk, operands: Back):
    """[B, K, pieces - 1, Hk, Hv] float32: R at the start of each piece but the first, if 0 at its end."""
    (B, _, K, Hk), Hv = operands.k.shape, operands.do.shape[-1]
    return _back(call, operands, (jax.ShapeDtypeStruct((B, K, call.cut.pieces - 1, Hk, Hv), jnp.float32),))[0]


def _back(call: Walk, operands: Back, out):
    cut, adding = call.cut, operands.entries is None
    (_, _, K, Hk), Hv, dtype = operands.k.shape, operands.do.shape[-1], operands.k.dtype
    nk, nv = Hk // TILE, Hv // TILE

    def linear_attention_delta_back(operands, *refs):
        *out, shared = refs
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        p, at = lax.div(cta, cut.heads), lax.rem(cta, cut.heads)
        p = p + 1 if adding else p
        batch, head = lax.div(at, K), lax.rem(at, K)
        length = jnp.minimum(cut.length, cut.chunks - p * cut.length)
        stages = shared.k.shape[0]

        def chunk_of(i):
            return p * cut.length + length - 1 - i

        def multiply():
            def entry(h):
                if adding:
                    return plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.float32), WGMMA)
                return load(block(operands.entries, batch, head, p, row=h, column=wg))

            R = tuple(entry(h) for h in range(nk))
            publish(shared.state.at[wg], R)

            def step(i, R):
                wg = ask_again()
                values, writes, state = (x.at[wg] for x in (shared.values, shared.writes, shared.state))
                slot, index, position = lax.rem(i, stages), chunk_of(i), length - 1 - i
                early = lax.rem(i, firsts)
                plgpu.barrier_wait(shared.first_ready.at[early])
                chunk, solve = Chunk(shared.numbers.at[early]), shared.solve.at[early]
                keys = [shared.k.at[slot, h] for h in range(nk)]
                queries = [shared.q.at[slot, h] for h in range(nk)]
                do = shared.do.at[slot, wg]
                enter, beta = chunk.row(ENTER), chunk.row(BETA)
                leave, across, decays = chunk.row(LEAVE), chunk.across(), chunk.decays(transposed=True)
                plgpu.barrier_wait(shared.ready.at[slot])
                scores, dw = products(
                    [(keys[h], queries[h].T) for h in range(nk)],
                    [(keys[h], state.at[h]) for h in range(nk)],
                )
                pairs = (scores * decays * call.scale).astype(dtype)
                (dw,) = added([dw * tile(leave)], lambda: [[(pairs, do)]])
                if not adding:
                    # What was stored from these buffers in the chunk before has left them long ago.
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                values[...] = (dw * tile(beta)).astype(dtype)
                read = plgpu.load(do, layout=WGMMA).astype(jnp.float32)
                writes[...] = (read * tile(enter * call.scale)).astype(dtype)
                plgpu.commit_smem()
                (y,) = added([dw], lambda: [[(solve.T, values)]])
                plgpu.barrier_arrive(shared.first_free.at[early])
                dv = y * tile(beta)
                values[...] = (dv * tile(-enter)).astype(dtype)

                def updates():
                    tiles = [(shared.q.at[slot, h], shared.k.at[slot, h]) for h in range(nk)]
                    return [[(query.T, writes), (key.T, values)] for query, key in tiles]

                R = [r * across for r in R]
                if adding:
                    plgpu.commit_smem()
                    R = added(R, updates)
                    plgpu.barrier_arrive(shared.free.at[slot])
                    publish(state, R)
                    return R
                shared.dv.at[wg][...] = dv.astype(dtype)
                plgpu.commit_smem()
                e = plgpu.load(shared.errors.at[slot, wg], layout=WGMMA).astype(jnp.float32)
                here = pl.ds(index * TILE, TILE)
                store(out[2].at[batch, head, wg, here], jnp.sum(y * e, axis=1))
                R = added(R, updates)
                # All of R and dV are there now.
                meet(shared.met)
                errors = [shared.errors.at[slot, c] for c in range(nv)]
                with_do, with_dv = products(
                    [(errors[c], shared.do.at[slot, c].T) for c in range(nv)],
                    [(errors[c], shared.dv.at[c].T) for c in range(nv)],
                )
                with_do = (with_do * decays * call.scale).astype(dtype)
                with_dv = (off_diagonal(with_dv * decays) * -1.0).astype(dtype)

                def keys_of(h, buffer):
                    (dk,) = products([(errors[c], shared.state.at[c, h].T) for c in range(nv)])
                    query, key = shared.q.at[slot, h], shared.k.at[slot, h]
                    dk = dk * tile(leave)
                    (dk,) = added([dk], lambda: [[(with_do, query), (with_dv, key)]])
                    dk *= tile(beta)
                    buffer[...] = dk.astype(dtype)
                    read = plgpu.load(key, layout=WGMMA).astype(jnp.float32)
                    store(out[3].at[batch, head, h, here], jnp.sum(dk * read, axis=1))

                for j, h, mine in _own(wg, nk, nv):
                    _when(mine, functools.partial(keys_of, h, (writes, values)[j]))
                plgpu.commit_smem()
                plgpu.barrier_arrive(shared.free.at[slot])
                # All have read R and dV.
                meet(shared.met)
                plgpu.copy_smem_to_gmem(shared.dv.at[wg], piece(out[0], batch, head, index * TILE, wg))

                def put(h, buffer):
                    plgpu.copy_smem_to_gmem(buffer, piece(out[1], batch, head, index * TILE, h))

                for j, h, mine in _own(wg, nk, nv):
                    _when(mine, functools.partial(put, h, (writes, values)[j]))
                publish(state, R)

                @pl.when((lax.rem(position, MARK) == 0) & (position > 0))
                def _():
                    mark = lax.div(position, MARK) - 1
                    for h in range(nk):
                        there = block(out[5], batch, head, p, mark, row=h, column=wg)
                        plgpu.copy_smem_to_gmem(state.at[h], there)

                return R

            R = lax.fori_loop(0, length, step, R)
            for h in range(nk):
                if adding:
                    store(block(out[0], batch, head, p - 1, row=h, column=wg), R[h])
                else:
                    there = block(out[4], batch, head, row=h, column=wg)
                    pl.when(p == 0)(lambda there=there, r=R[h]: store(there, r))

        def copy():
            def step(i, _):
                slot, index = lax.rem(i, stages), chunk_of(i)
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(shared.free.at[slot]))
                ready = shared.ready.at[slot]
                copies = [
                    (operands.k, shared.k, nk),
                    (operands.q, shared.q, nk),
                    (operands.do, shared.do, nv),
                ]
                if not adding:
                    copies.append((operands.errors, shared.errors, nv))
                for source, buffers, n in copies:
                    for h in range(n):
                        here = piece(source, batch, head, index * TILE, h)
                        plgpu.copy_gmem_to_smem(here, buffers.at[slot, h], ready)
                early = lax.rem(i, firsts)
                pl.when(i >= firsts)(lambda: plgpu.barrier_wait(shared.first_free.at[early]))
                ready = shared.first_ready.at[early]
                for source, buffers in ((operands.solve, shared.solve), (operands.numbers, shared.numbers)):
                    plgpu.copy_gmem_to_smem(source.at[batch, head, index], buffers.at[early], ready)

            lax.fori_loop(0, length, step, None)

        share_out(wg, nv, multiply, copy)

    moving = 2 * nk + nv + (0 if adding else nv)
    held = nv * (nk + (2 if adding else 3))
    size = TILE * TILE * jnp.dtype(dtype).itemsize
    # All that has room; where sums of pieces are all, the chunk ends soon after the solve.
    stages = min(4, (SHARED_MEMORY // size - 1 - held) // (moving + adding))
    firsts = stages if adding else 1
    shared = BackShared(
        q=tiles(stages, nk, dtype=dtype),
        k=tiles(stages, nk, dtype=dtype),
        do=tiles(stages, nv, dtype=dtype),
        errors=None if adding else tiles(stages, nv, dtype=dtype),
        solve=tiles(firsts, dtype=dtype),
        numbers=ring(firsts),
        state=tiles(nv, nk, dtype=dtype),
        values=tiles(nv, dtype=dtype),
        writes=tiles(nv, dtype=dtype),
        dv=None if adding else tiles(nv, dtype=dtype),
        ready=plgpu.Barrier(num_arrivals=moving, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=nv, num_barriers=stages),
        first_ready=plgpu.Barrier(num_arrivals=2, num_barriers=firsts),
        first_free=plgpu.Barrier(num_arrivals=nv, num_barriers=firsts),
        met=None if adding else plgpu.Barrier(num_arrivals=nv),
    )
    pieces = cut.pieces - 1 if adding else cut.pieces
    return run(linear_attention_delta_back, out, shared, cut.heads * pieces, nv, operands)


class Ahead(NamedTuple):
    """What `ahead` reads; references inside a kernel.

    Attributes:
      q, k: [B, T, K, Hk]; do, dv, errors: [B, T, K, Hv], E the last.
      writes: dK_write like k, of `back`.
      entries: [B, K, pieces, Hk, Hv] float32, the S that enter the pieces.
    """

    q: Any
    k: Any
    do: Any
    dv: Any
    errors: Any
    writes: Any
    numbers: Any
    entries: Any


class AheadShared(NamedTuple):
    """Shared memory: a ring; of one chunk what turns into gradients; of each warpgroup S, what is written
    to it; barriers."""

    k: Any
    do: Any
    dv: Any
    errors: Any
    numbers: Any
    dq: Any
    dk: Any
    state: Any
    values: Any
    ready: Any
    free: Any
    late_ready: Any
    late_free: Any
    met: Any


@functools.partial(jax.jit, static_argnames=("call",))
def ahead(call: Walk, operands: Ahead):
    """dq and dk, and the sums of q dQ + k dK_read, float32 [B, K, Hk / 64, tokens of whole chunks]."""
    cut = call.cut
    (B, _, K, Hk), Hv, dtype = operands.k.shape, operands.do.shape[-1], operands.k.dtype
    nk, nv = Hk // TILE, Hv // TILE

    def linear_attention_delta_ahead(operands, dq_ref, dk_ref, sums_ref, shared):
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        p, at = lax.div(cta, cut.heads), lax.rem(cta, cut.heads)
        batch, head = lax.div(at, K), lax.rem(at, K)
        length = jnp.minimum(cut.length, cut.chunks - p * cut.length)
        stages = shared.k.shape[0]

        def multiply():
            S = tuple(load(block(operands.entries, batch, head, p, row=h, column=wg)) for h in range(nk))
            publish(shared.state.at[wg], S)

            def step(i, S):
                wg = ask_again()
                values, state = shared.values.at[wg], shared.state.at[wg]
                slot, index = lax.rem(i, stages), p * cut.length + i
                plgpu.barrier_wait(shared.ready.at[slot])
                chunk = Chunk(shared.numbers.at[slot])
                enter, beta, across = chunk.row(ENTER), chunk.row(BETA), chunk.across()
                weights = chunk.decays() * chunk.column(BETA)
                e = plgpu.load(shared.errors.at[slot, wg], layout=WGMMA).astype(jnp.float32)
                values[...] = (e * tile(chunk.row(LEAVE) * beta)).astype(dtype)
                plgpu.commit_smem()

                def stored():
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.barrier_arrive(shared.late_free)

                pl.when(i > 0)(stored)
                S = added(
                    [s * across for s in S],
                    lambda: [[(shared.k.at[slot, h].T, values)] for h in range(nk)],
                )
                # All of S is there now.
                meet(shared.met)
                do, dv, errors = (
                    [x.at[slot, c] for c in range(nv)] for x in (shared.do, shared.dv, shared.errors)
                )
                with_do, with_dv = products(
                    [(do[c], errors[c].T) for c in range(nv)], [(dv[c], errors[c].T) for c in range(nv)]
                )
                with_do = (with_do * weights * call.scale).astype(dtype)
                with_dv = off_diagonal(with_dv * weights).astype(dtype)
                plgpu.barrier_wait(shared.late_ready)

                def keys_of(h):
                    key = shared.k.at[slot, h]
                    dq, dk = products(
                        [(do[c], shared.state.at[c, h].T) for c in range(nv)],
                        [(dv[c], shared.state.at[c, h].T) for c in range(nv)],
                    )
                    dq, dk = dq * tile(enter * call.scale), dk * tile(enter)
                    dq, dk = added([dq, dk], lambda: [[(with_do, key)], [(with_dv, key)]])
                    q, k, written = (
                        plgpu.load(x, layout=WGMMA).astype(jnp.float32)
                        for x in (shared.dq.at[h], key, shared.dk.at[h])
                    )
                    there = sums_ref.at[batch, head, h, pl.ds(index * TILE, TILE)]
                    store(there, jnp.sum(q * dq - k * dk, axis=1))
                    shared.dq.at[h][...] = dq.astype(dtype)
                    shared.dk.at[h][...] = (written - dk).astype(dtype)
                    plgpu.commit_smem()
                    for buffer, there in ((shared.dq, dq_ref), (shared.dk, dk_ref)):
                        plgpu.copy_smem_to_gmem(buffer.at[h], piece(there, batch, head, index * TILE, h))

                for _, h, mine in _own(wg, nk, nv):
                    _when(mine, functools.partial(keys_of, h))
                plgpu.barrier_arrive(shared.free.at[slot])
                # All have read S.
                meet(shared.met)
                publish(state, S)
                return S

            lax.fori_loop(0, length, step, S)

        def copy():
            def step(i, _):
                slot, index = lax.rem(i, stages), p * cut.length + i
                ready = shared.ready.at[slot]
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(shared.free.at[slot]))
                for source, buffers, n in (
                    (operands.k, shared.k, nk),
                    (operands.do, shared.do, nv),
                    (operands.dv, shared.dv, nv),
                    (operands.errors, shared.errors, nv),
                ):
                    for h in range(n):
                        here = piece(source, batch, head, index * TILE, h)
                        plgpu.copy_gmem_to_smem(here, buffers.at[slot, h], ready)
                plgpu.copy_gmem_to_smem(
                    operands.numbers.at[batch, head, index], shared.numbers.at[slot], ready
                )
                pl.when(i > 0)(lambda: plgpu.barrier_wait(shared.late_free))
                for source, buffers in ((operands.q, shared.dq), (operands.writes, shared.dk)):
                    for h in range(nk):
                        here = piece(source, batch, head, index * TILE, h)
                        plgpu.copy_gmem_to_smem(here, buffers.at[h], shared.late_ready)

            lax.fori_loop(0, length, step, None)

        share_out(wg, nv, multiply, copy)

    moving, held = nk + 3 * nv, nv * nk + 2 * nk + nv
    size = TILE * TILE * jnp.dtype(dtype).itemsize
    stages = min(4, (SHARED_MEMORY // size - 1 - held) // moving)
    shared = AheadShared(
        k=tiles(stages, nk, dtype=dtype),
        do=tiles(stages, nv, dtype=dtype),
        dv=tiles(stages, nv, dtype=dtype),
        errors=tiles(stages, nv, dtype=dtype),
        numbers=ring(stages),
        dq=tiles(nk, dtype=dtype),
        dk=tiles(nk, dtype=dtype),
        state=tiles(nv, nk, dtype=dtype),
        values=tiles(nv, dtype=dtype),
        ready=plgpu.Barrier(num_arrivals=moving + 1, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=nv, num_barriers=stages),
        late_ready=plgpu.Barrier(num_arrivals=2 * nk),
        late_free=plgpu.Barrier(num_arrivals=nv),
        met=plgpu.Barrier(num_arrivals=nv),
    )
    out = (
        jax.ShapeDtypeStruct(operands.k.shape, dtype),
        jax.ShapeDtypeStruct(operands.k.shape, dtype),
        jax.ShapeDtypeStruct((B, K, nk, cut.chunks * TILE), jnp.float32),
    )
    return run(linear_attention_delta_ahead, out, shared, cut.heads * cut.pieces, nv, operands)


def _own(wg, nk: int, nv: int):
    """(number, tile, whether there is one) of the tiles of key channels that a warpgroup makes."""
    for j in range(pl.cdiv(nk, nv)):
        h = wg + j * nv
        yield j, h, None if (j + 1) * nv <= nk else h < nk


def _when(condition, body) -> None:
    body() if condition is None else pl.when(condition)(body)
