"""What every backend of `depth_mix` must do. Subclasses name the backend."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blockjax.kernels.depth_mix import (
    depth_join,
    depth_mix,
    depth_read,
    sharded_depth_join,
    sharded_depth_read,
)
from jax.sharding import AxisType

from blockjax.partials import merge
from tests.hlo import collectives


def rand(seed, *shape, dtype="float32", scale=1.0):
    """Random, also of few bits: what is rounded to `dtype` is drawn in float64."""
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), dtype)


def sources_of(seed, n, shape, dtype="float32", scale=1.0):
    """n sources of different sizes, as depth blocks write them."""
    return tuple(rand((seed, i), *shape, dtype=dtype, scale=scale * (1 + i / 2)) for i in range(n))


def read_both(implementation, sources, queries, seed=0, **options):
    """`o`, `lse`, logits and the gradients of sources and queries, for random cotangents of o and lse."""

    def call(sources, queries):
        return depth_read(sources, queries, implementation=implementation, **options)

    out, pullback = jax.vjp(call, sources, queries)
    zeros = jnp.zeros_like(out.logits)
    return out, pullback(jax.tree.map(lambda x: cotangent(seed, x), out)._replace(logits=zeros))


def join_both(implementation, partial, update, o, lse, query, gain, first=False, seed=0, **options):
    """`Join` and the gradients of all arguments, for random cotangents of the running sum and x."""

    def call(partial, update, o, lse, query, gain):
        return depth_join(
            partial, update, o, lse, query, norm_gain=gain, first=first,
            implementation=implementation, **options,
        )  # fmt: skip

    out, pullback = jax.vjp(call, partial, update, o, lse, query, gain)
    zeros = jnp.zeros_like(out.logit)
    return out, pullback(jax.tree.map(lambda x: cotangent(seed, x), out)._replace(logit=zeros))


def cotangent(seed, x):
    return rand((seed, 77, x.size), *x.shape, dtype=x.dtype)


STATIC = ("implementation", "heads", "eps", "norm_eps", "unstacked", "seed")
run_read = jax.jit(read_both, static_argnames=STATIC)
run_join = jax.jit(join_both, static_argnames=STATIC)


def join_inputs(seed, shape, heads=1, update=True, dtype="float32"):
    partial, written, o = sources_of(seed, 3, shape, dtype)
    lse = rand((seed, 8), *shape[:-1], heads)
    M = shape[-1]
    return (
        partial,
        written if update else None,
        o,
        lse,
        rand((seed, 9), M),
        1 + rand((seed, 10), M, scale=0.1),
    )


def assert_close(ours, theirs, tolerance=2e-5):
    """Each array to a part of its largest entry."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, "float64"), np.asarray(b, "float64")
        scale = max(1.0, np.abs(b[np.isfinite(b)]).max(initial=0))
        np.testing.assert_allclose(a, b, atol=tolerance * scale, rtol=0)


