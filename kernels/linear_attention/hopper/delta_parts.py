"""What the kernels of the delta rule share: the numbers of a chunk's tokens, and barriers between warpgroups.

In a chunk of 64 tokens, with S the state that enters, g the running sum G of log-decays, D_ij = e^(G_i - G_j)
for j <= i, Gamma = e^G, Lambda = e^(G_C - G), L = KK^T D below the diagonal, and b = diag(beta):

    X = V - Gamma K S,      E = X - L b E = X + U b X,      U = -L (I + b L)^-1
    O = Gamma Q S + (QK^T D) b E,       S <- e^(G_C) S + (Lambda K)^T b E

E is what `V - S^T k` of each token is, `b E` what it writes: beta may be 0 and nothing is divided by it. U is
strictly lower, so what is rounded in E is the correction alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from blockjax.kernels.linear_attention.gates import Rows
from blockjax.kernels.linear_attention.hopper import TILE
from blockjax.kernels.linear_attention.hopper.parts import COLUMN, LOG2_E, ROW, WGMMA, load
from blockjax.kernels.linear_attention.spec import Inputs
from jax import lax

COARSE, FINE, BETA, ENTER, LEAVE = range(5)
"""Rows of `numbers`; the first two are G in two parts, see `running_sums`."""

COLUMNS = 5
"""The first three rows follow again from here: loads of one row in two layouts would become one, which has
no layout."""

NUMBERS = 8
"""Rows."""


def numbers(inputs: Inputs) -> jax.Array:
    """[B, K, chunks, 8, 64] float32, of each token and head."""
    rows = Rows.of(inputs, pl.cdiv(inputs.k.shape[1], TILE), TILE)
    named = [rows.coarse, rows.fine, rows.beta, rows.enter, rows.leave]
    return jnp.stack(jnp.broadcast_arrays(*named, *named[:3]), axis=3)


def ring(stages: int) -> pl.MemoryRef:
    """Shared memory for the numbers of as many chunks: read from there, they are not waited for."""
    return plgpu.SMEM((stages, NUMBERS, TILE), jnp.float32)


class Chunk(NamedTuple):
    """The numbers of one chunk inside a kernel, [8, 64] in shared memory."""

    numbers: Any

    def row(self, which: int):
        """[64], a number for each row of a tile."""
        return load(self.numbers.at[which], ROW)

    def column(self, which: int):
        """A tile with that number in each column."""
        return lax.broadcast_in_dim(load(self.numbers.at[COLUMNS + which], COLUMN), (TILE, TILE), [1])

    def across(self):
        """What is left of a state after the chunk."""
        return self.numbers[ENTER, TILE - 1]

    def decays(self, transposed: bool = False):
        """D, or with the tokens that read along columns its transpose."""
        exponent = sum(tile(self.row(x)) - self.column(x) for x in (COARSE, FINE)) * LOG2_E
        row, column = places()
        visible = row <= column if transposed else column <= row
        exponent = -exponent if transposed else exponent
        return jnp.where(visible, jnp.exp2(jnp.where(visible, exponent, 0.0)), 0.0)


def tile(x):
    """A vector over the rows of a tile, as a tile."""
    return lax.broadcast_in_dim(x, (TILE, TILE), [0])


def places():
    """Row and column of each entry of a tile."""
    return (plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), i, layout=WGMMA) for i in range(2))


def off_diagonal(x):
    row, column = places()
    return jnp.where(row == column, 0.0, x)


def products(*pairs):
    """Independent sums of products `a @ b`, each of a list of pairs; tiles in float32, awaited together."""

    def multiply(*accs):
        for acc, terms in zip(accs, pairs, strict=True):
            for a, b in terms:
                plgpu.wgmma(acc, a, b)
        return tuple(acc[...] for acc in accs)

    # Without a barrier what uses them may be moved before the wait.
    accs = [plgpu.ACC((TILE, TILE), jnp.float32) for _ in pairs]
    return lax.optimization_barrier(pl.run_scoped(multiply, *accs))


def added(tiles, pairs: Callable):
    """`products` that are added to tiles; `pairs` makes the lists, so that no index comes from outside."""

    def multiply(accs):
        for acc, terms in zip(accs, pairs(), strict=True):
            for a, b in terms:
                plgpu.wgmma(acc, a, b)
        plgpu.wgmma_wait(0)

    return lax.optimization_barrier(tuple(pl.run_state(multiply)([plgpu.ACC.init(x) for x in tiles])))


def split(ref, x) -> None:
    """Stores a tile as the sum of as many of bfloat16 as `ref` has."""
    for part in range(ref.shape[0] - 1):
        high = cut_off(x)
        ref.at[part][...] = high.astype(jnp.bfloat16)
        x -= high
    ref.at[ref.shape[0] - 1][...] = x.astype(jnp.bfloat16)
    plgpu.commit_smem()


def cut_off(x):
    """The first bits of each number, those that bfloat16 can hold, as float32."""
    bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(1 << 16))
    return lax.bitcast_convert_type(bits, jnp.float32)


def ask_again():
    """The warpgroup, for use inside a loop over chunks.

    With what is known before the loop the compiler makes all addresses there, more than registers can keep.
    """
    return lax.axis_index("wg")


def meet(barrier) -> None:
    """All warpgroups that multiply wait for each other."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)
