"""Segments: runs of consecutive tokens of one document, found causally.

A mask made of segments may use the segment of a query only as far as the query could know it, so the
segment of token t depends on tokens up to t and no later one; text segmenters that look ahead leak the
future through the mask. Here the *evidence* for a new segment at t comes from the tokens before t, and
one decision, a step over a few numbers a sequence, serves both whole rows and cached decoding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from blockjax.errors import UsageError, nearest

BOUNDARIES = ("fixed", "delimiter", "adaptive")

ROUNDING = 1e-5
"""How far below its bound a similarity must lie, so that rounding decides nothing in repetitive text."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SegmentState:
    """Where each of B sequences stands after its last token; a pytree, such as the carry of a scan.

    Attributes:
      index: [B] int32, segment of the last token.
      length: [B] int32, tokens of that segment so far.
      count: [B] int32, similarities seen in the document ("adaptive").
      mean: [B] float32, their mean.
      m2: [B] float32, the sum of their squared distances from it.
      history: [B, h] int32, the last tokens, newest last; before the first token anything.
      position: [B] int32, tokens seen, which is the offset of the next one.
    """

    index: jax.Array
    length: jax.Array
    count: jax.Array
    mean: jax.Array
    m2: jax.Array
    history: jax.Array
    position: jax.Array


