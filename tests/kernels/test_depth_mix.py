"""`depth_mix`: the suite for XLA, and what does not depend on a backend."""

import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blockjax.kernels import dispatch
from blockjax.kernels.depth_mix import (
    Spec,
    api,
    depth_join,
    depth_mix,
    depth_read,
    floor_bytes,
    sharded_depth_join,
    sharded_depth_read,
)
from blockjax.kernels.platforms import Target
from jax.sharding import AxisType

import blockjax as bj
from blockjax.errors import UsageError
from tests.hlo import collectives
from tests.jaxprs import arrays
from tests.kernels.depth_mix_suite import DepthMixSuite, assert_close, join_inputs, rand, sources_of


class TestXla(DepthMixSuite):
    implementation = "xla"


SOURCES, QUERY = sources_of(0, 3, (2, 5, 16)), rand(1, 16)
JOIN = join_inputs(0, (2, 5, 16))


@pytest.mark.parametrize(
    ("sources", "query", "options", "message"),
    [
        ((), QUERY, {}, "at least one array"),
        ((SOURCES[0], SOURCES[1][:1]), QUERY, {}, r"one shape.*\(1, 5, 16\), \(2, 5, 16\)"),
        ((SOURCES[0], SOURCES[1].astype("bfloat16")), QUERY, {}, "one floating dtype, got bfloat16, float32"),
        ((SOURCES[0].astype("int32"),), QUERY, {}, "one floating dtype, got int32"),
        (SOURCES, QUERY[:8], {}, r"M=16\] like sources \(2, 5, 16\), got \(1, 8\)"),
        (SOURCES, QUERY.astype("int32"), {}, r"query must be floating, got int32 \(16,\)"),
        (SOURCES, QUERY, dict(heads=3), "heads=3 .* divides M=16"),
        (SOURCES, QUERY, dict(heads=0), "heads=0"),
        (
            SOURCES,
            QUERY,
            dict(implementation="fast"),
            "no implementation 'fast'; choose from .*xla, .*reference",
        ),
        (SOURCES, QUERY, dict(implementation="tpu"), "'tpu' cannot serve this call: it runs on TPUs, not on"),
    ],
)
def test_mistakes(sources, query, options, message):
    with pytest.raises(UsageError, match=message):
        depth_mix(sources, query, **options)


@pytest.mark.parametrize(
    ("place", "x", "message"),
    [
        (1, JOIN[1][0], r"partial, update and o must have one shape.*\(2, 5, 16\), \(5, 16\)"),
        (2, JOIN[2].astype("bfloat16"), "partial, update and o need one floating dtype"),
        (3, JOIN[3][..., 0], r"lse must be \(2, 5, 1\) for a running sum \(2, 5, 16\), got \(2, 5\)"),
        (4, QUERY[:8], r"query must be \(16,\) .* got \(8,\)"),
        (5, QUERY[:8], r"norm_gain must be \(16,\) .* got \(8,\)"),
    ],
)
def test_mistakes_of_a_join(place, x, message):
    *args, gain = (x if i == place else y for i, y in enumerate(JOIN))
    with pytest.raises(UsageError, match=message):
        depth_join(*args, norm_gain=gain)


def test_falls_back_with_one_line(monkeypatch, caplog):
    slow = types.SimpleNamespace(supports=lambda spec: f"M {spec.M} is not 128")
    monkeypatch.setattr(api, "BACKENDS", {"fast": slow} | api.BACKENDS)
    dispatch.log_fallback.cache_clear()
    with caplog.at_level(logging.INFO, logger=api.__name__):
        first, second = (bj.depth_mix(SOURCES, QUERY) for _ in range(2))
    assert [r.message for r in caplog.records if "fast" in r.message] == [
        "depth_mix: not fast: M 16 is not 128"
    ]
    np.testing.assert_array_equal(first, second)


def test_sources_are_not_stacked():
    """Neither they nor their keys: nothing has n sources of a token's width."""

    def loss(sources, queries):
        o, lse, _ = depth_read(sources, queries, implementation="xla")
        return jnp.sum(o**2) + jnp.sum(lse)

    sources = sources_of(0, 5, (7, 11, 64))
    program = jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(sources, rand(1, 2, 64))
    assert max(x.size for x in arrays(program.jaxpr)) == 2 * 7 * 11 * 64  # R means


def test_keys_are_not_kept():
    """The backward pass sees sources, means and a few numbers per token."""
    sources, queries = sources_of(0, 5, (7, 11, 64)), rand(1, 2, 64)
    _, pullback = jax.vjp(lambda *args: depth_read(*args, implementation="xla"), sources, queries)
    kept = [x for x in jax.tree.leaves(pullback) if x.size >= 7 * 11 * 64]
    assert sum(x.size for x in kept) == (5 + 2) * 7 * 11 * 64
    *args, gain = join_inputs(0, (7, 11, 64))
    _, pullback = jax.vjp(lambda *args: depth_join(*args, norm_gain=gain, implementation="xla"), *args)
    kept = [x for x in jax.tree.leaves(pullback) if x.size >= 7 * 11 * 64]
    assert len(kept) == 2  # the new running sum and the mean


def test_width_cut_over_devices_tells_two_sums_a_source_and_token():
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        cut = jax.device_put((*SOURCES, QUERY), jax.NamedSharding(mesh, jax.P()))
        *sources, query = (
            jax.device_put(x, jax.NamedSharding(mesh, jax.P(*[None] * (x.ndim - 1), "tensor"))) for x in cut
        )
        read = jax.jit(lambda sources, query: sharded_depth_read(sources, query[None], width="tensor"))
        found = collectives(read.lower(sources, query).compile().as_text())
        assert {op for op, _, _ in found} == {"all-reduce"}
        tokens = SOURCES[0][..., 0].size
        assert sum(np.prod(shape) for _, shapes, _ in found for shape in shapes) == 2 * 3 * tokens
        assert_close(read(sources, query), depth_read(SOURCES, QUERY[None]))


def test_what_does_not_divide_over_a_mesh():
    mesh = jax.make_mesh((4,), ("seq",), axis_types=(AxisType.Auto,))
    *args, gain = JOIN
    with jax.set_mesh(mesh):
        with pytest.raises(UsageError, match=r"5 of \(2, 5, 16\) do not divide over seq=4"):
            sharded_depth_read(SOURCES, QUERY[None], tokens=(None, "seq"))
        with pytest.raises(UsageError, match=r"names more axes than \(2, 5, 16\) has before its last"):
            sharded_depth_join(*args, norm_gain=gain, tokens=(None, None, "seq"))


@pytest.mark.parametrize(
    ("op", "forward", "backward"),
    [
        (dict(op="read", n=9, R=8), 17, 26),
        (dict(op="join", n=1, R=1, update=True), 5, 6),
        (dict(op="join", n=1, R=1), 3, 6),
    ],
)
def test_floor_counts_each_array_once(op, forward, backward):
    spec = Spec(Target("cpu", "cpu"), jnp.dtype("bfloat16"), tokens=10, M=100, heads=1, **op)
    assert floor_bytes(spec) == (forward * 2000, backward * 2000)
