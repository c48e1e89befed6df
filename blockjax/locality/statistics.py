"""How local and how spread out attention is, measured on a few sampled queries.

For query i with scores s_ij over its visible keys and p_ij their softmax, `lse_i` is the log of the sum of
the exponentials of all of them and `lse_local_i` of those in a local set of keys:

    fidelity          F_i = sum over local j of p_ij = exp(lse_local_i - lse_i)
    entropy           H_i = (lse_i - sum_j p_ij s_ij) / ln 2, in bits
    relative entropy  H_i / log2(number of visible keys)

Only the sampled rows are scored, so time and memory are linear in the number of tokens. Source: derived
here from the log-sum-exp of a softmax; the question, how much attention stays on nearby tokens, is that of
Longformer, Beltagy et al. 2020, arXiv:2004.05150.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from blockjax.errors import UsageError
from blockjax.masks import Predicate


class AttentionStatistics(NamedTuple):
    """Per head, each the mean over the sampled queries that count; NaN when none does.

    float32 (float64 stays float64). A query that sees nothing never counts; one that sees a single key
    does not count for `relative_entropy`.
    """

    fidelity: Float[Array, " N"]  # share of attention in the local set, 0 to 1
    entropy: Float[Array, " N"]  # bits
    relative_entropy: Float[Array, " N"]  # 0 to 1: one key takes all to uniform


def attention_statistics(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    *,
    queries: Int[Array, "B r"],
    predicate: Predicate,
    local: Predicate,
    segment_ids: Int[Array, "B T"] | None = None,
    local_segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    slope: Float[Array, " N"] | None = None,
) -> AttentionStatistics:
    """Fidelity and entropy of self-attention at the rows `queries`; the largest array is [B, N, r, T].

    Query i sees key j when `predicate` holds for their row numbers and their segment ids are equal and not
    negative; j is local when moreover `local` holds and their local segment ids are equal. Scores are those
    of `block_sparse_attention`: `cap(scale * q k) - slope * distance`. What is not visible does not matter,
    NaN included. No gradient flows back.

    Args:
        q, k: floating; N is a multiple of K. Products accumulate in float32.
        queries: rows in [0, T), integers; see `sample_queries`.
        predicate, local: may hold traced scalars.
        scale: default `H ** -0.5`.
        soft_cap: bound on the scores before the bias.
        slope: of the bias by distance, one per query head.

    Raises:
        UsageError: shapes or dtypes that do not fit.
    """
    queries = jnp.asarray(queries)
    _check(q, k, queries, slope, segment_ids=segment_ids, local_segment_ids=local_segment_ids)
    q, k, slope = jax.lax.stop_gradient((q, k, slope))
    B, T, N, H = q.shape
    r, K = queries.shape[1], k.shape[2]

    pq, pk = queries[:, None, :, None], jnp.arange(T, dtype=queries.dtype)
    seen = predicate.visible(pq, pk)
    if segment_ids is not None:
        ids_q, ids_k = _segments(segment_ids, queries)
        seen = seen & (ids_q == ids_k) & (ids_q >= 0)
    seen = jnp.broadcast_to(seen, (B, 1, r, T))
    near = seen & local.visible(pq, pk)
    if local_segment_ids is not None:
        ids_q, ids_k = _segments(local_segment_ids, queries)
        near = near & (ids_q == ids_k)

    wide = jnp.promote_types(jnp.result_type(q, k), jnp.float32)
    rows = jnp.take_along_axis(q, queries[:, :, None, None], axis=1).reshape(B, r, K, N // K, H)
    z = jnp.einsum("BrKGH,BTKH->BKGrT", rows, k, preferred_element_type=wide).reshape(B, N, r, T)
    s = z * (H**-0.5 if scale is None else scale)
    if soft_cap is not None:
        s = soft_cap * jnp.tanh(s / soft_cap)
    if slope is not None:
        s = s - jnp.asarray(slope, wide)[:, None, None] * jnp.abs(pq - pk)

    # Relative to the row's largest score both terms of the entropy are >= 0 up to rounding: nothing cancels.
    # The two log-sum-exps share that score, and exp of their difference is the quotient of the sums.
    # The barrier keeps the subtraction from being fused with what made s: unrounded scores less a rounded
    # maximum would be off by rounding errors of the scores.
    s = jax.lax.optimization_barrier(s)
    s = s - jnp.max(s, -1, keepdims=True, where=seen, initial=-jnp.inf)
    weight = jnp.where(seen, jnp.exp(s), 0)
    total = weight.sum(-1)
    fidelity = jnp.where(near, weight, 0).sum(-1) / total
    nats = jnp.log(total) - jnp.where(seen, weight * s, 0).sum(-1) / total
    entropy = jnp.maximum(nats, 0) / jnp.log(2)
    keys = seen.sum(-1)
    relative = entropy / jnp.log2(keys.astype(wide))
    return AttentionStatistics(
        fidelity=jnp.mean(fidelity, (0, 2), where=keys > 0),
        entropy=jnp.mean(entropy, (0, 2), where=keys > 0),
        relative_entropy=jnp.mean(relative, (0, 2), where=keys > 1),
    )


def sample_queries(segment_ids: Int[Array, "B T"], r: int, key: jax.Array) -> Int[Array, "B r"]:
    """`r` rows of every sequence, drawn uniformly and with replacement among tokens with an id >= 0.

    int32, the same for the same key. A sequence without such a token gets its last row, which sees nothing
    under these ids.
    """
    ends = jnp.cumsum(segment_ids >= 0, axis=1)
    count = ends[:, -1:]
    nth = jax.random.randint(key, (len(ends), r), 0, jnp.maximum(count, 1))
    rows = jax.vmap(lambda ends, nth: jnp.searchsorted(ends, nth, side="right"))(ends, nth)
    return jnp.minimum(rows, ends.shape[1] - 1).astype(jnp.int32)


def _segments(ids, queries):
    """Ids of the sampled queries [B, 1, r, 1] and of the keys [B, 1, 1, T]."""
    ids = jnp.asarray(ids)
    return jnp.take_along_axis(ids, queries, axis=1)[:, None, :, None], ids[:, None, None, :]


def _check(q, k, queries, slope, **segments):
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise UsageError(f"q [B, T, N, H] and k [B, T, K, H] must agree, got {q.shape} and {k.shape}.")
    B, T, N, _ = q.shape
    if N % k.shape[2]:
        raise UsageError(f"{N} query heads in q {q.shape} are no multiple of {k.shape[2]} in k {k.shape}.")
    if queries.ndim != 2 or len(queries) != B or not jnp.issubdtype(queries.dtype, jnp.integer):
        raise UsageError(f"queries must be integers [{B}, r], got {queries.dtype} {queries.shape}.")
    for name, ids in segments.items():
        if ids is not None and jnp.shape(ids) != (B, T):
            raise UsageError(f"{name} must be [{B}, {T}] as q {q.shape}, got {jnp.shape(ids)}.")
    if slope is not None and jnp.shape(slope) != (N,):
        raise UsageError(f"slope must be [{N}], one per query head, got {jnp.shape(slope)}.")
