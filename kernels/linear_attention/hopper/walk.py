"""The walk over chunks whose decays are one a channel: the serial part of `xla/chunks.py`, in one kernel.

Of a chunk of 64 tokens a step needs no scores and no decays of tokens: XLA makes of all chunks at once what a
step does to the state S [Hk, Hv] of a head, in the form of `chunks.Step`:

    S <- across S + added + write^T (seen - read S)

with `across` a number a row of S. A warpgroup keeps 64 columns of S in float32 registers and publishes them
in shared memory in the dtype of the products, while the next chunks are being copied.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from blockjax.kernels.linear_attention.hopper import SHARED_MEMORY, TILE
from blockjax.kernels.linear_attention.hopper.delta_parts import added, products, tile
from blockjax.kernels.linear_attention.hopper.parts import (
    MULTIPROCESSORS,
    ROW,
    WGMMA,
    block,
    load,
    store,
    tiles,
)
from blockjax.kernels.linear_attention.xla.chunks import Step
from blockjax.kernels.mosaic_gpu import run, share_out
from jax import lax


class Operands(NamedTuple):
    """Arrays; references inside a kernel. Heads are those of the whole batch.

    Attributes:
      state: [heads, Hk, Hv] float32, the one that the walk begins with.
      across: [chunks, heads, Hk / 64, 64] float32.
      added: [chunks, heads, Hk, Hv], or None for 0.
      write, read: [chunks, heads, 64, Hk]; seen: [chunks, heads, 64, Hv]. All None for no such term.
    """

    state: Any
    across: Any
    added: Any
    write: Any
    seen: Any
    read: Any


class Shared(NamedTuple):
    """Shared memory: rings, then of each warpgroup the state and what is written to it; barriers."""

    across: Any
    added: Any
    write: Any
    seen: Any
    read: Any
    state: Any
    values: Any
    ready: Any
    free: Any


def walk(steps: Step, state: jax.Array, reverse: bool, dtype) -> tuple[jax.Array, jax.Array]:
    """Does as `chunks.walk` for steps [n, B, K, 1, ...] of 64 tokens; products have operands of `dtype`.

    `added` is rounded to it too. States are float32.
    """
    n, heads = steps.across.shape[0], state.shape[0] * state.shape[1]

    def flat(x):
        return None if x is None else x.astype(dtype).reshape(n, heads, *x.shape[4:])

    across = steps.across.reshape(n, heads, -1, TILE)
    operands = Operands(state.reshape(heads, *state.shape[3:]), across, *map(flat, steps[1:]))
    last, entries = states(reverse, operands)
    return last.reshape(state.shape), entries.reshape(n, *state.shape)


@functools.partial(jax.jit, static_argnames=("reverse",))
def states(reverse: bool, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """The last state [heads, Hk, Hv] and those before each step [chunks, heads, Hk, Hv], float32."""
    (heads, Hk, Hv), chunks = operands.state.shape, operands.across.shape[0]
    nk, nv = Hk // TILE, Hv // TILE
    writing, adding = operands.write is not None, operands.added is not None
    # Columns of a head share what is copied only where there are too few multiprocessors for all.
    wgs = nv if heads * nv > MULTIPROCESSORS else 1

    def linear_attention_walk(operands, last_ref, entries_ref, shared):
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        group, head = lax.div(cta, heads), lax.rem(cta, heads)
        stages = shared.across.shape[0]

        def chunk_of(i):
            return chunks - 1 - i if reverse else i

        def multiply():
            column = group * wgs + wg

            def publish(S):
                if writing:
                    for h in range(nk):
                        shared.state.at[wg, h][...] = S[h].astype(dtype)
                    plgpu.commit_smem()

            S = tuple(load(block(operands.state, head, row=h, column=column)) for h in range(nk))
            publish(S)

            def step(i, S):
                slot, index = lax.rem(i, stages), chunk_of(i)
                # Stored and awaited by nobody.
                for h in range(nk):
                    store(block(entries_ref, index, head, row=h, column=column), S[h])
                plgpu.barrier_wait(shared.ready.at[slot])
                if writing:
                    values = shared.values.at[wg]
                    (seen,) = products([(shared.read.at[slot, h], shared.state.at[wg, h]) for h in range(nk)])
                    x = plgpu.load(shared.seen.at[slot, wg], layout=WGMMA).astype(jnp.float32) - seen
                    values[...] = x.astype(dtype)
                    plgpu.commit_smem()

                def decayed(h):
                    s = S[h] * tile(load(shared.across.at[slot, h], ROW))
                    if adding:
                        s += plgpu.load(shared.added.at[slot, wg, h], layout=WGMMA).astype(jnp.float32)
                    return s

                S = [decayed(h) for h in range(nk)]
                if writing:
                    S = added(S, lambda: [[(shared.write.at[slot, h].T, values)] for h in range(nk)])
                plgpu.barrier_arrive(shared.free.at[slot])
                publish(S)
                return tuple(S)

            S = lax.fori_loop(0, chunks, step, S)
            for h in range(nk):
                store(block(last_ref, head, row=h, column=column), S[h])

        def copy():
            def step(i, _):
                slot, index = lax.rem(i, stages), chunk_of(i)
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(shared.free.at[slot]))
                ready = shared.ready.at[slot]
                plgpu.copy_gmem_to_smem(operands.across.at[index, head], shared.across.at[slot], ready)

                def put(source, row, column, buffer):
                    here = block(source, index, head, row=row, column=column)
                    plgpu.copy_gmem_to_smem(here, buffer, ready)

                if writing:
                    for h in range(nk):
                        put(operands.read, 0, h, shared.read.at[slot, h])
                        put(operands.write, 0, h, shared.write.at[slot, h])
                    for c in range(wgs):
                        put(operands.seen, 0, group * wgs + c, shared.seen.at[slot, c])
                if adding:
                    for c in range(wgs):
                        for h in range(nk):
                            put(operands.added, h, group * wgs + c, shared.added.at[slot, c, h])

            lax.fori_loop(0, chunks, step, None)

        share_out(wg, wgs, multiply, copy)

    dtype = (operands.write if writing else operands.added).dtype
    moving = (2 * nk + wgs) * writing + wgs * nk * adding
    # The numbers across take less than one more tile.
    held = wgs * (nk + 1) * writing + 1
    stages = min(4, (SHARED_MEMORY // (TILE * TILE * dtype.itemsize) - held) // moving)
    shared = Shared(
        across=plgpu.SMEM((stages, nk, TILE), jnp.float32),
        added=tiles(stages, wgs, nk, dtype=dtype) if adding else None,
        write=tiles(stages, nk, dtype=dtype) if writing else None,
        seen=tiles(stages, wgs, dtype=dtype) if writing else None,
        read=tiles(stages, nk, dtype=dtype) if writing else None,
        state=tiles(wgs, nk, dtype=dtype) if writing else None,
        values=tiles(wgs, dtype=dtype) if writing else None,
        ready=plgpu.Barrier(num_arrivals=moving + 1, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
    )
    out = (
        jax.ShapeDtypeStruct((heads, Hk, Hv), jnp.float32),
        jax.ShapeDtypeStruct((chunks, heads, Hk, Hv), jnp.float32),
    )
    return run(linear_attention_walk, out, shared, heads * (nv // wgs), wgs, operands)
