"""Cross-entropy over the vocabulary, a chunk of tokens at a time."""

from __future__ import annotations

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


@jax.custom_vjp
def cross_entropy(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> LossSums:
    """Summed cross-entropy of softmax(hidden @ head).

    Float32 logits [B, T, V] never exist: each chunk of tokens is projected,
    reduced and, in the backward, projected again. Their gradient multiplies
    hidden and head in the dtype of `hidden`, as the logits did.

    Args:
      hidden: [B, T, M].
      head: [M, V] float32, cast to the dtype of `hidden`.
      targets: [B, T] int32; a negative target has no loss.
    """
    return _forward(hidden, head, targets)[0]


def _forward(hidden, head, targets):
    head = head.astype(hidden.dtype)

    def chunk(sums: LossSums, inputs):
        h, target = inputs
        logits = _logits(h, head)
        lse = jax.nn.logsumexp(logits, axis=-1)
        # A masked sum rather than a gather: it stays local when V is sharded.
        picked = jnp.sum(jnp.where(_hit(logits, target), logits, 0.0), axis=-1)
        counts = target >= 0
        new = LossSums(
            jnp.sum(jnp.where(counts, lse - picked, 0.0)),
            jnp.sum(jnp.where(counts, lse * lse, 0.0)),
            jnp.sum(counts, dtype=jnp.float32),
        )
        return jax.tree.map(jnp.add, sums, new), lse

    zero = LossSums(*(jnp.zeros((), jnp.float32) for _ in LossSums._fields))
    cut, join = _chunks(hidden, head)
    sums, lse = jax.lax.scan(chunk, zero, cut((hidden, targets)))
    return sums, (hidden, head, targets, join(lse))


def _backward(residuals, cotangents: LossSums):
    hidden, head, targets, lse = residuals
    nats, squares = cotangents.nats, 2 * cotangents.squared_lse

    def chunk(dhead, inputs):
        h, target, lse = inputs
        logits, lse = _logits(h, head), lse[..., None]
        dlogits = jnp.exp(logits - lse) * (nats + squares * lse) - jnp.where(_hit(logits, target), nats, 0.0)
        dlogits = jnp.where(target[..., None] >= 0, dlogits, 0.0).astype(h.dtype)
        dhead += jnp.einsum("BTM,BTV->MV", h, dlogits, preferred_element_type=jnp.float32)
        return dhead, jnp.einsum("BTV,MV->BTM", dlogits, head)

    cut, join = _chunks(hidden, head)
    dhead, dhidden = jax.lax.scan(chunk, jnp.zeros(head.shape, jnp.float32), cut((hidden, targets, lse)))
    return join(dhidden), dhead, None


cross_entropy.defvjp(_forward, _backward)


def _logits(h, head):
    return jnp.einsum("BTM,MV->BTV", h, head, preferred_element_type=jnp.float32)


def _hit(logits, target):
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == target[..., None]


def _chunks(hidden, head):
    """Functions that cut arrays [B, T, ...] into chunks [n, B, T / n, ...], and join one again."""
    B, T, _ = hidden.shape
    size = chunk_size(max(1, B // parts("batch")), T, head.shape[1])

    def cut(tree):
        return jax.tree.map(lambda x: x.reshape(B, T // size, size, *x.shape[2:]).swapaxes(0, 1), tree)

    return cut, lambda x: x.swapaxes(0, 1).reshape(B, T, *x.shape[3:])
