"""What every backend of `linear_attention` must do. Subclasses name the backend and the kinds it serves."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blockjax.kernels import checking
from blockjax.kernels.linear_attention import linear_attention

GRADIENTS = "q", "k", "v", "log_decay", "beta", "initial_state"


def rand(seed, *shape, dtype="float32", scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), dtype)


def make(
    seed=0, kind="decay", decay="token", B=2, T=37, N=2, K=2, Hk=8, Hv=8, dtype="float32",
    state=True, rate=1.0, max_beta=1.0,
):  # fmt: skip
    """Arguments of a call by name: keys are normalised for the delta rule, log-decays are up to `rate`."""
    k = rand((seed, 1), B, T, K, Hk)
    if kind == "delta":
        k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
    wide = "float64" if dtype == "float64" else "float32"
    args = dict(q=rand((seed, 0), B, T, N, Hk, dtype=dtype), k=k.astype(dtype))
    args["v"] = rand((seed, 2), B, T, K, Hv, dtype=dtype)
    shape = dict(none=None, head=(K,), token=(B, T, K), channel=(B, T, K, Hk))[decay]
    uniform = np.random.default_rng((seed, 3)).uniform
    if shape is not None:
        args["log_decay"] = -jnp.asarray(rate * uniform(size=shape), wide)
    if kind == "delta":
        args["beta"] = jnp.asarray(max_beta * uniform(size=(B, T, K)), wide)
    if state:
        args["initial_state"] = rand((seed, 4), B, K, Hk, Hv, dtype=wide)
    return args


def both(implementation, args, cotangents, segment_ids=None, **options):
    """`o` and state, and the gradients of all arguments."""

    def call(args):
        return linear_attention(
            **args, segment_ids=segment_ids, return_state=True, implementation=implementation, **options
        )

    out, pullback = jax.vjp(call, args)
    return out, pullback(cotangents)[0]


TOLERANCE = 2e-5

run = jax.jit(both, static_argnames=("implementation", "kind", "scale", "chunk_size"))


def cotangents_of(args, seed=0):
    """Random, for `o` and state."""
    (B, T, N, Hk), (K, Hv) = args["q"].shape, args["v"].shape[2:]
    o = rand((seed, 77), B, T, N, Hv, dtype=args["q"].dtype)
    wide = "float64" if o.dtype == jnp.float64 else "float32"
    return o, rand((seed, 78), B, K, Hk, Hv, dtype=wide)


def assert_close(ours, theirs, tolerance=TOLERANCE):
    """Each array to a part of its largest entry."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, "float64"), np.asarray(b, "float64")
        scale = np.abs(b).max(initial=0) or 1.0
        np.testing.assert_allclose(
            a / scale, b / scale, atol=tolerance, rtol=0, err_msg=jax.tree_util.keystr(path)
        )


BY_NORM = dict(o=5e-3, state=5e-3, q=8e-3, k=8e-3, v=8e-3, initial_state=8e-3, log_decay=2e-2, beta=2e-2)
"""Errors of products of bfloat16 allowed for o, state and gradients: those of flash-linear-attention."""


