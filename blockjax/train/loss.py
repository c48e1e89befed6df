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


def _forward(hidden, head, targets, z_loss):
    return _reduce(hidden, head, targets, z_loss, gradients=True)


def _backward(z_loss, gradients, cotangents):
    scale = cotangents[0]
    dhidden, dhead = gradients
    return (dhidden * scale).astype(dhidden.dtype), dhead * scale, None


cross_entropy.defvjp(_forward, _backward)


def _reduce(hidden, head, targets, z_loss, gradients=False):
    """What `cross_entropy` returns, and the gradients of the loss by hidden and head, or None."""
    B, T, M = hidden.shape
    # Every device takes a chunk of its own tokens at a time.
    P = math.gcd(T, parts("time"))
    size = chunk_size(max(1, B // parts("batch")), T // P, head.shape[1])
    weight = head.astype(hidden.dtype)

    def chunk(carry, inputs):
        sums, dhead = carry
        h, target = inputs
        logits = jnp.einsum("BPTM,MV->BPTV", h, weight, preferred_element_type=jnp.float32)
        lse = jax.nn.logsumexp(logits, axis=-1)
        # A masked sum rather than a gather: it stays local when V is sharded.
        hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 3) == target[..., None]
        picked = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
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

    def cut(x):
        """[chunks, B, P, size, ...]"""
        return jnp.moveaxis(x.reshape(B, P, T // P // size, size, *x.shape[2:]), 2, 0)

    zero = LossSums(*(jnp.zeros((), jnp.float32) for _ in LossSums._fields))
    start = zero, jnp.zeros(head.shape, jnp.float32) if gradients else None
    (sums, dhead), dhidden = jax.lax.scan(chunk, start, (cut(hidden), cut(targets)))
    if gradients:
        dhidden = jnp.moveaxis(dhidden, 0, 2).reshape(B, T, M)
    return (sums.nats + z_loss * sums.squared_lse, sums), (dhidden, dhead)
