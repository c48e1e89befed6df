"""What every backend of `block_sparse_attention` must do; one subclass a backend.

`compare` runs a call and its gradients, with random cotangents for `o` and for `lse`, against the dense
oracle. Shapes are tiny: T of about 64 to 100, blocks of 16. What a backend computes in, and how close it must
come, it says with `shapes` and `agree`.
"""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blockjax.kernels.block_sparse_attention import DistanceBias, block_sparse_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from blockjax.errors import UsageError
from blockjax.masks import FAR, FULL_TAG, BlockMask, Causal, Function, Window
from tests.jaxprs import arrays

T, S = 80, 96
BLOCKS = dict(bq=16, bk=16)


def random_blocks(seed, *shape, density=0.4):
    return np.random.default_rng(seed).random(shape) < density


def make(seed, mask, B=2, N=4, K=2, H=8, Hv=8, dtype="float32"):
    """Random `(q, k, v)` and cotangents `(do, dlse)`."""
    rng = np.random.default_rng(seed)
    shapes = (B, mask.T, N, H), (B, mask.S, K, H), (B, mask.S, K, Hv), (B, mask.T, N, Hv), (B, N, mask.T)
    q, k, v, do, dlse = (rng.normal(size=shape) for shape in shapes)
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v)), (
        jnp.asarray(do, dtype),
        jnp.asarray(dlse, "float32"),
    )


def both(implementation, inputs, cotangents, mask, arrays=None, learned=None, scale=None, soft_cap=None):
    """`o`, `lse` and the gradients of q, k, v and of the `learned` scalars (slope, sinks)."""

    def call(inputs, learned):
        extra = dict(learned or {})
        bias = DistanceBias(extra.pop("slope")) if "slope" in extra else None
        return block_sparse_attention(
            *inputs, mask, bias=bias, **extra, **(arrays or {}), scale=scale, soft_cap=soft_cap,
            return_lse=True, implementation=implementation,
        )  # fmt: skip

    (o, lse), pullback = jax.vjp(call, inputs, learned)
    do, dlse = cotangents
    return o, lse, *pullback((do, dlse.astype(lse.dtype)))


run = jax.jit(both, static_argnames=("implementation", "scale", "soft_cap"))
"""With everything traced, the mask too."""


def assert_close(ours, theirs, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, "float64"), np.asarray(b, "float64")
        np.testing.assert_allclose(
            a, b, atol=tolerance * max(1.0, np.abs(b[np.isfinite(b)]).max(initial=0)), rtol=0
        )


def gradients(attend):
    """Of `sum(attend(q, k, v) * do)`, as a function of q, k, v and do."""
    return jax.grad(lambda q, k, v, do: jnp.sum(attend(q, k, v) * do), (0, 1, 2))


def traced_top_k(mask, W):
    """Unsorted lists with duplicates and padding, as a selector inside jit may produce them."""
    rng = np.random.default_rng(3)
    index = rng.integers(-1, mask.nk, (1, 2, mask.nq, W))
    return jnp.asarray(index), jnp.asarray((index >= 0).sum(-1))


