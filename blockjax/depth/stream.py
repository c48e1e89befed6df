"""The residual stream during one pass through the decoder.

A sublayer reads its input from the stream and adds its output to `partial`, the running sum of its
depth block. What it reads from *completed* blocks needs no output of its own block, so all sublayers of
a block ask for it together when the block starts (`reads`), and `combine` adds the running sum: the
two phases of Attention Residuals, arXiv:2603.15031, sec. 4. `combine` is pure, so sublayers can run
in a scan whose carry is `partial` alone.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blockjax import partials
from blockjax.depth.mix import Mix, mix, source_logits
from blockjax.depth.residual import Residual


class DepthQueries(nnx.Module):
    """The learned part of a residual rule.

    Queries start at zero: every source weighs the same, and what a norm makes of their mean is what it
    makes of their sum, so the model starts as the pre-norm one. Under `delta` a gate of zero does it.

    Attributes:
      query: [readers, M] float32.
      gate: [readers] float32 under `delta`.
    """

    def __init__(self, residual: Residual, width: int):
        self.query = nnx.Param(jnp.zeros((residual.readers, width), jnp.float32), axes=("reader", "gain"))
        gated = residual.rule == "delta"
        self.gate = nnx.Param(jnp.zeros(residual.readers, jnp.float32), axes=("reader",)) if gated else None


class Reads(NamedTuple):
    """What R sublayers read of the completed blocks; every leaf has R first."""

    completed: Mix
    query: jax.Array
    gate: jax.Array | None
    first: jax.Array  # bool: nothing of the own block is there yet


class Stream:
    """One pass: `read` and `write` in turn for sublayers 0, 1, ..., then `output`.

    Args:
      residual: the rule.
      depth: its parameters; None under `prenorm`.
      x: embedding, [B, T, M].
      eps: of the norm of keys.
      record: keep the weights of every reader.

    Attributes:
      partial: what the sublayers of the present depth block wrote; under `prenorm` everything so far.
      weights: with `record`, (first reader, weights [R, sources, B, T] float32) in order. Sources are the
        embedding, the completed blocks and, under `attn_res`, the running sum of the own block.
    """

    def __init__(
        self,
        residual: Residual,
        depth: DepthQueries | None,
        x: jax.Array,
        *,
        eps: float,
        record: bool = False,
    ):
        self.residual, self.eps = residual, eps
        self.record = record and residual.readers > 0
        self._query = None if depth is None else depth.query[...]
        self._gate = None if depth is None or depth.gate is None else depth.gate[...]
        self._sources = [x]
        self._base = x  # under `delta`, the stream at the start of the block
        self._reads: tuple[int, Reads] | None = None
        self.partial = x if residual.rule == "prenorm" else jnp.zeros_like(x)
        self.weights: list[tuple[int, jax.Array]] = []

    def reads(self, start: int, stop: int) -> Reads | None:
        """What sublayers start .. stop - 1 of one depth block read of completed blocks."""
        if self.residual.rule == "prenorm":
            return None
        if self.residual.starts(start):
            if start:
                self._complete()
            end = self.residual.end(start)
            query = self._query[start:end]
            gate = None if self._gate is None else self._gate[start:end]
            first = jnp.arange(start, end) == start
            self._reads = start, Reads(mix(self._sources, query, self.eps), query, gate, first)
        origin, block = self._reads
        return jax.tree.map(lambda leaf: leaf[start - origin : stop - origin], block)

    def combine(self, partial: jax.Array, reads: Reads | None) -> tuple[jax.Array, jax.Array | None]:
        """Input [B, T, M] of one sublayer, and with `record` its weights [sources, B, T].

        Args:
          partial: the running sum when the sublayer reads.
          reads: its row of what `reads` gave; no leading axis.
        """
        if self.residual.rule == "prenorm":
            return partial, None
        (o, lse, logits), query, gate, first = reads
        if self.residual.rule == "delta":
            h = self._base + partial + (gate * o).astype(partial.dtype)
            total = lse
        else:
            # An absent running sum is left out: as a source of zeros it would take weight.
            safe = jnp.where(first, 1, partial)
            own = jnp.where(first, -jnp.inf, source_logits(safe, query[None], self.eps)[0])
            h, total = partials.merge((o, lse), (partial, own))
            logits = (*logits, own)
        weights = jnp.exp(jnp.stack(logits) - total) if self.record else None
        return h.astype(partial.dtype), weights

    def read(self, sublayer: int) -> jax.Array:
        """Input [B, T, M] of the next sublayer."""
        reads = jax.tree.map(lambda leaf: leaf[0], self.reads(sublayer, sublayer + 1))
        h, weights = self.combine(self.partial, reads)
        self.note(sublayer, None if weights is None else weights[None])
        return h

    def write(self, output: jax.Array) -> None:
        """Adds a sublayer's output [B, T, M]."""
        self.partial = self.partial + output

    def note(self, first: int, weights: jax.Array | None) -> None:
        """Keeps the weights [R, sources, B, T] of the readers from `first` on."""
        if weights is not None:
            self.weights.append((first, weights))

    def output(self) -> jax.Array:
        """What the output head reads, [B, T, M]; ends the pass."""
        if self.residual.rule == "prenorm":
            return self.partial
        self._complete()
        if self.residual.rule == "delta":
            return self._base
        head = mix(self._sources, self._query[-1:], self.eps)
        if self.record:
            self.note(self.residual.sublayers, jnp.exp(jnp.stack(head.logits, 1) - head.lse[:, None]))
        return head.o[0]

    def _complete(self) -> None:
        self._sources.append(self.partial)
        self._base = self._base + self.partial
        self.partial = jnp.zeros_like(self.partial)


def weight_table(weights: list[tuple[int, jax.Array]], residual: Residual) -> jax.Array:
    """Weights of all readers over all sources, [readers, sources, B, T]; NaN where a source is not there.

    Column 0 is the embedding, column 1 + b depth block b; the running sum of a block is in its column.
    """
    table = []
    for first, w in sorted(weights, key=lambda pair: pair[0]):
        if residual.rule == "attn_res" and first < residual.sublayers:
            absent = residual.starts(np.arange(first, first + len(w)))
            w = w.at[np.flatnonzero(absent), -1].set(jnp.nan)
        missing = residual.blocks + 1 - w.shape[1]
        table.append(jnp.pad(w, ((0, 0), (0, missing), (0, 0), (0, 0)), constant_values=jnp.nan))
    return jnp.concatenate(table)
