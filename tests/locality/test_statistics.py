"""Locality and entropy of attention against their definitions, dense in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blockjax.errors import UsageError
from blockjax.locality.statistics import AttentionStatistics, attention_statistics, sample_queries
from blockjax.masks import Causal, Everything, Function, Window
from tests.jaxprs import arrays

B, T, N, K, H = 2, 24, 4, 2, 8
CAUSAL = dict(predicate=Causal(), local=Window(4))


def make(seed=0, scale=2.0, dtype="float32", kv_heads=K):
    rng = np.random.default_rng(seed)
    q = scale * rng.normal(size=(B, T, N, H))
    return jnp.asarray(q, dtype), jnp.asarray(rng.normal(size=(B, T, kv_heads, H)), dtype)


def all_rows(batch=B, tokens=T):
    return jnp.tile(jnp.arange(tokens, dtype=jnp.int32), (batch, 1))


def packed():
    """Two documents and padding in one row; three documents, the first of one token, in the other."""
    return np.array([[0] * 9 + [1] * 11 + [-1] * 4, [9] + [3] * 8 + [4] * 15])


def dense(q, k, queries, seen, near, *, scale=None, soft_cap=None, slope=None):
    """One query at a time, from the probabilities themselves."""
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    G = q.shape[2] // k.shape[2]
    collected = [[[] for _ in range(q.shape[2])] for _ in range(3)]
    for b, rows in enumerate(np.asarray(queries)):
        for i in rows:
            keys = np.flatnonzero(seen[b, i])
            if len(keys) == 0:
                continue
            for n in range(q.shape[2]):
                s = k[b, keys, n // G] @ q[b, i, n] * (q.shape[3] ** -0.5 if scale is None else scale)
                s = s if soft_cap is None else soft_cap * np.tanh(s / soft_cap)
                s = s if slope is None else s - float(slope[n]) * abs(i - keys)
                p = np.exp(s - s.max())
                p /= p.sum()
                bits = -np.sum(p * np.log2(p))
                collected[0][n].append(p[near[b, i, keys]].sum())
                collected[1][n].append(bits)
                if len(keys) > 1:
                    collected[2][n].append(bits / np.log2(len(keys)))
    return AttentionStatistics(*(np.array([np.mean(x) for x in heads]) for heads in collected))


def pairs(rule=lambda i, j: True, ids=None, valid=True, tokens=T):
    i, j = np.arange(tokens)[:, None], np.arange(tokens)
    allowed = np.broadcast_to(rule(i, j), (B, tokens, tokens))
    if ids is None:
        return allowed
    return allowed & (ids[:, :, None] == ids[:, None]) & ((ids[:, :, None] >= 0) | (not valid))


def assert_close(a, b, tolerance=2e-5):
    for name, x, y in zip(AttentionStatistics._fields, a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=name)


def causal(i, j):
    return j <= i


def window(left):
    return lambda i, j: (i - left < j) & (j <= i)


ALL = dict(scale=0.9, soft_cap=3.0, slope=[0.0, 1.0, 0.2, 0.05])


@pytest.mark.parametrize("segments", [False, True], ids=["", "segments"])
@pytest.mark.parametrize(("predicate", "rule", "options"), [
    (Causal(), causal, {}),
    (Causal(), causal, dict(scale=0.7)),
    (Causal(), causal, dict(soft_cap=1.5)),
    (Causal(), causal, dict(slope=[0.01, 0.1, 0.5, 2.0])),
    (Window(7), window(7), ALL),
    (Everything(), lambda i, j: True, ALL),
], ids=["plain", "scale", "soft_cap", "slope", "window", "everything"])  # fmt: skip
def test_equals_the_definition(predicate, rule, options, segments):
    q, k = make()
    queries = jnp.asarray(np.random.default_rng(1).integers(0, T, (B, 10)), jnp.int32)
    ids = packed() if segments else None
    blocks = np.tile(np.arange(T) // 5, (B, 1)) if segments else None
    options = options | ({"slope": jnp.array(options["slope"])} if "slope" in options else {})
    result = attention_statistics(
        q, k, queries=queries, predicate=predicate, local=Window(4), segment_ids=ids,
        local_segment_ids=blocks, **options,
    )  # fmt: skip
    seen = pairs(rule, ids)
    near = seen & pairs(window(4)) & pairs(ids=blocks, valid=False)
    assert_close(result, dense(q, k, queries, seen, near, **options))
    assert all(x.shape == (N,) and x.dtype == jnp.float32 for x in result)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_queries(kv_heads):
    q, k = make(kv_heads=kv_heads)
    result = attention_statistics(q, k, queries=all_rows(), **CAUSAL)
    assert_close(result, dense(q, k, all_rows(), pairs(causal), pairs(window(4))))


def test_dtypes():
    q, k = make(dtype="bfloat16")
    result = attention_statistics(q, k, queries=all_rows(), **CAUSAL)
    assert all(x.dtype == jnp.float32 for x in result)
    assert_close(result, dense(q, k, all_rows(), pairs(causal), pairs(window(4))))
    with jax.enable_x64(True):
        q, k = make(dtype="float64")
        slope = jnp.full(N, 0.3)
        result = attention_statistics(q, k, queries=all_rows(), slope=slope, soft_cap=2.0, **CAUSAL)
        expected = dense(q, k, all_rows(), pairs(causal), pairs(window(4)), slope=slope, soft_cap=2.0)
        assert_close(result, expected, 1e-13)


def test_traced_windows_share_one_program():
    q, k = make()

    @jax.jit
    def f(left, near):
        return attention_statistics(
            q, k, queries=all_rows(), predicate=Window(left), local=Causal() & Window(near)
        )

    for left, near in ((12, 3), (T, 1), (2, 9)):
        seen = pairs(window(left))
        assert_close(f(left, near), dense(q, k, all_rows(), seen, seen & pairs(window(near))))
    assert f._cache_size() == 1


@pytest.mark.parametrize("local", [Everything(), Causal(), Window(T)])
def test_fidelity_is_one_when_everything_is_local(local):
    q, k = make(scale=30.0)
    result = attention_statistics(q, k, queries=all_rows(), predicate=Causal(), local=local)
    np.testing.assert_array_equal(result.fidelity, 1.0)


def test_a_query_without_local_keys_counts_as_zero():
    q, k = make()
    nowhere = Function(lambda pq, pk: pk < 0)
    result = attention_statistics(q, k, queries=all_rows(), predicate=Causal(), local=nowhere)
    np.testing.assert_array_equal(result.fidelity, 0.0)


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0, 300.0])
def test_entropy_lies_between_one_key_and_uniform(scale):
    q, k = make(scale=scale)
    f = jax.jit(lambda rows: attention_statistics(q[:1], k[:1], queries=rows[None, None], **CAUSAL))
    for i in (0, 1, 6, T - 1):
        result, most = f(i), np.log2(i + 1)
        assert (result.entropy >= 0).all() and (result.entropy <= most + 2e-6).all()
        if scale == 0.0:
            np.testing.assert_allclose(result.entropy, most, rtol=1e-6)
            np.testing.assert_allclose(result.fidelity, min(4, i + 1) / (i + 1), rtol=1e-6)
        if i == 0:
            assert np.isnan(result.relative_entropy).all()
        else:
            np.testing.assert_allclose(result.relative_entropy, result.entropy / most, rtol=1e-6)


def test_large_scores_do_not_cancel():
    """Two equal scores of 1e6 are one bit: lse - sum p s of them has no digits left in float32."""
    q, k = jnp.full((1, 2, 1, 1), 1e3), jnp.full((1, 2, 1, 1), 1e3)
    result = attention_statistics(q, k, queries=jnp.array([[1]]), predicate=Causal(), local=Window(1))
    np.testing.assert_allclose(jnp.stack(result), [[0.5], [1.0], [1.0]], rtol=1e-6)


@pytest.mark.parametrize("delta", [0.0, 1.0, 4.0, 9.0])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_margin_bounds_fidelity_and_entropy(delta, noise):
    """Local scores at least delta above the others: 1 - F <= r / (1 + r), r = (n / m) exp(-delta)."""
    m, n = 5, T - 5
    rng = np.random.default_rng(3)
    near = np.arange(T) > T - 1 - m
    scores = np.where(near, delta + noise * rng.exponential(size=T), -noise * rng.exponential(size=T))
    result = attention_statistics(
        jnp.ones((1, T, 1, 1)), jnp.asarray(scores, jnp.float32).reshape(1, T, 1, 1),
        queries=jnp.array([[T - 1]]), predicate=Causal(), local=Window(m), scale=1.0,
    )  # fmt: skip
    r = n / m * np.exp(-delta)
    outside = 1 - float(result.fidelity[0])
    assert outside <= r / (1 + r) + 1e-6
    shares = np.array([outside, 1 - outside])
    bound = -np.sum(shares * np.log2(shares)) + shares @ np.log2([n, m])
    assert float(result.entropy[0]) <= bound + 1e-5
    if noise == 0.0:
        np.testing.assert_allclose([outside, result.entropy[0]], [r / (1 + r), bound], rtol=1e-5, atol=1e-6)


def test_what_is_not_visible_never_reaches_the_result():
    q, k = make()
    ids = np.where(np.arange(T) < 5, -1, np.where(np.arange(T) < 20, 2, -1)) * np.ones((B, 1), int)
    options = dict(
        queries=all_rows(), predicate=Window(6), local=Window(2), segment_ids=jnp.asarray(ids), soft_cap=4.0
    )
    bad = jnp.asarray(ids < 0)[:, :, None, None]
    clean = attention_statistics(q, k, **options)
    poisoned = attention_statistics(jnp.where(bad, jnp.nan, q), jnp.where(bad, jnp.nan, k), **options)
    assert np.isfinite(jnp.stack(clean)).all()
    assert_close(poisoned, clean, 0)
    # Outside the predicate too: the query at 19 sees 14 to 19 only.
    options["queries"] = jnp.full((B, 1), 19)
    poisoned = attention_statistics(q, k.at[:, :14].set(jnp.nan), **options)
    assert_close(poisoned, attention_statistics(q, k, **options), 0)


def test_no_query_counts():
    q, k = make()
    nothing = attention_statistics(q, k, queries=all_rows(), segment_ids=np.full((B, T), -1), **CAUSAL)
    assert np.isnan(jnp.stack(nothing)).all()


def test_a_sequence_of_padding_changes_nothing():
    q, k = make()
    ids = np.zeros((B, T), int)
    ids[1] = -1
    one = attention_statistics(q[:1], k[:1], queries=all_rows(1), **CAUSAL)
    assert_close(attention_statistics(q, k, queries=all_rows(), segment_ids=ids, **CAUSAL), one, 1e-6)


def test_no_array_of_all_pairs():
    B, T, N, K, H, r = 2, 4096, 8, 2, 16, 16
    q, k = (jax.ShapeDtypeStruct((B, T, n, H), jnp.bfloat16) for n in (N, K))
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def f(q, k, ids, key):
        queries = sample_queries(ids, r, key)
        return attention_statistics(
            q, k, queries=queries, segment_ids=ids, local_segment_ids=ids, slope=jnp.ones(N), **CAUSAL
        )

    sizes = [a.size for a in arrays(jax.make_jaxpr(f)(q, k, ids, jax.random.key(0)).jaxpr)]
    assert len(sizes) > 50
    assert max(sizes) == B * N * r * T < T * T


def test_no_gradient():
    q, k = make()

    def f(q, k, slope):
        result = attention_statistics(q, k, queries=all_rows(), slope=slope, **CAUSAL)
        return jnp.stack([result.fidelity, result.entropy]).sum()

    for gradient in jax.grad(f, (0, 1, 2))(q, k, jnp.ones(N)):
        np.testing.assert_array_equal(gradient, 0)


def test_wrong_shapes():
    q, k = make()
    good = dict(queries=all_rows(), **CAUSAL)
    for message, args, options in [
        (r"must agree, got \(2, 24, 4, 8\) and \(2, 23", (q, k[:, 1:]), {}),
        (r"4 query heads .* no multiple of 3", (q, k[:, :, [0, 1, 1]]), {}),
        (r"integers \[2, r\], got float32", (q, k), dict(queries=jnp.ones((2, 3)))),
        (r"integers \[2, r\], got int32 \(24,\)", (q, k), dict(queries=jnp.arange(T))),
        (r"local_segment_ids must be \[2, 24\]", (q, k), dict(local_segment_ids=jnp.ones(T, int))),
        (r"slope must be \[4\]", (q, k), dict(slope=jnp.ones(2))),
    ]:
        with pytest.raises(UsageError, match=message):
            attention_statistics(*args, **good | options)


def test_samples_are_real_tokens_and_uniform():
    ids = jnp.asarray([*packed().tolist(), [-1] * 5 + [0] + [-1] * (T - 6)])
    sample = jax.jit(sample_queries, static_argnums=1)
    rows = sample(ids, 4000, jax.random.key(0))
    assert rows.shape == (3, 4000) and rows.dtype == jnp.int32
    assert (jnp.take_along_axis(ids, rows, axis=1) >= 0).all()
    assert (rows[2] == 5).all()
    for row, valid in zip(np.asarray(rows)[:2], np.asarray(ids)[:2] >= 0, strict=True):
        hits, p = np.bincount(row, minlength=T)[valid], 1 / valid.sum()
        assert (abs(hits - 4000 * p) < 5 * np.sqrt(4000 * p)).all()
    np.testing.assert_array_equal(rows, sample(ids, 4000, jax.random.key(0)))
    assert (rows != sample(ids, 4000, jax.random.key(1))).any()
    assert (rows[0] != rows[1]).any()


def test_samples_of_a_sequence_of_padding_do_not_count():
    q, k = make()
    ids = np.full((B, T), -1)
    rows = sample_queries(ids, 3, jax.random.key(0))
    assert ((rows >= 0) & (rows < T)).all()
    assert np.isnan(attention_statistics(q, k, queries=rows, segment_ids=ids, **CAUSAL).entropy).all()
