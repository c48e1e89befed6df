"""The delta rule's walk over chunks, forward in time: outputs, or the affine map that a piece is.

A CTA walks one piece of one head; warpgroup w keeps the columns w of the state in registers. Formulas:
`delta_parts.py`. A chunk is three groups of products, each waiting for the one before: K S, then U X, then
what is written and read.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from blockjax.kernels.linear_attention.hopper import SHARED_MEMORY, TILE
from blockjax.kernels.linear_attention.hopper.delta_parts import (
    BETA,
    ENTER,
    LEAVE,
    Chunk,
    added,
    ask_again,
    places,
    products,
    ring,
    tile,
)
from blockjax.kernels.linear_attention.hopper.parts import (
    WGMMA,
    Cut,
    block,
    load,
    piece,
    publish,
    store,
    tiles,
)
from blockjax.kernels.mosaic_gpu import run, share_out
from jax import lax

MARK = 4
"""Chunks; rounding of the gradients of log-decays adds up over so many."""


class Operands(NamedTuple):
    """Arrays; references inside a kernel.

    Attributes:
      k: [B, T, K, Hk]; v: [B, T, K, Hv]; solve: U [B, K, chunks, 64, 64]; numbers: see `delta_parts.py`.
      q: like k; entries: [B, K, pieces, Hk, Hv] float32, the states that enter the pieces. Not for maps.
    """

    k: Any
    v: Any
    solve: Any
    numbers: Any
    q: Any = None
    entries: Any = None


class Shared(NamedTuple):
    """Shared memory: rings, then of each warpgroup the state and three buffers; barriers."""

    q: Any
    k: Any
    v: Any
    solve: Any
    numbers: Any
    state: Any
    values: Any
    errors: Any
    writes: Any
    ready: Any
    free: Any


@dataclass(frozen=True)
class Walk:
    """The static side of a call: how the sequence is cut, and the scale of the outputs."""

    cut: Cut
    scale: float = 1.0

    @property
    def marks(self) -> int:
        """How often a walk also stores the state inside a piece: after every `MARK` chunks but the last."""
        return (self.cut.length - 1) // MARK

    def marked(self, v, Hk: int) -> jax.ShapeDtypeStruct:
        """Of the states at marks."""
        B, _, K, Hv = v.shape
        return jax.ShapeDtypeStruct((B, K, self.cut.pieces, max(1, self.marks), Hk, Hv), v.dtype)


@functools.partial(jax.jit, static_argnames=("call",))
def outputs(call: Walk, operands: Operands):
    """`o` and E like v, the state [B, K, Hk, Hv] float32 after the last piece, and those at marks.

    The latter are in v's dtype. See `Walk.marks`; where a shorter last piece has none, anything.
    """
    (B, _, K, Hk), Hv = operands.k.shape, operands.v.shape[-1]
    out = (
        jax.ShapeDtypeStruct(operands.v.shape, operands.v.dtype),
        jax.ShapeDtypeStruct(operands.v.shape, operands.v.dtype),
        jax.ShapeDtypeStruct((B, K, Hk, Hv), jnp.float32),
        call.marked(operands.v, Hk),
    )
    return _walk(call, operands, out, Hv // TILE)


@functools.partial(jax.jit, static_argnames=("call",))
def maps(call: Walk, operands: Operands):
    """[B, K, pieces, Hk, Hv + Hk] float32: N and M of `S <- M S + N`, which each piece is."""
    (B, _, K, Hk), Hv = operands.k.shape, operands.v.shape[-1]
    out = jax.ShapeDtypeStruct((B, K, call.cut.pieces, Hk, Hv + Hk), jnp.float32)
    return _walk(call, operands, (out,), (Hv + Hk) // TILE)[0]


def _walk(call: Walk, operands: Operands, out, columns: int):
    """Of `columns` tiles of the state; those after the values are of the identity, for maps.

    More than two are shared out among CTAs side by side, so that they find in the cache what the first loads.
    """
    cut, mapping = call.cut, operands.entries is None
    (_, _, K, Hk), Hv, dtype = operands.k.shape, operands.v.shape[-1], operands.v.dtype
    nk, nv = Hk // TILE, Hv // TILE
    wgs = 2 - columns % 2
    groups = columns // wgs

    def linear_attention_delta_forward(operands, *refs):
        *out, shared = refs
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        at, group = lax.div(cta, groups), lax.rem(cta, groups)
        p, at = lax.div(at, cut.heads), lax.rem(at, cut.heads)
        batch, head = lax.div(at, K), lax.rem(at, K)
        length = jnp.minimum(cut.length, cut.chunks - p * cut.length)
        stages = shared.k.shape[0]

        def multiply():
            def entry(h):
                if not mapping:
                    return load(block(operands.entries, batch, head, p, row=h, column=wg))
                row, lane = places()
                return jnp.where(row + h * TILE == lane + (group * wgs + wg - nv) * TILE, 1.0, 0.0)

            S = tuple(entry(h) for h in range(nk))
            publish(shared.state.at[wg], S)

            def step(i, S):
                wg = ask_again()
                column = group * wgs + wg
                values, writes, state = (x.at[wg] for x in (shared.values, shared.writes, shared.state))
                errors = None if mapping else shared.errors.at[wg]
                slot, index = lax.rem(i, stages), p * cut.length + i
                solve = shared.solve.at[slot]

                def keys():
                    return [shared.k.at[slot, h] for h in range(nk)]

                plgpu.barrier_wait(shared.ready.at[slot])
                chunk = Chunk(shared.numbers.at[slot])
                enter, beta, across = chunk.row(ENTER), chunk.row(BETA), chunk.across()
                reads = [(key, state.at[h]) for h, key in enumerate(keys())]
                if mapping:
                    (seen,) = products(reads)
                    v = plgpu.load(shared.v.at[slot, lax.rem(column, nv)], layout=WGMMA).astype(jnp.float32)
                    x = v * jnp.where(column < nv, 1.0, 0.0) - seen * tile(enter)
                else:
                    queries = [shared.q.at[slot, h] for h in range(nk)]
                    seen, scores, o = products(
                        reads,
                        [(queries[h], key.T) for h, key in enumerate(keys())],
                        [(queries[h], state.at[h]) for h in range(nk)],
                    )
                    v = plgpu.load(shared.v.at[slot, wg], layout=WGMMA).astype(jnp.float32)
                    x = v - seen * tile(enter)
                    # What was stored from these buffers in the chunk before has left them long ago.
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                values[...] = (x * tile(beta)).astype(dtype)
                plgpu.commit_smem()
                (e,) = added([x], lambda: [[(solve, values)]])
                writes[...] = (e * tile(chunk.row(LEAVE) * beta)).astype(dtype)
                S = [s * across for s in S]

                def updates():
                    return [[(key.T, writes)] for key in keys()]

                if mapping:
                    plgpu.commit_smem()
                    S = added(S, updates)
                    plgpu.barrier_arrive(shared.free.at[slot])
                    publish(state, S)
                    return tuple(S)
                errors[...] = e.astype(dtype)
                plgpu.commit_smem()
                pairs = (scores * chunk.decays() * chunk.column(BETA) * call.scale).astype(dtype)
                o = o * tile(enter * call.scale)
                o, *S = added([o, *S], lambda: [[(pairs, errors)], *updates()])
                plgpu.barrier_arrive(shared.free.at[slot])
                values[...] = o.astype(dtype)
                publish(state, S)
                for source, there in ((values, out[0]), (errors, out[1])):
                    plgpu.copy_smem_to_gmem(source, piece(there, batch, head, index * TILE, wg))

                @pl.when((lax.rem(i + 1, MARK) == 0) & (i + 1 < length))
                def _():
                    mark = lax.div(i + 1, MARK) - 1
                    for h in range(nk):
                        there = block(out[3], batch, head, p, mark, row=h, column=wg)
                        plgpu.copy_smem_to_gmem(state.at[h], there)

                return tuple(S)

            S = lax.fori_loop(0, length, step, S)
            for h in range(nk):
                if mapping:
                    store(block(out[0], batch, head, p, row=h, column=group * wgs + wg), S[h])
                else:
                    there = block(out[2], batch, head, row=h, column=wg)
                    pl.when(p == cut.pieces - 1)(lambda there=there, s=S[h]: store(there, s))

        def copy():
            def step(i, _):
                slot, index = lax.rem(i, stages), p * cut.length + i
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(shared.free.at[slot]))
                ready = shared.ready.at[slot]
                copies = [(operands.k, shared.k, nk), (operands.v, shared.v, nv)]
                if not mapping:
                    copies.append((operands.q, shared.q, nk))
                for source, buffers, n in copies:
                    for h in range(n):
                        here = piece(source, batch, head, index * TILE, h)
                        plgpu.copy_gmem_to_smem(here, buffers.at[slot, h], ready)
                plgpu.copy_gmem_to_smem(operands.solve.at[batch, head, index], shared.solve.at[slot], ready)
                plgpu.copy_gmem_to_smem(
                    operands.numbers.at[batch, head, index], shared.numbers.at[slot], ready
                )

            lax.fori_loop(0, length, step, None)

        share_out(wg, wgs, multiply, copy)

    moving = nk + nv + 1 + (0 if mapping else nk)
    held = wgs * (nk + (2 if mapping else 3))
    size = TILE * TILE * jnp.dtype(dtype).itemsize
    # A tile for the numbers of up to four stages.
    stages = min(4, (SHARED_MEMORY // size - 1 - held) // moving)
    shared = Shared(
        q=None if mapping else tiles(stages, nk, dtype=dtype),
        k=tiles(stages, nk, dtype=dtype),
        v=tiles(stages, nv, dtype=dtype),
        solve=tiles(stages, dtype=dtype),
        numbers=ring(stages),
        state=tiles(wgs, nk, dtype=dtype),
        values=tiles(wgs, dtype=dtype),
        errors=None if mapping else tiles(wgs, dtype=dtype),
        writes=tiles(wgs, dtype=dtype),
        ready=plgpu.Barrier(num_arrivals=moving + 1, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
    )
    return run(linear_attention_delta_forward, out, shared, groups * cut.heads * cut.pieces, wgs, operands)
