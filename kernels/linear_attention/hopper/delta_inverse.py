"""The triangular solve of each chunk of the delta rule, for all chunks at once.

A CTA makes U of `delta_parts.py` for one chunk of one head. Doubling: from Z = (I + L b)^-1 of diagonal
blocks of s tokens that of blocks of 2 s, with L_s the part of L in their lower left quarters,

    Z <- Z - Z L_s b Z

without powers of L, which may overflow. Products of bfloat16 leave errors of some 1e-2 where keys are alike.
U = -Z L solves (I + L b) U = -L, so one step of Newton squares them:

    U <- U - Z (L + U + L b U)

with L and b U as sums of two bfloat16, and the result is as good as its rounding.
"""

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from blockjax.kernels.linear_attention.hopper import TILE
from blockjax.kernels.linear_attention.hopper.delta_parts import (
    BETA,
    Chunk,
    off_diagonal,
    places,
    products,
    ring,
    split,
    tile,
)
from blockjax.kernels.linear_attention.hopper.parts import WGMMA, piece, tiles
from blockjax.kernels.mosaic_gpu import run
from jax import lax


class Operands(NamedTuple):
    """k [B, T, K, Hk] and the numbers of its tokens, see `delta_parts.py`."""

    k: Any
    numbers: Any


class Shared(NamedTuple):
    """Shared memory: keys, the first tile later U; numbers; L and a factor, each in two parts; a barrier."""

    k: Any
    numbers: Any
    L: Any
    factor: Any
    ready: Any


@jax.jit
def inverse(operands: Operands):
    """U [B, K, chunks, 64, 64] in k's dtype."""
    (B, _, K, Hk), dtype = operands.k.shape, operands.k.dtype
    chunks, nk = operands.numbers.shape[2], Hk // TILE

    def linear_attention_delta_inverse(operands, out_ref, shared):
        cta = lax.axis_index("cta")
        head, at = lax.rem(cta, K), lax.div(cta, K)
        index, batch = lax.rem(at, chunks), lax.div(at, chunks)
        keys, numbers = [shared.k.at[h] for h in range(nk)], shared.numbers.at[0]
        for h, key in enumerate(keys):
            here = piece(operands.k, batch, head, index * TILE, h)
            plgpu.copy_gmem_to_smem(here, key, shared.ready)
        plgpu.copy_gmem_to_smem(operands.numbers.at[batch, head, index], numbers, shared.ready)
        plgpu.barrier_wait(shared.ready)
        keys[0][...] = solved(keys, Chunk(numbers), shared).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(keys[0], out_ref.at[batch, head, index])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    shared = Shared(
        k=tiles(nk, dtype=dtype),
        numbers=ring(1),
        L=tiles(2, dtype=jnp.bfloat16),
        factor=tiles(2, dtype=jnp.bfloat16),
        ready=plgpu.Barrier(num_arrivals=nk + 1),
    )
    out = jax.ShapeDtypeStruct((B, K, chunks, TILE, TILE), dtype)
    # `run` adds the warpgroup that would copy; here one does everything.
    return run(linear_attention_delta_inverse, out, shared, B * K * chunks, 0, operands)


def solved(keys: list, chunk: Chunk, shared: Shared):
    """U, a tile in float32."""
    (scores,) = products([(key, key.T) for key in keys])
    L = off_diagonal(scores * chunk.decays())
    split(shared.L, L)
    row, column = places()
    apart, beta = row ^ column, tile(chunk.row(BETA))
    high, low = shared.L.at[0], shared.L.at[1]
    first, other = shared.factor.at[pl.ds(0, 1)], shared.factor.at[pl.ds(1, 1)]

    def load(ref):
        return plgpu.load(ref, layout=WGMMA)

    def below(s: int):
        """L in the lower left quarters of blocks of 2 s tokens."""
        x = load(high)
        return jnp.where((apart >= s) & (apart < 2 * s), x, jnp.zeros_like(x))

    Z = jnp.where(apart == 1, -L * chunk.column(BETA), 0.0)
    Z, s = jnp.where(apart == 0, 1.0, Z), 2
    while s < TILE:
        split(first, beta * Z)
        (right,) = products([(below(s), first.at[0])])
        split(other, right)
        Z -= products([(Z.astype(jnp.bfloat16), other.at[0])])[0]
        s *= 2
    Z = Z.astype(jnp.bfloat16)
    U = -products([(Z, high)])[0]
    split(shared.factor, beta * U)
    (seen,) = products([(high, first.at[0]), (high, other.at[0]), (low, first.at[0])])
    split(first, load(high).astype(jnp.float32) + load(low).astype(jnp.float32) + U + seen)
    return U - products([(Z, first.at[0])])[0]
