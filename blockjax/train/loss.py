"""Cross-entropy over the vocabulary, a chunk of tokens at a time."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from blockjax.parallel.mesh import parts

# Float32 logits that exist at a time on a device: 2^27 are 512 MiB. Each chunk reads and writes the gradient
# of the whole head, so few large ones are faster.
CHUNK_LOGITS = 1 << 27


class LossSums(NamedTuple):
    """Sums over target tokens, float32 scalars; divide once, by the global count."""

    nats: jax.Array
    squared_lse: jax.Array
    tokens: jax.Array


def chunk_size(rows: int, tokens: int, vocab: int) -> int:
    """The largest divisor of `tokens` whose logits, of `rows` sequences, stay within `CHUNK_LOGITS`."""
    most = max(1, CHUNK_LOGITS // (rows * vocab))
    return next(d for d in range(min(tokens, most), 0, -1) if tokens % d == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, z_loss: float = 0.0
) -> tuple[jax.Array, LossSums]:
    """Summed cross-entropy of softmax(hidden @ head), with z_loss * log(Z)^2 (arXiv:2204.02311, sec. 5).

    Logits [B, T, V] never exist in float32: each chunk of tokens is projected, reduced and, if a gradient is
    asked for, multiplied back at once, in the dtype of `hidden`.

    Args:
      hidden: [B, T, M].
      head: [M, V] float32, cast to the dtype of `hidden`.
      targets: [B, T] int32; a negative target has no loss.
      z_loss: weight of the squares of log(Z).

    Returns:
      The loss, which alone is differentiable, and the sums that it is made of.
    """
    return _reduce(hidden, head, targets, z_loss)[0]


def token_nats(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target) of each token, [B, T] float32, 0 where there is no target; as `cross_entropy` otherwise.

    For evaluation: its gradient would keep all logits.
    """
    weight, cut = head.astype(hidden.dtype), _Cut(hidden.shape, head.shape[1])

    def chunk(_, inputs):
        h, target = inputs
        _, lse, _, picked = _score(h, weight, target)
        return None, jnp.where(target >= 0, lse - picked, 0.0)

    return cut.join(jax.lax.scan(chunk, None, (cut(hidden), cut(targets)))[1])


class _Cut:
    """Cuts [B, T, ...] into [chunks, B, P, size, ...]: every device takes a chunk of its own tokens."""

    def __init__(self, shape: tuple[int, ...], vocab: int):
        self.B, self.T = shape[:2]
        self.P = math.gcd(self.T, parts("time"))
        self.size = chunk_size(max(1, self.B // parts("batch")), self.T // self.P, vocab)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(self.B, self.P, self.T // self.P // self.size, self.size, *x.shape[2:])
        return jnp.moveaxis(x, 2, 0)

    def join(self, x: jax.Array) -> jax.Array:
        """The inverse."""
        return jnp.moveaxis(x, 0, 2).reshape(self.B, self.T, *x.shape[4:])


def _score(h, weight, target):
    """Float32 logits, the log of the sum of their exponentials, where the target is, and its logit."""
    logits = jnp.einsum("BPTM,MV->BPTV", h, weight, preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum rather than a gather: it stays local when V is sharded.
    hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 3) == target[..., None]
    return logits, lse, hit, jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)


def _forward(hidden, head, targets, z_loss):
    return _reduce(hidden, head, targets, z_loss, gradients=True)


def _backward(z_loss, gradients, cotangents):
    scale = cotangents[0]
    dhidden, dhead = gradients
    return (dhidden * scale).astype(dhidden.dtype), dhead * scale, None


cross_entropy.defvjp(_forward, _backward)


def _reduce(hidden, head, targets, z_loss, gradients=False):
    """What `cross_entropy` returns, and the gradients of the loss by hidden and head, or None."""
    weight, cut = head.astype(hidden.dtype), _Cut(hidden.shape, head.shape[1])

    def chunk(carry, inputs):
        sums, dhead = carry
        h, target = inputs
        logits, lse, hit, picked = _score(h, weight, target)
        counts = target >= 0
        new = LossSums(
            jnp.sum(jnp.where(counts, lse - picked, 0.0)),
            jnp.sum(jnp.where(counts, lse * lse, 0.0)),
            jnp.sum(counts, dtype=jnp.float32),
        )
        dh = None
        if gradients:
            by_lse = jnp.where(counts, 1 + 2 * z_loss * lse, 0.0)
            dlogits = jnp.exp(logits - lse[..., None]) * by_lse[..., None] - (hit & counts[..., None])
            dlogits = dlogits.astype(h.dtype)
            dhead += jnp.einsum("BPTM,BPTV->MV", h, dlogits, preferred_element_type=jnp.float32)
            dh = jnp.einsum("BPTV,MV->BPTM", dlogits, weight)
        return (jax.tree.map(jnp.add, sums, new), dhead), dh

    zero = LossSums(*(jnp.zeros((), jnp.float32) for _ in LossSums._fields))
    start = zero, jnp.zeros(head.shape, jnp.float32) if gradients else None
    (sums, dhead), dhidden = jax.lax.scan(chunk, start, (cut(hidden), cut(targets)))
    if gradients:
        dhidden = cut.join(dhidden)
    return (sums.nats + z_loss * sums.squared_lse, sums), (dhidden, dhead)
