"""Cross-entropy over the vocabulary, a chunk of tokens at a time."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Logits of one sequence that exist at a time: 2^22 floats are 16 MiB, or 128 tokens of a 32k vocabulary.
CHUNK_LOGITS = 1 << 22


class LossSums(NamedTuple):
    """Sums over target tokens, float32 scalars; divide once, by the global count."""

    nats: jax.Array
    squared_lse: jax.Array
    tokens: jax.Array


def chunk_size(tokens: int, vocab: int) -> int:
    """The largest divisor of `tokens` whose logits stay within `CHUNK_LOGITS` a sequence."""
    most = max(1, CHUNK_LOGITS // vocab)
    return next(d for d in range(min(tokens, most), 0, -1) if tokens % d == 0)


def cross_entropy(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> LossSums:
    """Summed cross-entropy of softmax(hidden @ head).

    Float32 logits [B, T, V] never exist: each chunk of tokens is projected,
    reduced and, in the backward, projected again.

    Args:
      hidden: [B, T, M].
      head: [M, V] float32, cast to the dtype of `hidden`.
      targets: [B, T] int32; a negative target has no loss.
    """
    B, T, M = hidden.shape
    size = chunk_size(T, head.shape[1])

    def chunk(sums: LossSums, inputs) -> tuple[LossSums, None]:
        h, target = inputs
        logits = jnp.einsum("BTM,MV->BTV", h, head.astype(h.dtype), preferred_element_type=jnp.float32)
        lse = jax.nn.logsumexp(logits, axis=-1)
        # A masked sum rather than a gather: it stays local when V is sharded.
        hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == target[..., None]
        picked = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        counts = target >= 0
        new = LossSums(
            jnp.sum(jnp.where(counts, lse - picked, 0.0)),
            jnp.sum(jnp.where(counts, lse * lse, 0.0)),
            jnp.sum(counts, dtype=jnp.float32),
        )
        return jax.tree.map(jnp.add, sums, new), None

    zero = LossSums(*(jnp.zeros((), jnp.float32) for _ in LossSums._fields))
    if size == T:
        return chunk(zero, (hidden, targets))[0]
    chunks = (
        hidden.reshape(B, T // size, size, M).swapaxes(0, 1),
        targets.reshape(B, T // size, size).swapaxes(0, 1),
    )
    return jax.lax.scan(jax.checkpoint(chunk), zero, chunks)[0]