MASKS = {
    "causal": lambda: BlockMask.causal(T, **BLOCKS),
    "causal-ragged": lambda: BlockMask.causal(77, 90, bq=32, bk=16, q_offset=9),
    "window": lambda: BlockMask.window(T, left=20, **BLOCKS),
    "window-both-sides": lambda: BlockMask.window(T, S, left=11, right=9, bq=16, bk=32),
    "window-wide": lambda: BlockMask.window(T, left=FAR, **BLOCKS),
    "chunked": lambda: BlockMask.chunked(T, S, size=24, **BLOCKS),
    "full-ragged": lambda: BlockMask.full(50, 70, **BLOCKS),
    "shifted-keys": lambda: BlockMask.causal(T, T, **BLOCKS, q_offset=64, kv_offset=40),
    "function": lambda: BlockMask.from_predicate(lambda pq, pk: (pq + pk) % 7 < 2, T, S, **BLOCKS),
    "lists-shared": lambda: BlockMask.from_block_bool(random_blocks(0, 5, 6), T, S, **BLOCKS),
    "lists-key-heads": lambda: BlockMask.from_block_bool(random_blocks(1, 2, 5, 6), T, S, **BLOCKS),
    "lists-query-heads": lambda: BlockMask.from_block_bool(
        random_blocks(2, 4, 5, 6), 75, 90, **BLOCKS, predicate=Causal()
    ),
    "lists-batch": lambda: BlockMask.from_block_bool(random_blocks(3, 2, 1, 5, 6), T, S, **BLOCKS),
    "lists-batch-heads": lambda: BlockMask.from_block_bool(random_blocks(4, 2, 4, 5, 6), T, S, **BLOCKS),
    "wide-blocks": lambda: BlockMask.from_block_bool(random_blocks(5, 2, 2, 2), 300, 280, bq=150, bk=140),
    "and": lambda: BlockMask.chunked(T, size=32, **BLOCKS) & BlockMask.causal(T, **BLOCKS),
    "and-lists": lambda: (
        BlockMask.from_block_bool(random_blocks(6, 4, 5, 5, density=0.7), **BLOCKS)
        & BlockMask.causal(T, **BLOCKS)
    ),
    "or": lambda: (
        BlockMask.window(T, left=9, **BLOCKS)
        | BlockMask.from_block_bool(random_blocks(7, 2, 5, 5), **BLOCKS, predicate=Causal())
        | BlockMask.chunked(T, size=20, **BLOCKS)
    ),
}


