"""How a sequence is cut so that its pieces fill the chip, and the states that enter them."""

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from blockjax.kernels.linear_attention.hopper import TILE
from blockjax.kernels.linear_attention.hopper.parts import LOG2_E, UNSEEN, Cut, Decays
from blockjax.kernels.linear_attention.hopper.summaries import Operands, summaries
from blockjax.kernels.linear_attention.hopper.sweep import Sweep
from blockjax.kernels.linear_attention.spec import Inputs


def cut(heads: int, K: int, chunks: int) -> Cut:
    """`sweep` moves four tiles a chunk and `summaries` two."""
    return Cut.best(heads, K, chunks, lambda pieces, turns: 4 * turns(pieces) + 2 * turns(pieces - 1))


@dataclass(frozen=True)
class Plan:
    """A cut and what decays do along it.

    Attributes:
      rate: [K], or None.
      logs: [B, K, chunks], log2 of what is left of a state after each chunk, if there is no rate.
      tokens: as in `Decays`.
      documents: whether there may be several.
    """

    cut: Cut
    B: int
    documents: bool
    rate: Any
    logs: Any
    tokens: Any

    @staticmethod
    def of(inputs: Inputs) -> "Plan":
        B, T, K, _ = inputs.k.shape
        parts = cut(B * K, K, pl.cdiv(T, TILE))
        log_decay, documents = inputs.log_decay, inputs.documents
        log_decay = jnp.zeros((K,), jnp.float32) if log_decay is None else log_decay * LOG2_E
        if log_decay.ndim == 1 and documents is None and T % TILE == 0:
            return Plan(parts, B, False, log_decay, None, None)
        return Plan(parts, B, documents is not None, None, *_by_tokens(log_decay, documents, B, T, K))

    def initial(self, inputs: Inputs) -> jax.Array:
        (B, _, K, Hk), Hv = inputs.k.shape, inputs.v.shape[-1]
        return jnp.zeros((B, K, Hk, Hv), jnp.float32) if inputs.state is None else inputs.state

    def decays(self, reverse: bool) -> Decays:
        if self.rate is not None:
            return Decays(rate=self.rate)
        outside = self._join(jnp.exp2(self._outside(reverse)))
        return Decays(None, self.tokens, self.tokens, jnp.exp2(self.logs), outside)

    def added(self, k, v, pieces: int, reverse: bool = False, write: float = 1.0) -> jax.Array:
        """[B, K, pieces, Hk, Hv] float32, what pieces add to the state: those that a walk visits first."""
        call = Sweep(self.cut, reverse, self.documents, write=write)
        return summaries(call, pieces, Operands(k, v, self.decays(reverse), self._counts(reverse)))

    def entries(self, k, v, state, reverse: bool = False, write: float = 1.0, added=None) -> jax.Array:
        """[B, K, pieces, Hk, Hv] float32, the states that enter the pieces in the direction of the walk.

        `state` enters the first of them; `added` is that of all pieces, where it is known.
        """
        others, chain = self.cut.pieces - 1, [state]
        if others and added is None:
            added = self.added(k, v, others, reverse, write)
        for across, N in itertools.islice(self._walked(added, reverse), others):
            chain.append(across * chain[-1] + N)
        return jnp.stack(chain[::-1] if reverse else chain, axis=2)

    def total(self, added, reverse: bool = False) -> jax.Array:
        """[B, K, Hk, Hv] float32, the state after all pieces of a walk that begins with zeros."""
        state = 0.0
        for across, N in self._walked(added, reverse):
            state = across * state + N
        return state

    def left(self) -> jax.Array:
        """[B, K, 1, 1], what is left of a state after all pieces."""
        across = jnp.prod(self._across(), axis=-1)
        return jnp.broadcast_to(across, (self.B, across.shape[1]))[..., None, None]

    def _walked(self, added, reverse: bool):
        """(what is left of the state, what is added) of each piece, in the order of the walk."""
        n, across = added.shape[2], self._across()
        across = across[..., -n:] if reverse else across[..., :n]
        for p in reversed(range(n)) if reverse else range(n):
            yield across[..., p, None, None], added[:, :, p]

    def decay_gradient(self, sums, entries, last, back) -> jax.Array:
        """[B, T, K] from the [B, K, tiles, tokens] sums over channels of q dq - k dk.

        That of a token sums over all that follow; between pieces it is the product of the state and its
        gradient, so that rounding adds up inside pieces only.
        """
        B, K, _, _ = sums.shape
        sums = self._split(sums.sum(2).reshape(B, K, -1, TILE))
        after = jnp.concatenate([entries[:, :, 1:], last[:, :, None]], axis=2)
        across = jnp.sum(after * back, axis=(-1, -2))[..., None]
        flat = sums.reshape(*sums.shape[:3], -1)
        flat = jnp.flip(jnp.cumsum(jnp.flip(flat, -1), -1), -1) + across
        return flat.reshape(B, K, -1).swapaxes(1, 2)

    def _split(self, x, fill=0):
        """[B, K, chunks, ...] to [B, K, pieces, length, ...]."""
        missing = self.cut.pieces * self.cut.length - self.cut.chunks
        x = jnp.pad(x, [(0, 0), (0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 3), constant_values=fill)
        return x.reshape(*x.shape[:2], self.cut.pieces, self.cut.length, *x.shape[3:])

    def _join(self, x):
        return x.reshape(*x.shape[:2], -1)[..., : self.cut.chunks]

    def _outside(self, reverse: bool) -> jax.Array:
        """[B, K, pieces, length], log2 of what is left of a chunk's state where the walk leaves."""
        logs = self._split(self.logs)
        logs = logs if reverse else jnp.flip(logs, -1)
        before = jnp.cumsum(jnp.pad(logs, ((0, 0),) * 3 + ((1, 0),))[..., :-1], -1)
        return before if reverse else jnp.flip(before, -1)

    def _counts(self, reverse: bool) -> jax.Array:
        """[B, K, pieces], how many chunks are not hidden by what follows."""
        lengths = jnp.asarray(self.cut.lengths())
        if self.rate is not None:
            steps = jnp.where(self.rate < 0, UNSEEN / (TILE * self.rate), self.cut.length)
            steps = jnp.minimum(steps, self.cut.length).astype(jnp.int32) + 1
            counts = jnp.minimum(steps[:, None], lengths)
            return jnp.broadcast_to(counts, (self.B, *counts.shape))
        exists = jnp.arange(self.cut.length) < lengths[:, None]
        return jnp.sum((self._outside(reverse) >= UNSEEN) & exists, -1, dtype=jnp.int32)

    def _across(self) -> jax.Array:
        """[B | 1, K, pieces], what is left of a state after each piece."""
        if self.rate is None:
            return jnp.exp2(self._split(self.logs).sum(-1))
        return jnp.exp2(TILE * self.rate[:, None] * jnp.asarray(self.cut.lengths()))[None]


def _by_tokens(log_decay, documents, B: int, T: int, K: int):
    """`logs` and `tokens` of a plan."""
    chunks = pl.cdiv(T, TILE)
    log_decay = jnp.broadcast_to(log_decay, (B, T, K)).swapaxes(1, 2)
    log_decay = jnp.pad(log_decay, ((0, 0), (0, 0), (0, chunks * TILE - T))).reshape(B, K, chunks, TILE)
    prefix = jnp.cumsum(log_decay, -1)
    # Suffixes are sums of their own: a difference of prefixes would lose what large decays hide.
    after = jnp.pad(log_decay, ((0, 0),) * 3 + ((0, 1),))[..., 1:]
    suffix = jnp.flip(jnp.cumsum(jnp.flip(after, -1), -1), -1)
    enter, leave, logs = jnp.exp2(prefix), jnp.exp2(suffix), prefix[..., -1]
    ids = jnp.zeros((B, 1, chunks, TILE), jnp.float32)
    if documents is not None:
        ids = jnp.pad(documents, ((0, 0), (0, chunks * TILE - T)), mode="edge").reshape(B, 1, chunks, TILE)
        last = ids[..., -1:]
        before = jnp.pad(last, ((0, 0), (0, 0), (1, 0), (0, 0)))[..., :-1, :]
        enter, leave = jnp.where(ids == before, enter, 0), jnp.where(ids == last, leave, 0)
        logs = jnp.where((last == before)[..., 0], logs, -jnp.inf)
        ids = (ids - ids[..., :1]).astype(jnp.float32)
    tokens = jnp.concatenate([enter, leave, prefix, jnp.broadcast_to(ids, enter.shape)], axis=-1)
    return logs, tokens
