"""What each piece of a sequence adds to the state, so that all pieces can be walked at once.

A CTA sums `K^T (w V)` over one piece of one head, w being what is left of a token's write where the walk
leaves the piece. It starts at that end and stops where nothing is left in float32; chunks near the other end
are read last, and are in the cache when the walk begins there.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from blockjax.kernels.linear_attention.hopper import SHARED_MEMORY, TILE
from blockjax.kernels.linear_attention.hopper.parts import (
    WGMMA,
    Chunk,
    Decays,
    block,
    piece,
    rows,
    store,
    tiles,
)
from blockjax.kernels.linear_attention.hopper.sweep import Sweep
from blockjax.kernels.mosaic_gpu import run, share_out
from jax import lax


class Operands(NamedTuple):
    """k [B, T, K, Hk], v [B, T, K, Hv], and `counts` [B, K, pieces] int32, the chunks to sum, at least 1."""

    k: Any
    v: Any
    decays: Decays
    counts: Any


class Shared(NamedTuple):
    """Shared memory: rings; of each warpgroup two buffers of weighted values; barriers."""

    k: Any
    v: Any
    values: Any
    ready: Any
    free: Any


@functools.partial(jax.jit, static_argnames=("call", "pieces"))
def summaries(call: Sweep, pieces: int, operands: Operands):
    """[B, K, pieces, Hk, Hv] float32, in the order of tokens: of those pieces that the walk visits first."""
    cut = call.cut
    (B, _, K, Hk), Hv, dtype = operands.k.shape, operands.v.shape[-1], operands.v.dtype
    nk, nv = Hk // TILE, Hv // TILE

    def linear_attention_summaries(operands, out_ref, shared):
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        order, at = lax.div(cta, cut.heads), lax.rem(cta, cut.heads)
        batch, head = lax.div(at, K), lax.rem(at, K)
        p = order + cut.pieces - pieces if call.reverse else order
        length = jnp.minimum(cut.length, cut.chunks - p * cut.length)
        count = operands.counts[batch, head, p]
        stages = shared.k.shape[0]

        def chunk_of(i):
            return p * cut.length + (i if call.reverse else length - 1 - i)

        def multiply():
            def add(accs):
                def step(i, _):
                    slot, index = lax.rem(i, stages), chunk_of(i)
                    values = shared.values.at[wg, lax.rem(i, 2)]
                    chunk = Chunk.of(operands.decays, batch, head, index, call.reverse, call.documents)
                    if chunk.rate is None:
                        outside = operands.decays.outside[batch, head, index]
                    else:
                        outside = jnp.exp2(chunk.rate * (i * TILE).astype(jnp.float32))
                    weights = chunk.leave() * (outside * call.write)
                    plgpu.barrier_wait(shared.ready.at[slot])
                    v = plgpu.load(shared.v.at[slot, wg], layout=WGMMA).astype(jnp.float32)
                    # What was read of these values two steps ago was awaited in the step before.
                    values[...] = (v * rows(weights)).astype(dtype)
                    plgpu.commit_smem()
                    for h in range(nk):
                        plgpu.wgmma(accs[h], shared.k.at[slot, h].T, values)
                    # Those of the step before are done, and their buffers are free.
                    plgpu.wgmma_wait(nk)
                    before = lax.rem(i + stages - 1, stages)
                    pl.when(i > 0)(lambda: plgpu.barrier_arrive(shared.free.at[before]))

                lax.fori_loop(0, count, step, None)
                plgpu.wgmma_wait(0)

            zero = plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.float32), WGMMA)
            S = pl.run_state(add)([plgpu.ACC.init(zero) for _ in range(nk)])
            for h in range(nk):
                store(block(out_ref, batch, head, order, row=h, column=wg), S[h])

        def copy():
            def step(i, _):
                slot, index = lax.rem(i, stages), chunk_of(i)
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(shared.free.at[slot]))
                for source, buffers, n in ((operands.k, shared.k, nk), (operands.v, shared.v, nv)):
                    for h in range(n):
                        here = piece(source, batch, head, index * TILE, h)
                        plgpu.copy_gmem_to_smem(here, buffers.at[slot, h], shared.ready.at[slot])

            lax.fori_loop(0, count, step, None)

        share_out(wg, nv, multiply, copy)

    size = TILE * TILE * jnp.dtype(dtype).itemsize
    stages = min(6, (SHARED_MEMORY - 2 * nv * size) // ((nk + nv) * size))
    ring = functools.partial(plgpu.Barrier, num_barriers=stages)
    shared = Shared(
        k=tiles(stages, nk, dtype=dtype),
        v=tiles(stages, nv, dtype=dtype),
        values=tiles(nv, 2, dtype=dtype),
        ready=ring(num_arrivals=nk + nv),
        free=ring(num_arrivals=nv),
    )
    out = jax.ShapeDtypeStruct((B, K, pieces, Hk, Hv), jnp.float32)
    return run(linear_attention_summaries, out, shared, cut.heads * pieces, nv, operands)