@dataclass(frozen=True)
class Boundaries:
    """Where segments end.

    "fixed" ends one after every `size` tokens. "delimiter" may end one after a delimiter. "adaptive"
    may start one at t when the topic turns before t (the gap similarity of Hearst 1997, "TextTiling",
    Computational Linguistics 23(1), made causal):

        c_t = cos(mean embedding of t-w .. t-1, mean embedding of t-2w .. t-w-1) < mu - k * sigma

    with the mean and population standard deviation of the earlier c of the document, two at least.
    What may end a segment does so only from max(1, size // 2) tokens on; 2 * size tokens end it anyway.

    Attributes:
      kind: a name in `BOUNDARIES`.
      size: typical tokens of a segment.
      delimiters: token ids after which a segment may end; the default is a newline as a byte.
      window: w, tokens on each side.
      threshold: k, in standard deviations.

    Raises:
      UsageError: a field out of range.
    """

    kind: str
    size: int
    delimiters: tuple[int, ...] = (10,)
    window: int = 8
    threshold: float = 1.0

    def __post_init__(self):
        if self.kind not in BOUNDARIES:
            raise UsageError(f"Unknown kind of boundaries {self.kind!r}.{nearest(self.kind, BOUNDARIES)}")
        if self.size < 1:
            raise UsageError(f"A segment of size={self.size} tokens is empty; give 1 or more.")
        if self.window < 1:
            raise UsageError(f"Topics are compared over window={self.window} tokens a side; give 1 or more.")
        if not math.isfinite(self.threshold):
            raise UsageError(
                f"threshold={self.threshold} standard deviations is no bound; give a finite number, or "
                "kind='fixed' for segments that do not depend on the text."
            )
        if self.kind == "delimiter" and not self.delimiters:
            raise UsageError(
                "kind='delimiter' with delimiters=() would never see one; name the token ids after which "
                "a segment may end, such as (10,), a newline as a byte, or use kind='fixed'."
            )

    @property
    def limits(self) -> tuple[int, int]:
        """Fewest and most tokens of a segment; the last one of a document may be shorter."""
        return (self.size,) * 2 if self.kind == "fixed" else (max(1, self.size // 2), 2 * self.size)

    def segments(self, tokens: jax.Array, positions: jax.Array, table: jax.Array | None) -> jax.Array:
        """The segment of every token, counted from 0 in each document.

        A row that begins inside a document (its first position is above 0) begins with segment 0: there
        is nothing before it to know. Padding may repeat position 0.

        Args:
          tokens: [B, T] int32.
          positions: [B, T] int32, offset of each token in its document.
          table: [V, M] embedding, any float dtype; read by "adaptive" only, without gradient.

        Returns:
          [B, T] int32.
        """
        B, T = tokens.shape
        return self._walk(tokens, positions, jnp.full(B, T), table)[1]

    def prompt(
        self, tokens: jax.Array, lengths: jax.Array, table: jax.Array | None
    ) -> tuple[jax.Array, SegmentState]:
        """The segments of right-padded prompts, and the state after each prompt's own last token.

        Args:
          tokens: [B, T] int32, one document a row, from its first token.
          lengths: [B] int32, from 1 to T.
          table: as in `segments`.

        Returns:
          `(index [B, T] int32, SegmentState)`; padding repeats the last index of its prompt.
        """
        B, T = tokens.shape
        lengths = lengths.astype(jnp.int32)
        run, index = self._walk(tokens, jnp.broadcast_to(jnp.arange(T), (B, T)), lengths, table)
        columns = lengths[:, None] + jnp.arange(self._reach)
        history = jnp.take_along_axis(self._after_nothing(tokens), columns, axis=1)
        return index, SegmentState(*run, history=history, position=lengths)

    def step(
        self, state: SegmentState, token: jax.Array, table: jax.Array | None
    ) -> tuple[jax.Array, SegmentState]:
        """The segment of the next token [B] of every sequence, [B] int32, and the state after it."""
        past = state.position
        value, valid = (x[:, 0] for x in self._evidence(state.history, past[:, None], table))
        run = (state.index, state.length, state.count, state.mean, state.m2)
        run = self._advance(run, past == 0, value, valid)
        history = jnp.concatenate([state.history[:, 1:], token[:, None].astype(jnp.int32)], axis=1)
        return run[0], SegmentState(*run, history=history, position=past + 1)

    @property
    def _reach(self) -> int:
        """How many tokens back the evidence looks."""
        return 2 * self.window if self.kind == "adaptive" else 1

    def _after_nothing(self, tokens):
        return jnp.pad(tokens.astype(jnp.int32), ((0, 0), (self._reach, 0)))

    def _walk(self, tokens, positions, lengths, table):
        """`run`, as in `_advance`, after the first `lengths` [B] tokens, and the index [B, T]."""
        B, T = tokens.shape
        past = jnp.minimum(positions, jnp.arange(T))  # never before the row's first token
        value, valid = self._evidence(self._after_nothing(tokens[:, :-1]), past, table)
        live = jnp.arange(T) < lengths[:, None]

        def body(run, x):
            live, *x = x
            run = tuple(jnp.where(live, *both) for both in zip(self._advance(run, *x), run, strict=True))
            return run, run[0]

        run = (*(jnp.zeros(B, jnp.int32),) * 3, *(jnp.zeros(B, jnp.float32),) * 2)
        run, index = lax.scan(body, run, (live.T, (past == 0).T, value.T, valid.T), unroll=8)
        return run, index.T

    def _evidence(self, tokens, past, table):
        """What speaks for a new segment at each of T tokens: `(value float32, valid bool)`, [B, T].

        Args:
          tokens: [B, reach + T - 1], the `reach` tokens before the first of the T, and all but the last.
          past: [B, T], how many tokens before each are of its document and row.
          table: [V, M].
        """
        value, T, w = jnp.zeros(past.shape, jnp.float32), past.shape[1], self.window
        if self.kind == "fixed":
            return value, past < 0
        if self.kind == "delimiter":
            return value, jnp.isin(tokens, jnp.array(self.delimiters))
        embedded = lax.stop_gradient(table)[tokens].astype(jnp.float32)
        sums = sum(embedded[:, j : j + T + w] for j in range(w))
        norm = jnp.sqrt(jnp.sum(sums**2, axis=-1, keepdims=True))
        unit = sums / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)
        return jnp.sum(unit[:, w:] * unit[:, :T], axis=-1), past >= 2 * w

    def _advance(self, run, start, value, valid):
        """The decision: `run` = (index, length, count, mean, m2) before a token -> after it, all [B]."""
        index, length, count, mean, m2 = (jnp.where(start, 0, x) for x in run)
        least, most = self.limits
        candidate = valid
        if self.kind == "adaptive":
            sigma = jnp.sqrt(m2 / jnp.maximum(count, 1))
            candidate &= (count >= 2) & (value < mean - self.threshold * sigma - ROUNDING)
            count += valid
            delta = jnp.where(valid, value - mean, 0)  # Welford
            mean += delta / jnp.maximum(count, 1)
            m2 += delta * (value - mean)
        split = (length >= most) | (candidate & (length >= least))  # never at a start, where length is 0
        return index + split, jnp.where(split, 0, length) + 1, count, mean, m2
