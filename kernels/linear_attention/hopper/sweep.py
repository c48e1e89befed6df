"""Linear attention with decays, chunk by chunk, in one direction: the kernel of the forward and, three times,
of the backward.

A CTA walks one piece of one head; warpgroup w keeps the columns w of the state in registers. Per chunk of 64
tokens, with S the state that the walk brings, D the weights of pairs, enter and leave those of tokens:

    O = enter Q S + (QK^T D) V,        S <- across S + K^T (leave V)

(Lightning Attention-2, arXiv:2401.04658, section 3.2; Mamba-2, arXiv:2405.21060, section 6). S is published
in shared memory in the dtype of the products; it itself stays in float32.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from blockjax.kernels.linear_attention.hopper import SHARED_MEMORY, TILE
from blockjax.kernels.linear_attention.hopper.parts import (
    WGMMA,
    Chunk,
    Cut,
    Decays,
    block,
    load,
    piece,
    publish,
    rows,
    store,
    tiles,
)
from blockjax.kernels.mosaic_gpu import run, share_out
from jax import lax


@dataclass(frozen=True)
class Sweep:
    """The static side of a call.

    `read`, `pair` and `write` are factors of what is read of the state, of pairs in a chunk, and of what is
    written to the state.
    """

    cut: Cut
    reverse: bool = False
    documents: bool = False
    read: float = 1.0
    pair: float = 1.0
    write: float = 1.0


class Operands(NamedTuple):
    """Arrays; references inside a kernel.

    Attributes:
      q, k: [B, T, K, Hk]; v: [B, T, K, Hv].
      entries: [B, K, pieces, Hk, Hv] float32, the states that enter the pieces in the direction of the walk.
      x: [B, T, K, Hv] to also return `sum(o x)` over channels, or None.
    """

    q: Any
    k: Any
    v: Any
    entries: Any
    decays: Decays
    x: Any = None


class Shared(NamedTuple):
    """Shared memory: rings, then of each warpgroup the state, weighted values, the output; barriers."""

    q: Any
    k: Any
    v: Any
    x: Any
    state: Any
    values: Any
    o: Any
    sums: Any
    keys_ready: Any
    values_ready: Any
    free: Any


@functools.partial(jax.jit, static_argnames=("call",))
def sweep(call: Sweep, operands: Operands):
    """`o` like v, the state [B, K, Hk, Hv] float32 that leaves the last piece, and the sums of x.

    Sums are [B, K, Hv / 64, tokens of whole chunks] float32, or None without x.
    """
    cut = call.cut
    (B, _, K, Hk), Hv, dtype = operands.q.shape, operands.v.shape[-1], operands.v.dtype
    nk, nv, summed = Hk // TILE, Hv // TILE, operands.x is not None
    last_piece = 0 if call.reverse else cut.pieces - 1

    def linear_attention_sweep(operands, o_ref, exit_ref, sums_ref, shared):
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        p, at = lax.div(cta, cut.heads), lax.rem(cta, cut.heads)
        batch, head = lax.div(at, K), lax.rem(at, K)
        length = jnp.minimum(cut.length, cut.chunks - p * cut.length)
        stages = shared.q.shape[0]

        def chunk_of(i):
            return p * cut.length + (length - 1 - i if call.reverse else i)

        def multiply():
            o_smem, values, state = shared.o.at[wg], shared.values.at[wg], shared.state.at[wg]

            S = tuple(load(block(operands.entries, batch, head, p, row=h, column=wg)) for h in range(nk))
            publish(state, S)

            def step(i, S):
                slot, index = lax.rem(i, stages), chunk_of(i)
                v = shared.v.at[slot, wg]
                chunk = Chunk.of(operands.decays, batch, head, index, call.reverse, call.documents)
                if chunk.rate is None:
                    across = operands.decays.across[batch, head, index]
                else:
                    across = jnp.exp2(chunk.rate * TILE)
                # Loaded and computed while keys are awaited.
                enter, leave = chunk.enter() * call.read, chunk.leave() * call.write
                pairs = chunk.pairs() * call.pair
                plgpu.barrier_wait(shared.keys_ready.at[slot])

                def products(z, o):
                    for h in range(nk):
                        plgpu.wgmma(z, shared.q.at[slot, h], shared.k.at[slot, h].T)
                    for h in range(nk):
                        plgpu.wgmma(o, shared.q.at[slot, h], state.at[h])
                    return z[...], o[...]

                z, o = pl.run_scoped(products, *[plgpu.ACC((TILE, TILE), jnp.float32)] * 2)
                plgpu.barrier_wait(shared.values_ready.at[slot])
                weighted = plgpu.load(v, layout=WGMMA).astype(jnp.float32)
                values[...] = (weighted * rows(leave)).astype(dtype)
                plgpu.commit_smem()
                z = (z * pairs).astype(dtype)
                o = o * rows(enter)
                S = tuple(x * across for x in S)

                def add(accs):
                    o, *S = accs
                    plgpu.wgmma(o, z, v)
                    for h in range(nk):
                        plgpu.wgmma(S[h], shared.k.at[slot, h].T, values)
                    plgpu.wgmma_wait(0)

                o, *S = pl.run_state(add)([plgpu.ACC.init(x) for x in (o, *S)])
                sums = None
                if summed:
                    x = plgpu.load(shared.x.at[slot, wg], layout=WGMMA).astype(jnp.float32)
                    sums = jnp.sum(o * x, axis=1)
                plgpu.barrier_arrive(shared.free.at[slot])
                # The output of the chunk before has left its buffer long ago.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                o_smem[...] = o.astype(dtype)
                if summed:
                    shared.sums[wg] = sums
                publish(state, S)
                plgpu.copy_smem_to_gmem(o_smem, piece(o_ref, batch, head, index * TILE, wg))
                if summed:
                    there = sums_ref.at[batch, head, wg, pl.ds(index * TILE, TILE)]
                    plgpu.copy_smem_to_gmem(shared.sums.at[wg], there)
                return tuple(S)

            S = lax.fori_loop(0, length, step, S)

            @pl.when(p == last_piece)
            def _():
                for h in range(nk):
                    store(block(exit_ref, batch, head, row=h, column=wg), S[h])

        def copy():
            def step(i, _):
                slot, index = lax.rem(i, stages), chunk_of(i)
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(shared.free.at[slot]))
                first = index * TILE
                for source, buffers, n, ready in (
                    (operands.q, shared.q, nk, shared.keys_ready),
                    (operands.k, shared.k, nk, shared.keys_ready),
                    (operands.v, shared.v, nv, shared.values_ready),
                    (operands.x, shared.x, nv if summed else 0, shared.values_ready),
                ):
                    for h in range(n):
                        plgpu.copy_gmem_to_smem(
                            piece(source, batch, head, first, h), buffers.at[slot, h], ready.at[slot]
                        )

            lax.fori_loop(0, length, step, None)

        share_out(wg, nv, multiply, copy)

    # Sums take less than a tile, but more than what `SHARED_MEMORY` leaves.
    held = nk * nv + 2 * nv + summed
    moving = 2 * nk + nv + nv * summed
    size = TILE * TILE * jnp.dtype(dtype).itemsize
    stages = min(4, (SHARED_MEMORY - held * size) // (moving * size))
    ring = functools.partial(plgpu.Barrier, num_barriers=stages)
    shared = Shared(
        q=tiles(stages, nk, dtype=dtype),
        k=tiles(stages, nk, dtype=dtype),
        v=tiles(stages, nv, dtype=dtype),
        x=tiles(stages, nv, dtype=dtype) if summed else None,
        state=tiles(nv, nk, dtype=dtype),
        values=tiles(nv, dtype=dtype),
        o=tiles(nv, dtype=dtype),
        sums=plgpu.SMEM((nv, TILE), jnp.float32) if summed else None,
        keys_ready=ring(num_arrivals=2 * nk),
        values_ready=ring(num_arrivals=nv + nv * summed),
        free=ring(num_arrivals=nv),
    )
    out = (
        jax.ShapeDtypeStruct(operands.v.shape, dtype),
        jax.ShapeDtypeStruct((B, K, Hk, Hv), jnp.float32),
        jax.ShapeDtypeStruct((B, K, nv, cut.chunks * TILE), jnp.float32) if summed else None,
    )
    return run(linear_attention_sweep, out, shared, cut.heads * cut.pieces, nv, operands)
