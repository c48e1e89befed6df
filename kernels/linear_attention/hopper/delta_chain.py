"""The states that enter the pieces of the delta rule, or their gradients, by the affine maps that pieces are.

A CTA makes some columns of one head's states, piece after piece; warpgroup h keeps the rows h in registers. A
product of float32 is six of bfloat16, of which three make one number. For eight pieces of 16 heads with
Hk = Hv = 128 that is 10 us of products in a row, and an H100 takes 44; XLA had two launches a piece.
"""

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from blockjax.kernels.linear_attention.hopper import TILE
from blockjax.kernels.linear_attention.hopper.delta_parts import added, ask_again, meet, split
from blockjax.kernels.linear_attention.hopper.parts import block, load, store, tiles
from blockjax.kernels.mosaic_gpu import run
from jax import lax

PARTS = 3
TERMS = [(a, b) for a in range(PARTS) for b in range(PARTS - a)]


class Operands(NamedTuple):
    """Arrays; references inside a kernel.

    Attributes:
      first: [B, K, Hk, Hv] float32, the state that enters the first piece, or the gradient of the last state.
      maps: as `delta_forward.maps` returns them.
      added: [B, K, pieces - 1, Hk, Hv], what each piece but the first adds to the gradient of the state that
        enters it; None for states.
    """

    first: Any
    maps: Any
    added: Any = None


class Shared(NamedTuple):
    """Shared memory: of each warpgroup its part of a map, and its rows of the state; a barrier."""

    maps: Any
    states: Any
    met: Any


@jax.jit
def chain(operands: Operands):
    """[B, K, pieces, Hk, Hv] float32: S that enter pieces, or R that enter them at their ends."""
    (B, K, Hk, Hv), pieces = operands.first.shape, operands.maps.shape[2]
    nk, nv, reverse = Hk // TILE, Hv // TILE, operands.added is not None

    def linear_attention_delta_chain(operands, out_ref, shared):
        h, cta = lax.axis_index("wg"), lax.axis_index("cta")
        w, at = lax.rem(cta, nv), lax.div(cta, nv)
        batch, head = lax.div(at, K), lax.rem(at, K)

        def here(ref, *where, row, column):
            return block(ref, batch, head, *where, row=row, column=column)

        def place(i):
            return pieces - 1 - i if reverse else i

        def piece(i, h):
            """Its map's tiles in the rows h of the result, and what it adds."""
            p, own = place(i), range(nk)
            if reverse:
                M = [load(here(operands.maps, p, row=x, column=nv + h)) for x in own]
                return M, load(here(operands.added, p - 1, row=h, column=w))
            M = [load(here(operands.maps, p, row=h, column=nv + x)) for x in own]
            return M, load(here(operands.maps, p, row=h, column=w))

        def put(i, h, S):
            store(here(out_ref, place(i), row=h, column=w), S)

        def step(i, carry):
            S, (M, N) = carry
            h = ask_again()
            for x in range(nk):
                split(shared.maps.at[h, x], M[x])
            split(shared.states.at[h], S)
            meet(shared.met)
            # Loaded while this one is multiplied.
            ahead = piece(jnp.minimum(i + 1, pieces - 2), h)

            def terms():
                for x in range(nk):
                    for a, b in TERMS:
                        M = shared.maps.at[h, x, a]
                        yield M.T if reverse else M, shared.states.at[x, b]

            (S,) = added([N], lambda: [list(terms())])
            # All have read these states.
            meet(shared.met)
            put(i + 1, h, S)
            return S, ahead

        S = load(here(operands.first, row=h, column=w))
        put(0, h, S)
        lax.fori_loop(0, pieces - 1, step, (S, piece(0, h)))

    shared = Shared(
        maps=tiles(nk, nk, PARTS, dtype=jnp.bfloat16),
        states=tiles(nk, PARTS, dtype=jnp.bfloat16),
        met=plgpu.Barrier(num_arrivals=nk),
    )
    out = jax.ShapeDtypeStruct((B, K, pieces, Hk, Hv), jnp.float32)
    # `run` adds the one that would copy; here there is nothing to it.
    return run(linear_attention_delta_chain, out, shared, B * K * nv, nk - 1, operands)