def assert_equal(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def exhaustive(test):
    """A test of one suite, left to `make test-all` there alone."""

    @functools.wraps(test)
    def call(*args, **kwargs):
        test(*args, **kwargs)

    return pytest.mark.exhaustive(call)


def exhaustive_but(*kept):
    """Leaves all tests of a suite but these to `make test-all`: compiling them takes long."""

    def decorate(suite):
        for name in dir(suite):
            test = getattr(suite, name)
            if name.startswith("test_") and test is not None and name not in kept:
                setattr(suite, name, exhaustive(test))
        return suite

    return decorate


class DepthMixSuite:
    implementation: ClassVar[str]

    def compare_read(self, sources, queries, tolerance=2e-5, **options):
        ours = run_read(self.implementation, sources, queries, **options)
        assert_close(ours, run_read("reference", sources, queries, **options), tolerance)
        return ours

    def compare_join(self, *arrays, tolerance=2e-5, **options):
        ours = run_join(self.implementation, *arrays, **options)
        assert_close(ours, run_join("reference", *arrays, **options), tolerance)
        return ours

    @pytest.mark.parametrize(
        ("n", "R", "heads", "shape"),
        [
            (3, 2, 1, (3, 5, 16)),
            (2, 3, 16, (2, 9, 32)),
            (29, 1, 1, (7, 64)),
            (4, 2, 2, (130,)),  # one token
        ],
    )
    def test_read(self, n, R, heads, shape):
        self.compare_read(sources_of(0, n, shape), rand(1, R, shape[-1]), heads=heads)

    @pytest.mark.parametrize("M", [1000, 1280, 7186])
    def test_any_width(self, M):
        self.compare_read(sources_of(0, 2, (3, M)), rand(1, 2, M, scale=0.1), heads=2)
        self.compare_join(*join_inputs(0, (3, M), 2), heads=2)

    def test_any_number_of_tokens(self):
        sources, queries, options = sources_of(0, 2, (263, 24)), rand(1, 2, 24), dict(heads=2)
        *arrays, query, gain = join_inputs(0, (263, 24), 2)
        whole, _ = self.compare_read(sources, queries, **options)
        joined, _ = self.compare_join(*arrays, query, gain, **options)
        options |= dict(implementation=self.implementation)
        part = depth_read(tuple(v[:131] for v in sources), queries, **options)
        assert_close((whole.o[:, :131], whole.lse[:, :131]), (part.o, part.lse), 1e-6)
        part = depth_join(*(x[200:] for x in arrays), query, norm_gain=gain, **options)
        assert_close(joined.x[200:], part.x, 1e-6)

    def test_unstacked_is_the_stack_in_pieces(self):
        sources, queries = sources_of(0, 3, (4, 5, 16)), rand(1, 3, 16)
        whole, _ = run_read(self.implementation, sources, queries)
        parts, _ = self.compare_read(sources, queries, unstacked=True)
        assert isinstance(parts.o, tuple) and len(parts.o) == 3
        assert_equal(parts.o, tuple(whole.o))

    @pytest.mark.parametrize(
        ("heads", "update", "first"),
        [
            (1, True, None),
            (4, True, True),
            (4, False, None),
            (1, False, True),
            (16, True, False),
        ],
    )
    def test_join(self, heads, update, first):
        arrays = join_inputs(0, (3, 5, 32), heads, update)
        options = {} if first is None else dict(first=jnp.array(first))
        self.compare_join(*arrays, **options, heads=heads)

    def test_static_first_is_traced_first(self):
        arrays = join_inputs(0, (3, 16))
        for first in (False, True):
            static = join_both(self.implementation, *arrays, first=first)
            assert_close(static, run_join(self.implementation, *arrays, first=jnp.array(first)), 2e-6)

    def test_nothing_is_read_of_an_absent_running_sum(self):
        poison = jnp.full((3, 5, 16), jnp.nan)
        _, _, *rest = join_inputs(0, (3, 5, 16))
        out, (dpartial, dupdate, *gradients) = run_join(
            self.implementation, poison, poison, *rest, first=jnp.array(True)
        )
        zeros = jnp.zeros((3, 5, 16))
        expected, (_, _, *others) = run_join("reference", zeros, zeros, *rest, first=jnp.array(True))
        assert_close((out, gradients), (expected, others))
        assert_equal((dpartial, dupdate, out.partial), (zeros, zeros, zeros))

    def test_a_source_of_zeros_is_not_an_absent_one(self):
        """It takes weight: its logit is 0."""
        zeros = jnp.zeros((3, 16))
        _, _, o, lse, query, gain = join_inputs(0, (3, 16))
        call = lambda first: depth_join(  # noqa: E731
            zeros, None, o, lse, query, norm_gain=gain, first=first, norm_eps=1.0,
            implementation=self.implementation,
        )  # fmt: skip
        assert jnp.abs(call(False).x - call(True).x).max() > 0.01

    @pytest.mark.parametrize("heads", [1, 2])
    def test_two_phases_are_one_mix(self, heads):
        """A read of completed blocks, joined with the running sum, is the mix over all, normalised."""
        *completed, partial, update = sources_of(0, 5, (2, 7, 16))
        query, gain = rand(1, 16), 1 + rand(2, 16, scale=0.1)

        def direct(implementation, completed, partial, update, query, gain):
            total = partial + update
            h = depth_mix((*completed, total), query, heads=heads, implementation=implementation)
            return total, gain * h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6)

        def phases(implementation, completed, partial, update, query, gain):
            options = dict(heads=heads, implementation=implementation)
            (o,), (lse,), _ = depth_read(completed, query[None], unstacked=True, **options)
            return depth_join(partial, update, o, lse, query, norm_gain=gain, **options)[:2]

        def both(call, implementation):
            out, pullback = jax.vjp(
                lambda *args: call(implementation, *args), tuple(completed), partial, update, query, gain
            )
            return out, pullback(jax.tree.map(lambda x: cotangent(0, x), out))

        expected = jax.jit(lambda: both(direct, "reference"))()
        assert_close(jax.jit(lambda: both(phases, self.implementation))(), expected)
        assert_close(jax.jit(lambda: both(direct, self.implementation))(), expected)

    def test_reads_of_parts_merge(self):
        sources, queries = sources_of(0, 5, (4, 16)), rand(1, 2, 16)
        options = dict(implementation=self.implementation)
        whole = depth_read(sources, queries, **options)
        a, b = depth_read(sources[:2], queries, **options), depth_read(sources[2:], queries, **options)
        split = lambda read: (read.o[..., None, :], read.lse)  # noqa: E731
        o, lse = merge(split(a), split(b))
        assert_close((o[..., 0, :], lse), (whole.o, whole.lse))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_one_source_is_read_as_it_is(self, dtype):
        source, query = rand(0, 6, 48, dtype=dtype), rand(1, 48)

        def call(source, query):
            return depth_mix((source,), query, implementation=self.implementation)

        h, pullback = jax.vjp(call, source, query)
        dh = cotangent(0, h)
        dsource, dquery = pullback(dh)
        assert_equal((h, dsource), (source, dh))
        assert not dquery.any()

    def test_weights_are_a_softmax(self):
        """They add up to 1, and what is read lies between the least and the largest of the sources."""
        sources, queries = sources_of(0, 4, (40, 16)), rand(1, 3, 16)
        o, lse, logits = depth_read(sources, queries, heads=2, implementation=self.implementation)
        assert_close(jnp.exp(logits - lse).sum(0), jnp.ones_like(lse), 1e-6)
        least, largest = jnp.min(jnp.stack(sources), 0), jnp.max(jnp.stack(sources), 0)
        assert (o >= least - 1e-5).all() and (o <= largest + 1e-5).all()

    def test_zero_queries_read_the_mean(self):
        sources = sources_of(0, 5, (6, 16))
        h = depth_mix(sources, jnp.zeros(16), implementation=self.implementation)
        assert_close(h, sum(sources) / 5, 1e-6)

    def test_order_of_sources_does_not_matter(self):
        sources, queries, order = sources_of(0, 4, (6, 16)), rand(1, 2, 16), [2, 0, 3, 1]
        a, (da, dqa) = run_read(self.implementation, sources, queries)
        b, (db, dqb) = run_read(self.implementation, tuple(sources[i] for i in order), queries)
        assert_close((a.o, a.lse, a.logits[jnp.array(order)], dqa), (b.o, b.lse, b.logits, dqb))
        assert_close([da[i] for i in order], list(db))

    def test_size_of_sources_does_not_matter_to_weights(self):
        sources, query = sources_of(0, 3, (6, 16)), rand(1, 1, 16)
        scaled = tuple(scale * v for scale, v in zip((0.01, 1.0, 300.0), sources, strict=True))
        options = dict(eps=1e-20, implementation=self.implementation)
        assert_close(
            depth_read(sources, query, **options).logits, depth_read(scaled, query, **options).logits
        )

    def test_gain_is_a_factor_of_the_query(self):
        sources, query, gain = sources_of(0, 3, (6, 16)), rand(1, 16), rand(2, 16)
        options = dict(return_lse=True, implementation=self.implementation)
        assert_equal(
            depth_mix(sources, query, gain=gain, **options), depth_mix(sources, query * gain, **options)
        )

    def test_huge_logits(self):
        sources, queries = sources_of(0, 4, (6, 16)), 1e6 * rand(1, 2, 16)
        out, gradients = run_read(self.implementation, sources, queries)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((out, gradients)))
        expected, _ = run_read("reference", sources, queries)
        assert_close(out.o, expected.o, 1e-4)
        *arrays, query, gain = join_inputs(0, (6, 16))
        found = run_join(self.implementation, *arrays, 1e6 * query, gain)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(found))

    def test_a_source_of_zeros_has_a_finite_gradient(self):
        sources, queries = sources_of(0, 3, (6, 16)), rand(1, 2, 16)
        # Its key is so steep there, 1 / sqrt(eps), that float32 keeps fewer digits.
        self.compare_read((jnp.zeros((6, 16)), *sources), queries, tolerance=1e-4)
        partial, _, *rest = join_inputs(0, (6, 16))
        # And there <dh, s - o> cancels: x does not change along o.
        self.compare_join(jnp.zeros_like(partial), None, *rest, tolerance=5e-3)

    def test_nan_in_one_token_stays_there(self):
        sources, queries = sources_of(0, 3, (9, 16)), rand(1, 2, 16)
        poisoned = (sources[0], sources[1].at[4].set(jnp.nan), sources[2])
        out, (gradients, _) = run_read(self.implementation, poisoned, queries)
        clean, (others, _) = run_read(self.implementation, sources, queries)
        rest = np.arange(9) != 4
        assert_equal((out.o[:, rest], out.lse[:, rest]), (clean.o[:, rest], clean.lse[:, rest]))
        assert_equal([g[rest] for g in gradients], [g[rest] for g in others])
        assert jnp.isnan(out.o[:, 4]).all()

    def test_bfloat16(self):
        """As close to what float32 gives as bfloat16 can be: one rounding of each output and gradient."""
        sources, queries = sources_of(0, 4, (33, 64), "bfloat16"), rand(1, 3, 64)
        options = dict(heads=4)
        ours, (dsources, dqueries) = run_read(self.implementation, sources, queries, **options)
        assert ours.o.dtype == dsources[0].dtype == jnp.bfloat16
        assert ours.lse.dtype == dqueries.dtype == jnp.float32
        # Both see the same rounded cotangents.
        exact, (dexact, dq) = run_read("reference", sources, queries, **options)
        assert_close((ours.lse, ours.logits), (exact.lse, exact.logits))
        assert_close((ours.o, dsources), (exact.o, dexact), 0.008)
        assert_close(dqueries, dq, 0.01)
        arrays = join_inputs(0, (33, 64), 4, dtype="bfloat16")
        ours, dours = run_join(self.implementation, *arrays, **options)
        exact, dexact = run_join("reference", *arrays, **options)
        assert_equal(ours.partial, exact.partial)
        assert_close((ours, dours), (exact, dexact), 0.01)

    def test_float64(self):
        with jax.enable_x64(True):
            wide = lambda tree: jax.tree.map(lambda x: x.astype("float64"), tree)  # noqa: E731
            self.compare_read(wide(sources_of(0, 3, (4, 16))), wide(rand(1, 2, 16)), 1e-13, heads=2)
            self.compare_join(*wide(join_inputs(0, (4, 16), 2)), tolerance=1e-13, heads=2)

    def test_finite_differences(self):
        with jax.enable_x64(True):
            sources, queries = sources_of(0, 3, (2, 8), "float64"), rand(1, 2, 8, dtype="float64")
            partial, update, o, lse, query, gain = (x.astype("float64") for x in join_inputs(0, (2, 8), 2))

            def value(sources, queries, partial, update, o, lse, query, gain):
                options = dict(heads=2, implementation=self.implementation)
                read = depth_read(sources, queries, **options)
                join = depth_join(partial, update, o, lse, query, norm_gain=gain, **options)
                parts = (read.o, read.lse, join.partial, join.x)
                return sum(jnp.sum(jnp.sin(x) * cotangent(0, x)) for x in parts)

            args = sources, queries, partial, update, o, lse, query, gain
            value = jax.jit(value)
            gradients = jax.jit(jax.grad(value, range(8)))(*args)
            along = jax.tree.map(lambda x: cotangent(1, x), args)
            ahead, back = (
                value(*jax.tree.map(lambda x, d: x + sign * 1e-5 * d, args, along))  # noqa: B023
                for sign in (1, -1)
            )
            expected = sum(
                jnp.sum(g * d) for g, d in zip(*map(jax.tree.leaves, (gradients, along)), strict=True)
            )
            assert abs((ahead - back) / 2e-5 - expected) < 1e-6 * abs(expected)

    def test_runs_are_equal_bit_for_bit(self):
        sources, queries = sources_of(0, 3, (300, 40)), rand(1, 2, 40)
        arrays = join_inputs(0, (300, 40))
        assert_equal(
            run_read(self.implementation, sources, queries), run_read(self.implementation, sources, queries)
        )
        assert_equal(run_join(self.implementation, *arrays), run_join(self.implementation, *arrays))

    def test_scan_is_unrolled(self):
        """A depth block of three sublayers whose first has no running sum, as a scan and as a loop."""
        sources, queries = sources_of(0, 3, (4, 16)), rand(1, 3, 16)
        gains, zeros = 1 + rand(2, 3, 16, scale=0.1), jnp.zeros((4, 16))

        def step(carry, xs):
            partial, update = carry
            o, lse, query, gain, first = xs
            partial, x, _ = depth_join(
                partial, update, o, lse, query, norm_gain=gain, first=first,
                implementation=self.implementation,
            )  # fmt: skip
            return (partial, jnp.tanh(x)), x

        def scanned(sources, queries, gains):
            o, lse, _ = depth_read(sources, queries, implementation=self.implementation)
            xs = o, lse, queries, gains, jnp.arange(3) == 0
            return jax.lax.scan(step, (zeros, zeros), xs)

        def unrolled(sources, queries, gains):
            o, lse, _ = depth_read(sources, queries, unstacked=True, implementation=self.implementation)
            carry, out = (zeros, zeros), []
            for i in range(3):
                carry, x = step(carry, (o[i], lse[i], queries[i], gains[i], i == 0))
                out.append(x)
            return carry, jnp.stack(out)

        def both(call):
            out, pullback = jax.vjp(call, sources, queries, gains)
            return out, pullback(jax.tree.map(lambda x: cotangent(0, x), out))

        assert_close(jax.jit(lambda: both(scanned))(), jax.jit(lambda: both(unrolled))(), 5e-6)

    def test_on_a_mesh(self):
        """Tokens cut over devices: nothing is communicated but what queries and gains add up."""
        if jax.device_count() < 4:
            pytest.skip("needs four devices")
        mesh = jax.make_mesh((2, 2), ("data", "seq"), axis_types=(AxisType.Auto,) * 2)
        sources, queries = sources_of(0, 3, (2, 4, 16)), rand(1, 2, 16)
        gain, update = 1 + rand(2, 16, scale=0.1), rand(3, 2, 4, 16)

        def call(tokens, sources, update, queries, gain):
            options = dict(implementation=self.implementation, tokens=tokens)
            o, lse, _ = sharded_depth_read(sources, queries, unstacked=True, **options)
            join = sharded_depth_join(
                sources[0], update, o[0], lse[0], queries[0], norm_gain=gain,
                first=jnp.array(False), **options,
            )  # fmt: skip
            return o[1], lse[1], join.partial, join.x

        def both(tokens, *args):
            out, pullback = jax.vjp(lambda *args: call(tokens, *args), *args)
            return out, pullback(jax.tree.map(lambda x: cotangent(0, x), out))

        out, gradients = jax.jit(lambda *args: both((), *args))(sources, update, queries, gain)
        with jax.set_mesh(mesh):
            cut = jax.device_put((sources, update), jax.NamedSharding(mesh, jax.P("data", "seq")))
            sharded = jax.jit(lambda *args: both(("data", "seq"), *args))
            found, others = sharded(*cut, queries, gain)
            program = jax.jit(lambda *args: call(("data", "seq"), *args)).lower(*cut, queries, gain)
            assert collectives(program.compile().as_text()) == []
        if self.implementation == "xla":  # whose code depends on the shape, to the last bit
            assert_close(found, out, 1e-6)
        else:
            assert_equal(found, out)
        assert_close(others, gradients, 5e-6)
