"""The triangular solve of each chunk of the delta rule, for all chunks at once.

A warpgroup makes U of `delta_parts.py` for one chunk of one head. Doubling: from that of diagonal blocks of s
tokens that of blocks of 2 s, with L_s the part of L in their lower left quarters,

    U <- U - (I + U b) L_s (I + b U)

No powers of L, which may overflow. Each product is three of bfloat16, which is as good as 16 bits.
"""

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from blockjax.kernels.linear_attention.hopper import TILE
from blockjax.kernels.linear_attention.hopper.delta_parts import BETA, Tokens, places, products, tile
from blockjax.kernels.linear_attention.hopper.parts import piece, tiles
from blockjax.kernels.mosaic_gpu import run
from jax import lax

WARPGROUPS = 1
"""Of a CTA, each with a chunk of its own: more were slower on an H100."""


class Operands(NamedTuple):
    """k [B, T, K, Hk] and the numbers of its tokens."""

    k: Any
    tokens: Tokens


class Shared(NamedTuple):
    """Shared memory: the keys, factors and their products in two parts, the result; a barrier."""

    k: Any
    factor: Any
    product: Any
    out: Any
    ready: Any


@jax.jit
def inverse(operands: Operands):
    """U [B, K, chunks, 64, 64] in k's dtype."""
    (B, _, K, Hk), dtype = operands.k.shape, operands.k.dtype
    chunks, nk = operands.tokens.across.shape[2], Hk // TILE

    def linear_attention_delta_inverse(operands, out_ref, shared):
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        # The last CTA may have fewer chunks than warpgroups: some are made twice, alike.
        at = jnp.minimum(cta * WARPGROUPS + wg, B * K * chunks - 1)
        head, at = lax.rem(at, K), lax.div(at, K)
        index, batch = lax.rem(at, chunks), lax.div(at, chunks)
        shared = jax.tree.map(lambda x: x.at[wg], shared)
        for h in range(nk):
            here = piece(operands.k, batch, head, index * TILE, h)
            plgpu.copy_gmem_to_smem(here, shared.k.at[h], shared.ready)
        chunk = operands.tokens.chunk(batch, head, index)
        decays = chunk.decays()
        row_beta, column_beta = tile(chunk.row(BETA)), chunk.column(BETA)
        row, column = places()
        plgpu.barrier_wait(shared.ready)
        (scores,) = products([(shared.k.at[h], shared.k.at[h].T) for h in range(nk)])
        L = jnp.where(row == column, 0.0, scores * decays)
        apart = row ^ column
        identity = jnp.where(row == column, 1.0, 0.0)

        def below(s: int):
            """L in the lower left quarters of blocks of 2 s tokens."""
            return jnp.where((apart >= s) & (apart < 2 * s), L, 0.0)

        def publish(ref, x):
            for part, half in enumerate(halves(x)):
                ref.at[part][...] = half
            plgpu.commit_smem()

        def product(a, ref):
            high, low = halves(a)
            return products([(high, ref.at[0]), (high, ref.at[1]), (low, ref.at[0])])[0]

        U, s = -below(1), 2
        while s < TILE:
            publish(shared.factor, identity + row_beta * U)
            publish(shared.product, product(below(s), shared.factor))
            U -= product(identity + U * column_beta, shared.product)
            s *= 2
        shared.out[...] = U.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared.out, out_ref.at[batch, head, index])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    shared = Shared(
        k=tiles(WARPGROUPS, nk, dtype=dtype),
        factor=tiles(WARPGROUPS, 2, dtype=jnp.bfloat16),
        product=tiles(WARPGROUPS, 2, dtype=jnp.bfloat16),
        out=tiles(WARPGROUPS, dtype=dtype),
        ready=plgpu.Barrier(num_arrivals=nk, num_barriers=WARPGROUPS),
    )
    out = jax.ShapeDtypeStruct((B, K, chunks, TILE, TILE), dtype)
    # One of them is the one that would copy; here each does everything for its chunk.
    ctas = pl.cdiv(B * K * chunks, WARPGROUPS)
    return run(linear_attention_delta_inverse, out, shared, ctas, WARPGROUPS - 1, operands)


def halves(x):
    """Two bfloat16 whose sum is x, to 16 bits."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
