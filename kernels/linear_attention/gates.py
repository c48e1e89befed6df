"""Decays per token as kernels take them: rows of numbers per head and chunk, with documents in them.

A document start is a decay of e^-256, which is 0 in float32: kernels need not know of documents.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from blockjax.kernels.linear_attention.spec import Inputs, form, running_sums

START = -256.0
LONGEST = 256
"""Tokens of a chunk, at most: with a start at each of them, sums of multiples of 2^-8 are exact."""


class Rows(NamedTuple):
    """[B, K, chunks, C] float32, of log-decays g and their running sum G in a chunk.

    Attributes:
      coarse, fine: G in two parts, see `running_sums`.
      enter: e^G, how much of the state that enters a token sees; the last is what leaves of it.
      leave: e^(G_C - G), how much leaves of what a token writes.
      beta: of the delta rule, else None.
    """

    coarse: jax.Array
    fine: jax.Array
    enter: jax.Array
    leave: jax.Array
    beta: jax.Array | None

    @staticmethod
    def of(inputs: Inputs, chunks: int, C: int) -> "Rows":
        """Tokens are padded with no decay."""
        B, T, K = inputs.k.shape[:3]
        g = jnp.zeros(()) if inputs.log_decay is None else inputs.log_decay
        g = with_starts(inputs, jnp.broadcast_to(g, (B, T, K)))
        g, beta = (None if x is None else cut(x, chunks, C) for x in (g, inputs.beta))
        after = jnp.pad(g, ((0, 0), (0, 0), (0, 0), (0, 1)))[..., 1:]
        leave = jnp.exp(jax.lax.cumsum(after, 3, reverse=True))
        return Rows(*running_sums(g, axis=-1), jnp.exp(jnp.cumsum(g, -1)), leave, beta)


def cut(x: jax.Array, chunks: int, C: int) -> jax.Array:
    """[B, T, K] as [B, K, chunks, C], padded with zeros."""
    B, T, K = x.shape
    x = jnp.pad(x, ((0, 0), (0, chunks * C - T), (0, 0)))
    return x.reshape(B, chunks, C, K).transpose(0, 3, 1, 2)


def whole(x: jax.Array, T: int) -> jax.Array:
    """The inverse of `cut`."""
    return x.reshape(*x.shape[:2], -1)[..., :T].swapaxes(1, 2)


def starts(documents: jax.Array) -> jax.Array:
    """[B, T] bool: whether a token starts a document."""
    return documents != jnp.pad(documents, ((0, 0), (1, 0)))[:, :-1]


def with_starts(inputs: Inputs, log_decay: jax.Array, start: float = START) -> jax.Array:
    """Log-decays [B, T, K] or [B, T, K, Hk], or gradients of them; `start` where a document starts."""
    if inputs.documents is None:
        return log_decay
    at = starts(inputs.documents)
    return jnp.where(at.reshape(*at.shape, *(1,) * (log_decay.ndim - 2)), start, log_decay)


def gradient(inputs: Inputs, sums: jax.Array) -> jax.Array | None:
    """That of log_decay, for the gradients of G, [B, K, chunks, C]."""
    if inputs.log_decay is None:
        return None
    dlog = whole(jax.lax.cumsum(sums, 3, reverse=True), inputs.k.shape[1])
    dlog = with_starts(inputs, dlog, 0.0)
    return dlog.sum((0, 1)) if form(inputs.log_decay) == "head" else dlog
