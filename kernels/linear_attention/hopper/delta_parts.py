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

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from blockjax.kernels.linear_attention.gates import Rows
from blockjax.kernels.linear_attention.hopper import TILE
from blockjax.kernels.linear_attention.hopper.parts import COLUMN, LOG2_E, ROW, WGMMA
from blockjax.kernels.linear_attention.spec import Inputs
from jax import lax

COARSE, FINE, ENTER, LEAVE, BETA = range(5)
"""Rows of `Tokens`; the first two are G in two parts, see `running_sums`."""


ROWS = 5 * TILE * 4
"""Their bytes."""


class Tokens(NamedTuple):
    """In global memory; references inside a kernel.

    Attributes:
      rows: [B, K, chunks, 5, 64] float32.
      columns: the same array again. Loads of one place in two layouts would become one, which has no layout.
      across: [B, K, chunks], what is left of a state after a chunk.
    """

    rows: Any
    columns: Any
    across: Any

    @staticmethod
    def of(inputs: Inputs) -> "Tokens":
        rows = Rows.of(inputs, pl.cdiv(inputs.k.shape[1], TILE), TILE)
        stacked = (rows.coarse, rows.fine, rows.enter, rows.leave, rows.beta)
        stacked = jnp.stack(jnp.broadcast_arrays(*stacked), axis=3)
        across = jnp.broadcast_to(rows.enter[..., -1], stacked.shape[:3])
        return Tokens(stacked, stacked, across)

    def chunk(self, batch, head, index) -> "Chunk":
        at = batch, head, index
        return Chunk(self.rows.at[at], self.columns.at[at], self.across[at])

    def copy(self, batch, head, index, shared: "Chunk", slot, barrier) -> None:
        """Into a slot of the ring `shared`: read from there, the loads are not waited for. Two arrivals."""
        for source, ring in ((self.rows, shared.rows), (self.columns, shared.columns)):
            plgpu.copy_gmem_to_smem(source.at[batch, head, index], ring.at[slot], barrier)


class Chunk(NamedTuple):
    """Of one chunk inside a kernel: `rows` and `columns` [5, 64], and `across`."""

    rows: Any
    columns: Any
    across: Any

    def row(self, which: int):
        """[64], a number for each row of a tile."""
        return _load(self.rows, which, ROW)

    def column(self, which: int):
        """A tile with that number in each column."""
        return lax.broadcast_in_dim(_load(self.columns, which, COLUMN), (TILE, TILE), [1])

    def decays(self, transposed: bool = False):
        """D, or with the tokens that read along columns its transpose."""
        exponent = sum(tile(self.row(x)) - self.column(x) for x in (COARSE, FINE)) * LOG2_E
        row, column = places()
        visible = row <= column if transposed else column <= row
        exponent = -exponent if transposed else exponent
        return jnp.where(visible, jnp.exp2(jnp.where(visible, exponent, 0.0)), 0.0)


def ring(stages: int) -> Chunk:
    """Shared memory for the rows of as many chunks."""
    rows, columns = (plgpu.SMEM((stages, 5, TILE), jnp.float32) for _ in range(2))
    return Chunk(rows, columns, None)


def _load(ref, which: int, layout):
    return plgpu.load(ref.at[which], layout=layout, optimized=False)


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


def meet(barrier) -> None:
    """All warpgroups that multiply wait for each other."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)