def assert_close_by_norm(ours, theirs, times=1):
    """Arrays by their place, (o, state), or by name, to `BY_NORM`."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        last = path[-1] if path else jax.tree_util.SequenceKey(0)
        name = last.key if isinstance(last, jax.tree_util.DictKey) else ("o", "state")[last.idx]
        error = checking.relative_error(a, b)
        assert error <= times * BY_NORM[name], (name, error)


def assert_close_to_xla(implementation, args, segment_ids, kind="decay"):
    """By norm to that of float32 arrays; a second run gives the same bits."""
    arrays = args, cotangents_of(args)
    # Not `run`, which may have been traced with what a test has replaced since.
    ours, theirs = (jax.jit(functools.partial(both, x, kind=kind)) for x in (implementation, "xla"))
    out, gradients = first = ours(*arrays, segment_ids)
    assert_equal(first, ours(*arrays, segment_ids))
    exact_out, exact = theirs(*checking.widen(arrays), segment_ids)
    assert_close_by_norm((out, gradients), (exact_out, exact))


def assert_equal(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


FORMS = tuple((kind, decay) for kind in ("decay", "delta") for decay in ("none", "head", "token", "channel"))

# Documents end within a chunk of 16, at its border and after one token; padding within and at the end.
IDS = np.repeat([[3, -1, 3, 5, 6, -1, 9, -1]], 2, 0).repeat([7, 2, 3, 4, 1, 2, 15, 3], axis=1)
IDS[1] = [0] * 20 + [1] * 17


EXHAUSTIVE = pytest.mark.exhaustive
COMPILES = (
    "test_bfloat16",
    "test_states_are_not_rounded",
    "test_float64",
    "test_finite_differences",
    "test_decode_is_prefill",
)
"""Tests with a program of their own; all others run the same one."""


class LinearAttentionSuite:
    """`forms` are the pairs of kind and form of log-decay that the backend serves."""

    implementation: ClassVar[str]
    forms: ClassVar[tuple[tuple[str, str], ...]] = FORMS
    few: ClassVar[tuple[tuple[str, str], ...]] = (("decay", "token"), ("delta", "channel"))
    """For which `make test` runs those of `COMPILES`."""
    shortest: ClassVar[int] = 1
    """Tokens that the backend serves, at least."""
    decoder: ClassVar[str] = "xla"
    """The backend that takes one token at a time."""
    dims: ClassVar[dict[str, int]] = dict(Hk=8, Hv=12)
    dtype: ClassVar[str] = "float32"
    tolerance: ClassVar[float] = TOLERANCE
    chunk: ClassVar[int] = 16
    stretch: ClassVar[int] = 1
    """Times as many tokens in each document, for backends whose chunks are longer."""
    growth: ClassVar[float] = 1
    """Of rounding, in the solve of a chunk whose keys are identical, with beta 2."""

    @property
    def ids(self):
        return IDS.repeat(self.stretch, axis=1)

    def pytest_generate_tests(self, metafunc):
        if "form" in metafunc.fixturenames:
            few = self.few if metafunc.function.__name__ in COMPILES else self.forms
            marked = [pytest.param(form, marks=() if form in few else EXHAUSTIVE) for form in self.forms]
            metafunc.parametrize("form", marked, ids=["-".join(form) for form in self.forms])

    def run(self, form, args, cotangents=None, segment_ids="packed", implementation=None, chunk_size=0):
        implementation = implementation or self.implementation
        cotangents = cotangents_of(args) if cotangents is None else cotangents
        segment_ids = self.ids if isinstance(segment_ids, str) else segment_ids
        chunk_size = None if implementation == "reference" else self.chunk if chunk_size == 0 else chunk_size
        return run(implementation, args, cotangents, segment_ids, kind=form[0], chunk_size=chunk_size)

    def close(self, ours, theirs, times=1):
        assert_close(ours, theirs, times * self.tolerance)

    def rounding(self, terms):
        """What a sum of such terms may be off by."""
        return self.tolerance * jnp.abs(terms).max()

    def compare(self, form, args, tolerance=None, times=1, **options):
        ours, theirs = (self.run(form, args, **options, implementation=name) for name in (None, "reference"))
        if tolerance is None:
            self.close(ours, theirs, times)
        else:
            assert_close(ours, theirs, tolerance)
        return ours

    def make(self, form, **changes):
        """Groups of queries, T not a multiple of the chunk, Hk != Hv. Of one shape: all run one program."""
        kind, decay = form
        sizes = dict(T=37 * self.stretch, N=4, K=2, dtype=self.dtype) | self.dims
        return make(kind=kind, decay=decay, **sizes | changes)

    def test_is_the_recurrence(self, form):
        self.compare(form, self.make(form))

    def test_runs_are_equal_bit_for_bit(self, form):
        args = self.make(form)
        assert_equal(self.run(form, args), self.run(form, args))

    def test_nothing_is_read_of_padding(self, form):
        args, padding = self.make(form), jnp.asarray(self.ids < 0)
        clean, (_, expected) = args, self.run(form, args)
        poisoned = {name: x if x.shape[:2] != padding.shape else jnp.where(expand(padding, x), jnp.nan, x)
                    for name, x in args.items()}  # fmt: skip
        ours = self.run(form, poisoned)
        assert_equal(ours, self.run(form, clean))
        for name, gradient in expected.items():
            if gradient.shape[:2] == padding.shape:
                assert not jnp.where(expand(padding, gradient), gradient, 0).any(), name
        assert not jnp.where(expand(padding, ours[0][0]), ours[0][0], 0).any()

    def test_documents_are_separate(self, form):
        """In one row they are what each is alone, in outputs and gradients; nothing passes between them."""
        args, ids = self.make(form), self.ids
        do, dstate = cotangents_of(args)
        (o, _), gradients = self.run(form, args, (do, dstate))
        sums, parts = jnp.zeros_like(o), jax.tree.map(jnp.zeros_like, gradients)
        documents = [3, 5, 6, 9, 0, 1]
        for number in documents:
            here = jnp.asarray(number == ids)
            first = here[:, 0]  # [B], whether it continues the initial state
            last = here.any(1) & ~jnp.asarray(number < ids).any(1)
            its = jnp.where(expand(here, do), do, 0), jnp.where(expand(last, dstate), dstate, 0)
            _, packed = self.run(form, args, its)
            for name in ("q", "k", "v"):
                assert not jnp.where(expand(here, packed[name]), 0, packed[name]).any(), name
            assert not packed["initial_state"][~first].any()
            start = jnp.where(expand(first, args["initial_state"]), args["initial_state"], 0)
            alone = dict(args, initial_state=start)
            (o_alone, _), own = self.run(form, alone, its, jnp.where(here, ids, -1))
            own["initial_state"] = jnp.where(expand(first, start), own["initial_state"], 0)
            sums, parts = sums + o_alone, jax.tree.map(jnp.add, parts, own)
        self.close((sums, parts), (o, gradients))

    def test_parts_are_the_whole(self, form):
        """Split anywhere, with the state passed on: what is not of a part is padding in it."""
        args = self.make(form)
        ids, cotangents = np.zeros_like(self.ids), cotangents_of(args)
        (o, state), gradients = self.run(form, args, cotangents, ids)
        tokens = np.arange(ids.shape[1])
        for split in (1, self.chunk, 23 * self.stretch):
            head, tail = (np.where((tokens < split) == early, 0, -1) + ids for early in (True, False))
            (first, passed), _ = self.run(form, args, cotangents, head)
            rest = dict(args) | dict(initial_state=passed)
            (second, last), late = self.run(form, rest, cotangents, tail)
            _, early = self.run(form, args, (cotangents[0], late["initial_state"]), head)
            self.close((first + second, last), (o, state))
            late["initial_state"] = jnp.zeros_like(passed)
            # Three results, each as far from the truth as one may be.
            self.close(jax.tree.map(jnp.add, early, late), gradients, times=3)

    def test_large_and_no_decays(self, form):
        if form[1] == "none":
            return
        args = self.make(form)
        shape = args["log_decay"].shape
        for most, least in ((-1e-3, -50.0), (-1e-3, -jnp.inf), (0.0, 0.0)):
            log_decay = np.where(np.random.default_rng(5).random(shape) < 0.3, least, most)
            args["log_decay"] = jnp.asarray(log_decay, args["log_decay"].dtype)
            out, gradients = self.compare(form, args)
            assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((out, gradients)))

    def test_nothing_is_left_of_the_state(self, form):
        """The gradient of a decay of e^-20, as small, may drown in rounded sums of terms like q dq."""
        if form[1] == "none":
            return
        args = self.make(form)
        args["log_decay"] = jnp.full_like(args["log_decay"], -20.0)
        (out, gradients), (others, theirs) = (self.run(form, args, implementation=name)
                                              for name in (None, "reference"))  # fmt: skip
        error = jnp.abs(gradients.pop("log_decay") - theirs.pop("log_decay")).max()
        assert error <= self.rounding(args["q"] * theirs["q"])
        self.close((out, gradients), (others, theirs))

    @pytest.mark.parametrize("keys", ["identical", "zero"])
    def test_keys_that_do_not_span(self, form, keys):
        args = self.make(form, max_beta=2.0)
        k = args["k"][:, :1, :1] if keys == "identical" else jnp.zeros((), args["k"].dtype)
        args["k"] = jnp.broadcast_to(k, args["k"].shape)
        if form[0] == "delta":
            args["beta"] = jnp.full_like(args["beta"], 2.0)
        self.compare(form, args, times=self.growth if keys == "identical" and form[0] == "delta" else 1)

    def test_decode_is_prefill(self, form):
        T = max(5, self.shortest)
        args = self.make(form, T=T)
        options = dict(kind=form[0], return_state=True)
        whole = linear_attention(**args, **options, implementation=self.implementation)
        step = jax.jit(lambda args: linear_attention(**args, **options, implementation=self.decoder))
        state, outputs = args.pop("initial_state"), []
        per_token = [name for name in args if args[name].ndim > 1]
        for t in range(T):
            token = dict(args) | {name: args[name][:, t : t + 1] for name in per_token}
            o, state = step(dict(token, initial_state=state))
            outputs.append(o)
        self.close((jnp.concatenate(outputs, 1), state), whole)

    def test_bfloat16(self, form):
        """As close to what float32 gives as bfloat16 can be: a few roundings of each output and gradient."""
        args = self.make(form, dtype="bfloat16")
        ours = (o, state), gradients = self.run(form, args)
        assert o.dtype == gradients["q"].dtype == jnp.bfloat16
        assert state.dtype == gradients["initial_state"].dtype == jnp.float32
        exact = self.run(form, args, implementation="reference")
        sizes = exact[0], dict(exact[1])
        if form[1] == "head":
            # What is rounded are the terms of that sum over tokens, which cancel.
            each = args | dict(log_decay=jnp.broadcast_to(args["log_decay"], args["k"].shape[:3]))
            terms = self.run((form[0], "token"), each, implementation="reference")[1]["log_decay"]
            sizes[1]["log_decay"] = jnp.linalg.norm(terms, axis=(0, 1))
        for a, b, size in zip(*map(jax.tree.leaves, (ours, exact, sizes)), strict=True):
            a, b, size = (np.asarray(x, "float64") for x in (a, b, size))
            assert np.sqrt(np.mean((a - b) ** 2)) <= 5e-3 * np.sqrt(np.mean(size**2))

    def test_states_are_not_rounded(self, form):
        """At 1024 bfloat16 has steps of 8, below it of 4: small writes add up only in float32, forward and
        backward. Those of the delta rule are along a key that finds nothing in the first state.
        """
        args = self.make(form, dtype="bfloat16")
        values = dict.fromkeys("qkv", 0.5) | dict(log_decay=0.0, initial_state=1024.0)
        T, Hk = args["k"].shape[1], args["k"].shape[-1]
        added = np.full((Hk, 1), T * 0.25)
        if form[0] == "delta":
            values |= dict(v=1024.0, beta=2.0**-13)
            values["k"] = 0.5 * jnp.asarray([1, -1, *[0] * (Hk - 2)], "bfloat16")
            added = 1024 * (1 - (1 - 2.0**-14) ** T) * np.array([[1], [-1], *[[0]] * (Hk - 2)])
        args = {name: jnp.full_like(x, values[name]) for name, x in args.items()}
        do, dstate = cotangents_of(args)
        cotangents, ids = (jnp.full_like(do, 0.5), jnp.full_like(dstate, 1024.0)), np.zeros_like(self.ids)
        (_, state), gradients = self.run(form, args, cotangents, ids)
        # The delta rule's products see a rounded state, not what was added to it: 2 of 1024 that they read.
        tolerance = 1e-3 if form[0] == "decay" else 5e-3 * self.stretch
        np.testing.assert_allclose(state - 1024, np.broadcast_to(added, state.shape), atol=tolerance)
        # Two queries a state, and a scale that bfloat16 rounds.
        added = T * 2 * 0.25 * Hk**-0.5
        np.testing.assert_allclose(gradients["initial_state"], 1024 + added, atol=0.01 * added)

    def test_float64(self, form):
        with jax.enable_x64(True):
            self.compare(form, self.make(form, dtype="float64"), tolerance=1e-12)

    def test_finite_differences(self, form):
        with jax.enable_x64(True):
            args = self.make(form, dtype="float64")
            cotangents = cotangents_of(args)
            _, gradients = self.run(form, args, cotangents)
            along = {
                name: rand((8, i), *x.shape, dtype="float64") for i, (name, x) in enumerate(args.items())
            }

            def value(sign):
                moved = jax.tree.map(lambda x, d: x + sign * 1e-5 * d, args, along)
                out, _ = self.run(form, moved, cotangents)
                return sum(jnp.sum(x * d) for x, d in zip(out, cotangents, strict=True))

            expected = sum(jnp.sum(gradients[name] * along[name]) for name in args)
            assert abs((value(1) - value(-1)) / 2e-5 - expected) < 1e-6 * abs(expected)

    @pytest.mark.exhaustive
    @pytest.mark.parametrize(("T", "chunk_size"), [(200, 64), (130, 128), (1, None), (1100, None), (64, 16)])
    def test_any_length_and_chunk(self, form, T, chunk_size):
        args = self.make(form, T=max(T, self.shortest), rate=0.1)
        self.compare(form, args, segment_ids=None, chunk_size=chunk_size, tolerance=5e-5)
        args.pop("initial_state")
        self.compare(form, args, segment_ids=None, chunk_size=chunk_size, tolerance=5e-5)

    @pytest.mark.exhaustive
    def test_many_tokens(self, form):
        args = self.make(form, B=1, T=65536, N=1, K=1, Hk=4, Hv=4, rate=0.01)
        self.compare(form, args, segment_ids=None, chunk_size=None, tolerance=1e-4)

    def test_special_cases(self):
        """One form of decay as another; keys that are orthonormal are recalled."""
        forms = [form for form in self.forms if form[1] in ("none", "token")]
        for kind, decay in forms:
            args = self.make((kind, decay))
            if decay == "none":
                same = dict(args, log_decay=jnp.zeros((2,)))
                other = (kind, "head")
            else:
                same = dict(args, log_decay=jnp.repeat(args["log_decay"][..., None], args["k"].shape[-1], -1))
                other = (kind, "channel")
            if other in self.forms:
                (out, gradients), (others, theirs) = self.run((kind, decay), args), self.run(other, same)
                self.close(out, others)
                ours, theirs = ({name: x[name] for name in "qkv"} for x in (gradients, theirs))
                self.close(ours, theirs)
        if ("delta", "none") in self.forms:
            args = self.make(("delta", "none"))
            T, Hk = args["k"].shape[1], args["k"].shape[-1]
            keys = np.linalg.qr(np.random.default_rng(0).normal(size=(Hk, Hk)))[0]
            args["k"] = args["k"].at[:, :Hk].set(keys[:, None].astype(self.dtype))
            args["beta"] = jnp.ones_like(args["beta"])
            ids = np.where(np.arange(T) < Hk, 0, -1) * np.ones((2, 1), int)
            (_, state), _ = self.run(("delta", "none"), args, segment_ids=ids)
            recalled = jnp.einsum("BKij,ti->BtKj", state, keys)
            self.close(recalled, args["v"][:, :Hk])


def expand(x, like):
    """With axes of one at its end, as many as `like` has."""
    return x.reshape(*x.shape, *(1,) * (like.ndim - x.ndim))
