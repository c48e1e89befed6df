"""What both Hopper kernels share: tiles, how a sequence is cut into pieces, and what decays do inside them.

Everything in shared memory is a tile of 64 tokens or channels by 64 channels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from blockjax.kernels.linear_attention.hopper import TILE
from jax import lax

LOG2_E = math.log2(math.e)

WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)
COLUMN = WGMMA.reduce(0)

UNSEEN = -126.0
"""Powers of 2 below this one are flushed to 0."""

MULTIPROCESSORS = 132

MOST_PIECES = 32
"""The chain over pieces is written out."""

LEAST_CHUNKS = 4
"""Of a piece: its state is loaded and stored for them."""

ENTER, LEAVE, SUM, DOCUMENT = range(4)
"""Rows of `Decays.tokens`."""


def tiles(*shape: int, dtype) -> pl.MemoryRef:
    """Shared memory of `[*shape, 64, 64]` in the layout that `wgmma` and the copy engine agree on."""
    transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM((*shape, TILE, TILE), dtype, transforms=transforms)


@dataclass(frozen=True)
class Cut:
    """How a sequence of `chunks` chunks of 64 tokens is cut: into pieces of `length`, the last maybe less.

    `heads` are those of the whole batch.
    """

    heads: int
    K: int
    chunks: int
    length: int

    @property
    def pieces(self) -> int:
        return pl.cdiv(self.chunks, self.length)

    @staticmethod
    def best(heads: int, K: int, chunks: int, work: Callable[[int, Callable[[int], int]], int]) -> "Cut":
        """The one whose `work(pieces, turns)` a chunk is least, the longest pieces of those.

        `turns` says how often a multiprocessor is used by a kernel with so many pieces.
        """

        def cost(length: int) -> int:
            turns = lambda pieces: pl.cdiv(heads * pieces, MULTIPROCESSORS)  # noqa: E731
            return length * work(pl.cdiv(chunks, length), turns)

        most = max(1, min(MOST_PIECES, chunks // LEAST_CHUNKS))
        lengths = sorted({pl.cdiv(chunks, pieces) for pieces in range(1, most + 1)}, reverse=True)
        return Cut(heads, K, chunks, min(lengths, key=cost))

    def lengths(self) -> list[int]:
        """In chunks, of each piece."""
        return [min(self.length, self.chunks - p * self.length) for p in range(self.pieces)]


class Decays(NamedTuple):
    """What decays do, in global memory; references inside a kernel. One of the two forms:

    Attributes:
      rate: [K], log2 of a decay that is the same for every token, where there are no documents.
      tokens: [B, K, chunks, 4 * 64], four rows: what a token sees of the state that enters its chunk, what
        leaves of its write, the running sum of log2-decays, and its document.
      columns: the same array again. Loads of one place in two layouts would become one, which has no layout.
      across: [B, K, chunks], what is left of a state that enters a chunk.
      outside: [B, K, chunks], what is left at the end of a piece of the state at the end of a chunk in it, or
        if reversed, at its start.
    """

    rate: Any = None
    tokens: Any = None
    columns: Any = None
    across: Any = None
    outside: Any = None


@dataclass(frozen=True)
class Chunk:
    """The decays of one chunk inside a kernel; the direction is that of the walk.

    `tokens` and `columns` [4 * 64] are None where the decay is `rate`.
    """

    reverse: bool
    documents: bool
    rate: Any
    tokens: Any
    columns: Any

    @staticmethod
    def of(decays: Decays, batch, head, index, reverse: bool, documents: bool) -> "Chunk":
        if decays.tokens is None:
            return Chunk(reverse, documents, decays.rate[head], None, None)
        tokens, columns = (x.at[batch, head, index] for x in (decays.tokens, decays.columns))
        return Chunk(reverse, documents, None, tokens, columns)

    def enter(self):
        """[64], what each token sees of the state that the walk brings."""
        return self._leave() if self.reverse else self._enter()

    def leave(self):
        """[64], what is left of each token's write when the walk leaves."""
        return self._enter() if self.reverse else self._leave()

    def pairs(self):
        """[64, 64], the weight of each pair; rows are the tokens that read."""
        row, column = (plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), i, layout=WGMMA) for i in range(2))
        visible = row <= column if self.reverse else column <= row
        if self.tokens is None:
            distance = column - row if self.reverse else row - column
            exponent = self.rate * distance.astype(jnp.float32)
        else:
            row, column = self._plane(SUM)
            exponent = column - row if self.reverse else row - column
            if self.documents:
                row, column = self._plane(DOCUMENT)
                visible &= row == column
        return jnp.where(visible, jnp.exp2(jnp.where(visible, exponent, 0.0)), 0.0)

    def _enter(self):
        return self._row(ENTER) if self.tokens is not None else self._decayed(lambda lane: lane + 1)

    def _leave(self):
        return self._row(LEAVE) if self.tokens is not None else self._decayed(lambda lane: TILE - 1 - lane)

    def _decayed(self, steps: Callable):
        lane = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=ROW)
        return jnp.exp2(self.rate * steps(lane).astype(jnp.float32))

    def _row(self, which: int):
        return load(self._numbers(self.tokens, which), ROW)

    def _plane(self, which: int):
        """Of the tokens along rows, and along columns."""
        column = load(self._numbers(self.columns, which), COLUMN)
        return rows(self._row(which)), lax.broadcast_in_dim(column, (TILE, TILE), [1])

    @staticmethod
    def _numbers(ref, which: int):
        return ref.at[pl.ds(which * TILE, TILE)]


def rows(x):
    """A vector over the rows of a tile, as a tile."""
    return lax.broadcast_in_dim(x, (TILE, TILE), [0])


def piece(ref, batch, head, first, channel):
    """64 tokens and 64 channels of `[B, T, K, H]`."""
    return ref.at[batch, pl.ds(first, TILE), head, pl.ds(channel * TILE, TILE)]


def block(ref, *where, row, column):
    """64 by 64 entries of states `[..., Hk, Hv]`."""
    return ref.at[*where, pl.ds(row * TILE, TILE), pl.ds(column * TILE, TILE)]


def publish(ref, tiles) -> None:
    """Stores tiles in shared memory, in the dtype of the products that read them there."""
    for h, x in enumerate(tiles):
        ref.at[h][...] = x.astype(ref.dtype)
    plgpu.commit_smem()


def load(ref, layout=WGMMA):
    """From global memory, or numbers from shared memory: what does not lie there as `tiles` do."""
    return plgpu.load(ref, layout=layout, optimized=False)


def store(ref, tile) -> None:
    """To global memory."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, tile, optimized=False)
    else:
        ref[...] = tile