class AttentionSuite:
    implementation: ClassVar[str]
    shapes: ClassVar = dict(H=8, Hv=8, dtype="float32")
    """Of `make`, where a test does not name others."""

    def make(self, seed, mask, **shapes):
        return make(seed, mask, **self.shapes | shapes)

    def agree(self, f, *arrays, tolerance=2e-5, expected=None):
        """Asserts that `f(implementation, *arrays)` is what it is with the oracle, or what `expected` is."""
        ours = f(self.implementation, *arrays)
        theirs = f("reference", *arrays) if expected is None else expected(self.implementation, *arrays)
        assert_close(ours, theirs, tolerance)
        return ours

    def compare(self, mask, tolerance=2e-5, shapes=None, seed=0, **options):
        inputs, cotangents = self.make(seed, mask, **(shapes or {}))
        ours = self.agree(
            lambda implementation, *x: run(implementation, *x, mask, **options),
            inputs,
            cotangents,
            tolerance=tolerance,
        )
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((ours[0], ours[2:])))
        return ours

    @pytest.mark.parametrize("name", MASKS)
    @pytest.mark.sample(
        "causal-ragged",
        "window-both-sides",
        "chunked",
        "function",
        "wide-blocks",
        "and-lists",
        "or",
        "lists-*",
    )
    def test_masks(self, name):
        self.compare(MASKS[name]())

    def test_everything_at_once(self, Hv=12):
        segments = np.sort(np.random.default_rng(1).integers(-1, 3, (2, T)))
        kv_segments = np.sort(np.random.default_rng(2).integers(-1, 3, (2, S)))
        self.compare(
            MASKS["lists-batch-heads"]() | BlockMask.window(T, S, left=10, **BLOCKS),
            shapes=dict(Hv=Hv),
            soft_cap=2.0,
            scale=0.7,
            arrays=dict(q_segment_ids=segments, kv_segment_ids=kv_segments),
            learned=dict(slope=jnp.array([0.0, 0.1, 0.3, 1.0]), sinks=jnp.array([-2.0, 0.0, 1.0, 3.0])),
        )

    @pytest.mark.parametrize("shapes", [dict(N=3, K=3), dict(N=4, K=1, Hv=4), dict(B=1, N=1, K=1, H=5, Hv=3)])
    def test_heads(self, shapes):
        self.compare(BlockMask.window(60, left=17, **BLOCKS), shapes=shapes)

    @pytest.mark.parametrize("name", ["causal", "lists-query-heads"])
    @pytest.mark.parametrize(
        "options",
        [
            dict(soft_cap=1.5),
            dict(learned=dict(sinks=jnp.array([-1.0, 0.0, 2.0, 9.0]))),
            dict(learned=dict(slope=jnp.array([0.01, 0.1, 0.5, 2.0]))),
        ],
        ids=["soft_cap", "sinks", "slope"],
    )
    def test_options(self, name, options):
        self.compare(MASKS[name](), **options)

    def test_float64(self):
        with jax.enable_x64(True):
            mask = MASKS["or"]()
            learned = dict(sinks=jnp.ones(4), slope=jnp.full(4, 0.2))
            self.compare(mask, tolerance=1e-12, shapes=dict(dtype="float64"), learned=learned, soft_cap=2.0)

    def test_finite_differences(self):
        with jax.enable_x64(True):
            mask = BlockMask.window(24, left=9, bq=8, bk=8)
            inputs, _ = self.make(0, mask, B=1, N=2, K=1, H=4, Hv=4, dtype="float64")

            def f(q, k, v, slope, sinks):
                return block_sparse_attention(
                    q, k, v, mask, bias=DistanceBias(slope), sinks=sinks, return_lse=True,
                    implementation=self.implementation,
                )  # fmt: skip

            args = (*inputs, jnp.array([0.1, 0.4]), jnp.array([0.3, -1.0]))
            check_grads(f, args, order=1, modes=["rev"], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("name", ["causal", "lists-query-heads"])
    def test_bfloat16(self, name):
        mask = MASKS[name]()
        inputs, cotangents = self.make(0, mask, dtype="bfloat16")
        ours = run(self.implementation, inputs, cotangents, mask)
        exact = run("reference", *jax.tree.map(lambda x: x.astype("float32"), (inputs, cotangents)), mask)
        assert ours[0].dtype == jnp.bfloat16 and ours[1].dtype == jnp.float32
        assert all(x.dtype == jnp.bfloat16 for x in ours[2])
        assert_close(ours, exact, 3e-2)

    def test_rising_scores_force_rescaling(self, block=16):
        T = 5 * block
        mask = BlockMask.causal(T, bq=block, bk=block)
        (q, k, v), cotangents = self.make(0, mask)
        q = jnp.abs(q)
        k = jnp.linspace(-30, 30, T, dtype=k.dtype)[:, None, None] * jnp.ones_like(k)
        self.agree(lambda implementation, *x: run(implementation, *x, mask), (q, k, v), cotangents)

    def test_segments_equal_separate_calls(self):
        mask = BlockMask.causal(64, **BLOCKS)
        (q, k, v), _ = self.make(0, mask)
        ids = jnp.repeat(jnp.array([[0, 4]]), 32, axis=1).repeat(2, 0)

        def whole(implementation, q, k, v):
            return block_sparse_attention(q, k, v, mask, q_segment_ids=ids, implementation=implementation)

        def parts(implementation, *x):
            half = BlockMask.causal(32, **BLOCKS)
            halves = (tuple(a[:, i] for a in x) for i in (slice(0, 32), slice(32, 64)))
            outputs = (block_sparse_attention(*h, half, implementation=implementation) for h in halves)
            return jnp.concatenate([*outputs], 1)

        self.agree(whole, q, k, v, expected=parts)

    def test_disjoint_segments_read_nothing(self):
        """Ids prove the other document's tiles empty: NaN in them stays there."""
        mask = BlockMask.full(256, bq=128, bk=128)
        (q, k, v), cotangents = self.make(0, mask, B=1)
        ids = jnp.repeat(jnp.array([[0, 1]]), 128, axis=1)
        k, v = (x.at[:, 128:].set(jnp.nan) for x in (k, v))
        arrays = dict(q_segment_ids=ids)
        o, lse, (dq, dk, dv), _ = run(self.implementation, (q, k, v), cotangents, mask, arrays)
        assert all(jnp.isfinite(x[:, :128]).all() for x in (o, lse.swapaxes(1, 2), dq, dk, dv))

    def test_negative_segments_see_nothing(self):
        mask = BlockMask.causal(48, **BLOCKS)
        ids = jnp.where(jnp.arange(48) < 20, 0, -1)[None].repeat(2, 0)
        o, lse, (dq, dk, dv), _ = self.compare(mask, arrays=dict(q_segment_ids=ids))
        assert (o[:, 20:] == 0).all() and (lse[..., 20:] == -jnp.inf).all()
        assert all((x[:, 20:] == 0).all() for x in (dq, dk, dv))

    def test_empty_rows_and_columns(self, block=16):
        blocks = np.ones((5, 6), bool)
        blocks[2], blocks[:, 3] = False, False
        mask = BlockMask.from_block_bool(blocks, bq=block, bk=block)
        o, lse, (dq, dk, dv), _ = self.compare(mask)
        rows, columns = slice(2 * block, 3 * block), slice(3 * block, 4 * block)
        assert (o[:, rows] == 0).all() and (lse[..., rows] == -jnp.inf).all() and (dq[:, rows] == 0).all()
        assert (dk[:, columns] == 0).all() and (dv[:, columns] == 0).all()

    def test_no_block_at_all(self):
        o, lse, grads, _ = self.compare(BlockMask.from_block_bool(np.zeros((5, 6), bool), T, S, **BLOCKS))
        assert (o == 0).all() and (lse == -jnp.inf).all()
        assert all((g == 0).all() for g in grads)

    @pytest.mark.parametrize("form", ["ranges", "lists", "lists-heads"])
    def test_nan_in_unlisted_blocks_does_not_leak(self, form, block=16):
        T, S, sizes = 5 * block, 6 * block, dict(bq=block, bk=block)
        if form == "ranges":
            mask = BlockMask.window(T, S, left=block, **sizes, q_offset=2 * block)
        else:
            # Heads list different blocks and different numbers of them, so some finish early.
            blocks = random_blocks(1, *((4,) if form == "lists-heads" else ()), 5, 6)
            blocks[..., -1] = False
            mask = BlockMask.from_block_bool(blocks, T, S, **sizes)
        shapes = dict(K=4) if form == "lists-heads" else {}
        (q, k, v), cotangents = self.make(0, mask, **shapes)
        tags = np.broadcast_to(mask.tags()[0], (k.shape[2], mask.nq, mask.nk))
        read = tags.any(1) if form == "lists-heads" else tags[:1].any(1).repeat(k.shape[2], 0)
        clean = run(self.implementation, (q, k, v), cotangents, mask)
        poison = jnp.asarray(np.where(np.repeat(read, block, axis=1).T, 0, np.nan)[None, :, :, None], k.dtype)
        assert bool(jnp.isnan(poison).any())
        poisoned = run(self.implementation, (q, k + poison, v + poison), cotangents, mask)
        for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(poisoned), strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize("name", ["window", "lists-query-heads"])
    def test_nan_in_one_row_of_queries_stays_there(self, name):
        """A finished or empty tile must not multiply what another head still reads."""
        mask = MASKS[name]()
        (q, k, v), cotangents = self.make(0, mask)
        block = 1
        k = k.at[:, 16 * block : 16 * block + 16].set(jnp.nan)
        o, _, (dq, _, _), _ = run(self.implementation, (q, k, v), cotangents, mask)
        listed = np.broadcast_to(mask.tags()[0][..., block] > 0, (4, mask.nq))
        untouched = jnp.asarray(~np.repeat(listed, 16, axis=1)[:, : mask.T])
        assert untouched.any()
        for x in (o, dq):
            assert jnp.isfinite(x.swapaxes(1, 2)[:, untouched]).all()

    def test_lists_made_inside_jit(self):
        base = BlockMask.full(T, S, **BLOCKS)
        index, count = traced_top_k(base, W=5)
        inputs, cotangents = self.make(0, base)

        @functools.partial(jax.jit, static_argnums=0)
        def f(implementation, inputs, cotangents, index, count):
            mask = BlockMask.from_indices(index, count, T=T, S=S, **BLOCKS, predicate=Causal(), q_offset=16)
            return run(implementation, inputs, cotangents, mask)

        self.agree(f, inputs, cotangents, index, count)
        everything = jnp.full_like(count, 5)
        shuffled = f(self.implementation, inputs, cotangents, index[..., ::-1], everything)
        ordered = f(self.implementation, inputs, cotangents, index, everything)
        for a, b in zip(jax.tree.leaves(shuffled), jax.tree.leaves(ordered), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_mask_as_argument_equals_mask_closed_over(self):
        for name in ("window", "or"):
            mask = MASKS[name]()
            inputs, _ = self.make(0, mask)

            def as_argument(implementation, *x, mask=mask):
                attend = functools.partial(block_sparse_attention, implementation=implementation)
                return jax.jit(attend)(*x, mask)

            def closed_over(implementation, *x, mask=mask):
                attend = functools.partial(block_sparse_attention, mask=mask, implementation=implementation)
                return jax.jit(attend)(*x)

            self.agree(as_argument, *inputs, expected=closed_over, tolerance=1e-6)

    def test_one_scan_body_serves_every_window(self):
        windows = jnp.array([3, 20, 64, FAR])
        base = BlockMask.causal(T, **BLOCKS)
        (q, k, v), cotangents = self.make(0, base)
        traces = []

        @functools.partial(jax.jit, static_argnums=0)
        def layers(implementation, q, k, v, windows):
            def layer(h, left):
                traces.append(left)
                mask = BlockMask.window(T, left=left, **BLOCKS)
                return h + block_sparse_attention(h, k, v, mask, implementation=implementation), None

            return jax.lax.scan(layer, q, windows)[0]

        def scanned(implementation, q, k, v, do):
            o, pullback = jax.vjp(lambda *x: layers(implementation, *x, windows), q, k, v)
            return o, pullback(do)

        def looped(_, q, k, v, do):
            def loop(q, k, v):
                for left in windows.tolist():
                    mask = BlockMask.window(T, left=left, **BLOCKS)
                    q = q + block_sparse_attention(q, k, v, mask, implementation="reference")
                return q

            o, pullback = jax.vjp(loop, q, k, v)
            return o, pullback(do)

        self.agree(scanned, q, k, v, cotangents[0], expected=looped, tolerance=1e-4)
        before = len(traces)
        layers(self.implementation, q, k, v, jnp.array([1, 2, 3, 4]))
        layers(self.implementation, q, k, v, jnp.array([5, 6, 7, 8]))
        assert len(traces) <= before + 1

    @pytest.mark.parametrize("block", [(16, 16), (16, 64), (64, 32), (40, 24)])
    def test_block_size_does_not_matter(self, block):
        bq, bk = block
        mask = BlockMask.window(T, left=30, right=5, bq=bq, bk=bk)
        inputs, cotangents = self.make(0, mask)
        whole = BlockMask.window(T, left=30, right=5, bq=80, bk=80)
        with_mask = lambda mask: lambda implementation, *x: run(implementation, *x, mask)  # noqa: E731
        self.agree(with_mask(mask), inputs, cotangents, expected=with_mask(whole))

    def test_padding_of_lists_does_not_matter(self):
        index = np.array([[0, 2, 3], [1, 2, 4], [0, 3, 4], [0, 1, 2], [2, 3, 4]])
        count = np.array([3, 2, 0, 1, 3])
        padded = np.concatenate([index, np.full((5, 4), 99)], 1)
        masks = [BlockMask.from_indices(x, count, **BLOCKS) for x in (index, padded)]
        inputs, cotangents = self.make(0, masks[0])
        results = [run(self.implementation, inputs, cotangents, m) for m in masks]
        for a, b in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_permuted_blocks_with_positions(self):
        """Key blocks in another order, with their positions and lists, give the same result."""
        order = np.array([3, 0, 5, 1, 4, 2])
        blocks = random_blocks(8, 2, 5, 6, density=0.6)
        options = dict(predicate=Causal(), **BLOCKS)
        tokens = (order[:, None] * 16 + np.arange(16)).reshape(-1)
        plain = BlockMask.from_block_bool(blocks, T, S, **options)
        permuted = BlockMask.from_block_bool(blocks[..., order], T, S, **options)
        (q, k, v), cotangents = self.make(0, plain)
        positions = dict(kv_positions=jnp.asarray(tokens))

        def f(implementation, q, k, v, cotangents):
            inputs = q, k[:, tokens], v[:, tokens]
            return run(implementation, inputs, cotangents, permuted, arrays=positions)

        def expected(_, q, k, v, cotangents):
            o, lse, (dq, dk, dv), _ = run("reference", (q, k, v), cotangents, plain)
            return o, lse, (dq, dk[:, tokens], dv[:, tokens]), None

        self.agree(f, q, k, v, cotangents, expected=expected)

    def test_per_token_positions(self):
        rng = np.random.default_rng(5)
        arrays = dict(q_positions=rng.integers(0, 90, (2, 33)), kv_positions=rng.integers(0, 90, (2, 70)))
        mask = BlockMask.from_predicate(Window(40, 3), 33, 70, **BLOCKS, prune=False)
        self.compare(mask, arrays=arrays, learned=dict(slope=jnp.full(4, 0.05)))

    def test_full_promises_do_not_count_with_positions(self):
        mask = BlockMask.causal(T, **BLOCKS, q_offset=T)
        assert (mask.tags() >= FULL_TAG).all()
        self.compare(mask, arrays=dict(q_positions=jnp.arange(T) // 2))

    @pytest.mark.parametrize("new", [1, 3])
    def test_cached_decoding(self, new):
        """Slots in any order, empty ones with id -1 holding NaN-free rubbish: as attention over the past."""
        cache, left, B = 50, 12, 2
        rng = np.random.default_rng(6)
        slots = rng.permutation(cache)
        lengths = np.array([20, 41])
        everything = BlockMask.window(cache, left=left, **BLOCKS)
        inputs, _ = self.make(0, everything)
        kv_positions = np.zeros((B, cache), int)
        kv_segments = np.full((B, cache), -1)
        for b, length in enumerate(lengths):
            used = slots[:length]
            kv_positions[b, used], kv_segments[b, used] = np.arange(length), 0
        q_positions = lengths[:, None] - new + np.arange(new)
        rows = np.arange(B)[:, None]

        def cached(x):
            rubbish = 1e3 + jnp.zeros_like(x)
            for b, length in enumerate(lengths):
                rubbish = rubbish.at[b, slots[:length]].set(x[b, :length])
            return rubbish

        @functools.partial(jax.jit, static_argnums=0)
        def decode(implementation, q, k, v, left):
            mask = BlockMask.from_predicate(Window(left), new, cache, **BLOCKS, prune=False)
            return block_sparse_attention(
                q,
                k,
                v,
                mask,
                q_segment_ids=jnp.zeros((B, new), int),
                kv_segment_ids=jnp.asarray(kv_segments),
                q_positions=jnp.asarray(q_positions),
                kv_positions=jnp.asarray(kv_positions),
                implementation=implementation,
            )

        def step(implementation, q, k, v):
            return decode(implementation, q[rows, q_positions], cached(k), cached(v), left)

        def expected(_, q, k, v):
            return block_sparse_attention(q, k, v, everything, implementation="reference")[rows, q_positions]

        self.agree(step, *inputs, expected=expected)

    def test_offset_decoding_visits_the_window_only(self):
        inputs, _ = self.make(0, BlockMask.causal(T, **BLOCKS))
        counts = []

        @functools.partial(jax.jit, static_argnums=0)
        def decode(implementation, q, k, v, at):
            mask = BlockMask.window(1, T, left=20, **BLOCKS, q_offset=at)
            return block_sparse_attention(q, k, v, mask, implementation=implementation), mask.count(0)

        def step(implementation, q, k, v):
            o, count = decode(implementation, q[:, 50:51], k.at[:, :16].set(jnp.nan), v, 50)
            counts.append(count.item())
            return o

        def expected(_, q, k, v):
            window = BlockMask.window(T, left=20, **BLOCKS)
            return block_sparse_attention(q, k, v, window, implementation="reference")[:, 50:51]

        self.agree(step, *inputs, expected=expected)
        assert set(counts) == {3}  # tokens 31 to 50 lie in three blocks of 16

    def test_shards_of_a_mask_merge(self):
        """Each half of the keys under its piece of the mask, folded: what a ring does."""
        from blockjax import partials

        lists = BlockMask.from_block_bool(random_blocks(9, 4, 6, 6), **BLOCKS)
        for mask in (BlockMask.chunked(96, size=40, **BLOCKS), lists):
            inputs, _ = self.make(0, mask)

            def whole(implementation, *x, mask=mask):
                o, lse = block_sparse_attention(*x, mask, implementation=implementation, return_lse=True)
                return o.swapaxes(1, 2), lse

            @functools.partial(jax.jit, static_argnums=0)
            def piece(implementation, i, j, q, k, v, mask=mask):
                part = mask.rows(3 * i, 3).columns(3 * j, 3)
                at = lambda x, n: jax.lax.dynamic_slice_in_dim(x, 48 * n, 48, 1)  # noqa: E731
                o, lse = block_sparse_attention(
                    at(q, i), at(k, j), at(v, j), part, implementation=implementation, return_lse=True
                )
                return o.swapaxes(1, 2), lse

            def folded(implementation, *x, piece=piece):
                rows = [partials.fold(piece(implementation, i, j, *x) for j in range(2)) for i in range(2)]
                return jax.tree.map(lambda *halves: jnp.concatenate(halves, 2), *rows)

            self.agree(folded, *inputs, expected=whole)

    def test_bitwise_equal_from_run_to_run(self):
        mask = MASKS["lists-query-heads"]()
        inputs, cotangents = self.make(0, mask)
        first, second = (run(self.implementation, inputs, cotangents, mask) for _ in range(2))
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_vmap_and_remat(self):
        mask = MASKS["or"]()
        inputs, (do, _) = self.make(0, mask)

        def mapped(implementation, *x):
            @jax.remat
            def one(q, k, v):
                return block_sparse_attention(q[None], k[None], v[None], mask, implementation=implementation)[
                    0
                ]

            return jax.jit(gradients(jax.vmap(one)))(*x)

        def plain(_, *x):
            attend = functools.partial(block_sparse_attention, mask=mask, implementation="reference")
            return gradients(attend)(*x)

        self.agree(mapped, *inputs, do, expected=plain)

    def test_vmap_over_windows(self):
        inputs, _ = self.make(0, BlockMask.causal(T, **BLOCKS))

        def f(implementation, *x):
            def attend(left):
                mask = BlockMask.window(T, left=left, **BLOCKS)
                return block_sparse_attention(*x, mask, implementation=implementation)

            return jax.vmap(attend)(jnp.array([4, 40]))

        self.agree(f, *inputs)

    @pytest.mark.parametrize("check_vma", [True, False])
    @pytest.mark.parametrize("axis", ["batch", "queries"])
    def test_shard_map(self, axis, check_vma):
        """With queries sharded, each device sees all keys, and their gradients are summed over devices."""
        mask = BlockMask.from_block_bool(random_blocks(1, 2, 4, 6), 64, S, **BLOCKS, predicate=Causal())
        inputs, (do, _) = self.make(0, mask)
        n = min(2, jax.device_count())
        mesh = jax.make_mesh((n,), ("x",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:n])
        spec, kv_spec = (jax.P("x"), jax.P("x")) if axis == "batch" else (jax.P(None, "x"), jax.P())

        def sharded(implementation, *x):
            def local(q, k, v):
                rows = mask.nq // n
                part = mask if axis == "batch" else mask.rows(jax.lax.axis_index("x") * rows, rows)
                return block_sparse_attention(q, k, v, part, implementation=implementation)

            mapped = jax.shard_map(
                local, mesh=mesh, in_specs=(spec, kv_spec, kv_spec), out_specs=spec, check_vma=check_vma
            )
            return jax.jit(gradients(mapped))(*x)

        def whole(_, *x):
            attend = functools.partial(block_sparse_attention, mask=mask, implementation="reference")
            return jax.jit(gradients(attend))(*x)

        self.agree(sharded, *inputs, do, expected=whole)

    @pytest.mark.parametrize("form", ["ranges", "lists"])
    def test_memory_is_linear(self, form):
        """No array in forward or backward, inner loops included, is as large as T x S."""
        n = 2048
        mask = BlockMask.window(n, left=256, bq=128, bk=128)
        if form == "lists":
            mask = mask | BlockMask.from_block_bool(random_blocks(0, 2, 16, 16, density=0.2), bq=128, bk=128)
        x = jax.ShapeDtypeStruct((1, n, 2, max(16, self.shapes["H"])), self.shapes["dtype"])
        ids = jax.ShapeDtypeStruct((1, n), jnp.int32)

        def loss(q, k, v, ids):
            o, lse = block_sparse_attention(
                q, k, v, mask, q_segment_ids=ids, return_lse=True, implementation=self.implementation
            )
            return jnp.sum(o) + jnp.sum(lse)

        sizes = [a.size for a in arrays(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, x, x, ids).jaxpr)]
        assert len(sizes) > 200
        assert max(sizes) < n * n / 8

    @settings(max_examples=5, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_random_lists(self, data):
        T, S = data.draw(st.integers(1, 70), "T"), data.draw(st.integers(1, 70), "S")
        bq, bk = data.draw(st.sampled_from([8, 16, 32]), "bq"), data.draw(st.sampled_from([8, 16, 32]), "bk")
        b, h = data.draw(st.sampled_from([1, 2]), "b"), data.draw(st.sampled_from([1, 2, 4]), "h")
        blocks = random_blocks(
            data.draw(st.integers(0, 99), "seed"), b, h, -(-T // bq), -(-S // bk), density=0.5
        )
        predicate = data.draw(st.sampled_from([None, Causal(), Window(9, 4)]), "predicate")
        self.compare(BlockMask.from_block_bool(blocks, T, S, bq=bq, bk=bk, predicate=predicate))

    def test_unsupported_name(self):
        mask = BlockMask.causal(32, **BLOCKS)
        inputs, _ = self.make(0, mask)
        with pytest.raises(UsageError, match=r"no implementation 'cuda'.*xla"):
            block_sparse_attention(*inputs, mask, implementation="cuda")

    def test_traced_scalars_of_a_function(self):
        def every(pq, pk, n):
            return (pq - pk) % n == 0

        @functools.partial(jax.jit, static_argnums=0)
        def f(implementation, n, *x):
            mask = BlockMask.from_predicate(Function(every, (n,)), T, S, **BLOCKS)
            return block_sparse_attention(*x, mask, implementation=implementation)

        inputs, _ = self.make(0, BlockMask.full(T, S, **BLOCKS))
        self.agree(f, 3, *inputs)
