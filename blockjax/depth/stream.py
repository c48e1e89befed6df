"""The residual stream during one pass through the decoder.

A sublayer reads its normalised input from the stream and adds its output to `partial`. What it reads of
*completed* depth blocks needs no output of its own block, so all sublayers of a block ask for it together
when the block starts, and `join` merges the running sum: the two phases of Attention Residuals,
arXiv:2603.15031, sec. 4. `join` is pure, so sublayers can run in a scan whose carry is `partial` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from blockjax.depth.residual import Residual
from blockjax.kernels.depth_mix import Join, Read, sharded_depth_join, sharded_depth_read
from blockjax.parallel.mesh import cut

Norm = Callable[..., jax.Array]  # an RMSNorm: (h, eps=...) -> [B, T, M], with its `gain` and `eps`


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
    """What R sublayers of one depth block read of the completed ones; every leaf has R first.

    Attributes:
      o: [R, B, T, M], or R arrays [B, T, M].
      lse: [R, B, T, heads] float32.
      query: [R, M] float32.
      gate: [R] float32 under `delta`.
    """

    o: jax.Array | tuple[jax.Array, ...]
    lse: jax.Array
    query: jax.Array
    gate: jax.Array | None

    def row(self, *index: int) -> Reads:
        """Of one sublayer: no axis R."""
        gate = None if self.gate is None else self.gate[index]
        o = self.o[index[0]] if isinstance(self.o, tuple) else self.o[index]
        return Reads(o, self.lse[index], self.query[index], gate)


class Record(NamedTuple):
    """The logits of one depth block's readers, or of the output head.

    Attributes:
      read: of the completed blocks.
      own: [readers, B, T, heads] arrays in order: of the running sum, -inf where there is none. Empty where
        readers do not see it.
    """

    read: Read
    own: list[jax.Array]


class Stream:
    """One pass: for sublayers 0, 1, ... `row`, `join`, the sublayer itself and `write`, then `output`.

    Args:
      residual: the rule.
      depth: its parameters; None under `prenorm`.
      x: embedding, [B, T, M].
      eps: of the norm of keys.
      record: keep the logits of every reader, for `weights`.

    Attributes:
      partial: what sublayers read beside completed blocks: the running sum of the depth block, None as long
        as there is none; under `prenorm` and `delta` the sum of everything so far.
      scanned: the depth blocks of which some layers run in a scan, which takes what they read as one array.
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
        self.residual, self.record = residual, record
        # Every device mixes the tokens that it holds.
        tokens = cut("batch", x.shape[0]), cut("time", x.shape[1])
        self._options = dict(heads=residual.heads, eps=eps, tokens=tokens)
        self._query = None if depth is None else depth.query[...]
        self._gate = None if depth is None or depth.gate is None else depth.gate[...]
        self._sources = [x]
        self._start = x  # under `delta`, of the block
        self._block = 0
        self._reads: Reads | None = None
        self._records: list[Record] = []
        self.partial = None if residual.rule == "attn_res" else x
        self.scanned: frozenset[int] = frozenset()

    def begin(self, sublayer: int) -> None:
        """Completes the depth block before, if this sublayer is in another."""
        block = sublayer // self.residual.size
        if block != self._block:
            self._complete()
            self._block, self._reads = block, None

    def covers(self, start: int, stop: int) -> bool:
        """Whether sublayers start .. stop - 1 are a whole depth block; under `prenorm` there are none."""
        if self.residual.rule == "prenorm":
            return False
        return self.residual.starts(start) and self.residual.end(start) == stop

    def reads(self, start: int, stop: int) -> Reads | None:
        """What sublayers start .. stop - 1 of the present depth block read of completed ones, stacked."""
        if self.residual.rule == "prenorm":
            return None
        if self.covers(start, stop):
            return self._read(start, stop, unstacked=False)
        begin = start % self.residual.size
        return jax.tree.map(lambda leaf: leaf[begin : begin + stop - start], self._shared(start))

    def row(self, sublayer: int) -> Reads | None:
        """What one sublayer reads of completed blocks."""
        if self.residual.rule == "prenorm":
            return None
        self.begin(sublayer)
        return self._shared(sublayer).row(sublayer % self.residual.size)

    def join(
        self,
        partial: jax.Array | None,
        reads: Reads | None,
        norm: Norm,
        first: bool | jax.Array = False,
    ) -> Join:
        """The running sum again, a sublayer's normalised input [B, T, M], and the logit of the sum, if any.

        Args:
          partial: as the attribute. What comes next adds to the one that is returned, so that the backward
            pass adds both gradients of it at once.
          reads: the sublayer's row.
          norm: of the sublayer. What it is given is a mean of sources; it is computed as that of their sum.
          first: whether the depth block starts with it: the running sum is left out, for as a source of
            zeros it would take weight.
        """
        rule = self.residual.rule
        if rule != "attn_res":
            h = partial if rule == "prenorm" else partial + (reads.gate * reads.o).astype(partial.dtype)
            return Join(partial, norm(h), None)
        n = len(self._sources)
        if first is True:
            own = jnp.full_like(reads.lse, -jnp.inf)
            return Join(partial, norm(reads.o, eps=norm.eps / n**2), own)
        # In a scan the first one has a running sum of zeros, of logit 0 whatever the query. Beside an lse of
        # log n its weight is 1 / (n + 1) at every token: h is n / (n + 1) times the mean, and the norm with
        # its epsilon over (n + 1)^2 makes of that what it makes of the mean with its epsilon over n^2.
        lse = reads.lse if first is False else jnp.where(first, math.log(n), reads.lse)
        join = sharded_depth_join(
            partial, None, reads.o, lse, reads.query, norm_gain=norm.gain[...],
            norm_eps=norm.eps / (n + 1) ** 2, **self._options,
        )  # fmt: skip
        return join if first is False else join._replace(logit=jnp.where(first, -jnp.inf, join.logit))

    def write(self, partial: jax.Array | None, output: jax.Array) -> None:
        """Adds a sublayer's output [B, T, M] to the running sum that `join` returned."""
        self.partial = output if partial is None else partial + output

    def carry(self) -> jax.Array:
        """`partial` where a scan starts: zeros where there is none."""
        return jnp.zeros_like(self._sources[0]) if self.partial is None else self.partial

    def note(self, own: jax.Array | None) -> None:
        """Keeps the logits of the running sum, [readers, B, T, heads], of the readers that come next."""
        if self.record and own is not None:
            self._records[-1].own.append(own)

    def output(self, norm: Norm) -> jax.Array:
        """What the output head reads, normalised, [B, T, M]; ends the pass."""
        if self.residual.rule != "attn_res":
            return norm(self.partial)
        self._sources.append(self.partial)
        reader = self.residual.sublayers
        (h,) = self._read(reader, reader + 1, unstacked=True).o
        return norm(h, eps=norm.eps / len(self._sources) ** 2)

    def weights(self) -> jax.Array | None:
        """With `record`, the weights of all readers, [readers, sources, B, T, heads] float32.

        Source 0 is the embedding, source 1 + b depth block b, and for its own readers its running sum. NaN
        where a source is not there. None under `prenorm`.
        """
        table = []
        for (_, lse, logits), own in self._records:
            if own:
                own = jnp.concatenate(own)
                lse, logits = jnp.logaddexp(lse, own), jnp.concatenate([logits, own[None]])
            weights = jnp.where(logits == -jnp.inf, jnp.nan, jnp.exp(logits - lse)).swapaxes(0, 1)
            missing = self.residual.blocks + 1 - weights.shape[1]
            table.append(jnp.pad(weights, [(0, 0), (0, missing)] + [(0, 0)] * 3, constant_values=jnp.nan))
        return jnp.concatenate(table) if table else None

    def _shared(self, sublayer: int) -> Reads:
        """What all sublayers of a depth block read; asked for once."""
        if self._reads is None:
            start, stop = self._block * self.residual.size, self.residual.end(sublayer)
            self._reads = self._read(start, stop, unstacked=self._block not in self.scanned)
        return self._reads

    def _read(self, start: int, stop: int, *, unstacked: bool) -> Reads:
        query = self._query[start:stop]
        gate = None if self._gate is None else self._gate[start:stop]
        read = sharded_depth_read(self._sources, query, unstacked=unstacked, **self._options)
        if self.record:
            self._records.append(Record(read._replace(o=None), []))
        return Reads(read.o, read.lse, query, gate)

    def _complete(self) -> None:
        if self.residual.rule == "delta":
            # The change of the stream over the block; not from the source before, which is a change itself.
            self._sources.append(self.partial - self._start)
            self._start = self.partial
        else:
            self._sources.append(self.partial)
            self.partial = None
