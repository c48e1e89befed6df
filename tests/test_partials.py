"""Softmax partials: the monoid laws, and agreement with one softmax over everything."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blockjax import partials


def part(seed, keys=5, shape=(3, 4)):
    """The partial of random scores `[3, keys]` and values `[keys, 4]`, with both."""
    rng = np.random.default_rng(seed)
    scores = jnp.asarray(rng.normal(size=(shape[0], keys)) * 3, jnp.float32)
    values = jnp.asarray(rng.normal(size=(keys, shape[1])), jnp.float32)
    return scores, values


def attend(scores, values):
    return jax.nn.softmax(scores) @ values, jax.nn.logsumexp(scores, -1)


def assert_equal(a, b, tolerance=1e-6):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_folding_parts_is_attention_over_all():
    parts = [part(seed, keys) for seed, keys in enumerate((1, 5, 9))]
    whole = attend(jnp.concatenate([s for s, _ in parts], 1), jnp.concatenate([v for _, v in parts]))
    assert_equal(partials.fold(attend(*p) for p in parts), whole)


def test_monoid_laws():
    a, b, c = (attend(*part(seed)) for seed in range(3))
    zero = partials.empty((3, 4))
    assert_equal(partials.merge(a, zero), a)
    assert_equal(partials.merge(zero, a), a)
    assert_equal(partials.merge(a, b), partials.merge(b, a))
    left, right = partials.merge(partials.merge(a, b), c), partials.merge(a, partials.merge(b, c))
    assert_equal(left, right)


def test_large_scores_do_not_overflow():
    a, b = (attend(s + shift, v) for (s, v), shift in ((part(0), 1e4), (part(1), -1e4)))
    assert_equal(partials.merge(a, b), a)


@pytest.mark.parametrize("empty", ["both", "left", "right"])
def test_empty_partials_have_no_nan_in_value_or_gradient(empty):
    a = partials.empty((3, 4)) if empty in ("both", "left") else attend(*part(0))
    b = partials.empty((3, 4)) if empty in ("both", "right") else attend(*part(1))
    (o, lse), pullback = jax.vjp(partials.merge, a, b)
    if empty == "both":
        assert (o == 0).all() and (lse == -jnp.inf).all()
    gradients = pullback((jnp.ones_like(o), jnp.ones_like(lse)))
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_gradient_is_that_of_attention_over_all():
    (s1, v1), (s2, v2) = part(0), part(1)

    def split(s1, v1, s2, v2):
        return partials.merge(attend(s1, v1), attend(s2, v2))

    def whole(s1, v1, s2, v2):
        return attend(jnp.concatenate([s1, s2], 1), jnp.concatenate([v1, v2]))

    def loss(f, *args):
        o, lse = f(*args)
        return jnp.sum(jnp.sin(o)) + jnp.sum(lse**2)

    args = (s1, v1, s2, v2)
    ours, theirs = (jax.grad(functools.partial(loss, f), (0, 1, 2, 3))(*args) for f in (split, whole))
    assert_equal(ours, theirs, 1e-5)


def test_sums_in_float32_and_broadcasts():
    o, lse = attend(*part(0))
    merged = partials.merge((o.astype(jnp.bfloat16), lse), (jnp.zeros(()), jnp.zeros((3,))))
    assert merged[0].dtype == merged[1].dtype == jnp.float32
    np.testing.assert_allclose(merged[1], jnp.logaddexp(lse, 0), rtol=1e-6)
    np.testing.assert_allclose(merged[0], o * jax.nn.sigmoid(lse)[:, None], atol=2e-2)
