"""`BlockMask` against brute force: tiles, tags, counts; both forms, concrete and traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockjax.errors import UsageError
from blockjax.masks import (
    FAR,
    FULL_TAG,
    BlockMask,
    Causal,
    Chunked,
    Everything,
    Function,
    Lists,
    Ranges,
    Window,
)
from blockjax.masks.block_mask import MAX_PREDICATES

BLOCKS = dict(bq=8, bk=16)


def tokens(mask, definition):
    """`definition(pq, pk)` on all pairs of positions, [T, S]."""
    pq = mask.q_offset + np.arange(mask.T)[:, None]
    pk = mask.kv_offset + np.arange(mask.S)[None]
    return np.broadcast_to(np.asarray(definition(pq, pk)), (mask.T, mask.S))


def tile(mask, dense, row, block):
    return dense[row * mask.bq : (row + 1) * mask.bq, block * mask.bk : (block + 1) * mask.bk]


def check(mask, definition, exact=True):
    """Nothing visible is unlisted, full promises are true, and predicates agree with the definition."""
    dense = tokens(mask, definition)
    tags = np.asarray(mask.tags())
    assert tags.shape == (*mask.lists_shape, mask.nq, mask.nk)
    for row in range(mask.nq):
        for block in range(mask.nk):
            truth = tile(mask, dense, row, block)
            for tag in tags[:, :, row, block].flat:
                if not tag:
                    assert not truth.any(), (row, block)
                    continue
                granted = tokens(mask, lambda pq, pk, tag=tag: mask.visible(tag, pq, pk))
                np.testing.assert_array_equal(tile(mask, granted, row, block), truth)
                if tag & FULL_TAG:
                    assert truth.all() and truth.shape == (mask.bq, mask.bk), (row, block)
                elif exact:
                    assert truth.any() and not (truth.all() and truth.shape == (mask.bq, mask.bk)), (
                        row,
                        block,
                    )
    assert mask.visible_pairs() == dense.sum()
    assert mask.density() == pytest.approx((tags > 0).mean())
    assert mask.executed_pairs() == pytest.approx((tags > 0).mean() * mask.nq * mask.nk * mask.bq * mask.bk)


DEFINITIONS = {
    "causal": (lambda T, S, **g: BlockMask.causal(T, S, **g), lambda q, k: k <= q),
    "full": (lambda T, S, **g: BlockMask.full(T, S, **g), lambda q, k: (q == q) & (k == k)),
    "window": (lambda T, S, **g: BlockMask.window(T, S, left=13, **g), lambda q, k: (q - 13 < k) & (k <= q)),
    "both sides": (
        lambda T, S, **g: BlockMask.window(T, S, left=0, right=7, **g),
        lambda q, k: (q < k) & (k <= q + 7),
    ),
    "chunked": (lambda T, S, **g: BlockMask.chunked(T, S, size=24, **g), lambda q, k: q // 24 == k // 24),
    "and": (
        lambda T, S, **g: BlockMask.chunked(T, S, size=24, **g) & BlockMask.causal(T, S, **g),
        lambda q, k: (q // 24 == k // 24) & (k <= q),
    ),
    "predicate or": (
        lambda T, S, **g: BlockMask.from_predicate(Chunked(16) | Window(3, 20), T, S, **g),
        lambda q, k: (q // 16 == k // 16) | ((q - 3 < k) & (k <= q + 20)),
    ),
    "function": (
        lambda T, S, **g: BlockMask.from_predicate(lambda q, k: q % 16 > k % 40, T, S, **g),
        lambda q, k: q % 16 > k % 40,
    ),
}


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("sizes", [(64, 64, 8, 16), (61, 45, 16, 8), (5, 80, 8, 16)])
@pytest.mark.parametrize("offsets", [(0, 0), (20, 7)])
def test_builders_agree_with_brute_force(name, sizes, offsets):
    T, S, bq, bk = sizes
    build, definition = DEFINITIONS[name]
    mask = build(T, S, bq=bq, bk=bk, q_offset=offsets[0], kv_offset=offsets[1])
    check(mask, definition, exact=T % bq == 0)


def test_window_counts_the_query_itself():
    mask = BlockMask.window(64, left=1, **BLOCKS)
    assert mask.visible_pairs() == 64
    assert BlockMask.window(64, left=FAR, **BLOCKS).visible_pairs() == 64 * 65 / 2


def test_forms():
    assert isinstance(BlockMask.causal(64, **BLOCKS) & BlockMask.window(64, left=9, **BLOCKS), Ranges)
    assert isinstance(BlockMask.causal(64, **BLOCKS) | BlockMask.window(64, left=9, **BLOCKS), Lists)


def test_or_keeps_one_bit_a_predicate_and_tests_what_is_needed():
    a = BlockMask.window(64, left=5, **BLOCKS)
    b = BlockMask.from_block_bool(np.eye(8, 4, dtype=bool), 64, 64, **BLOCKS, predicate=Chunked(20))
    mask = a | b | BlockMask.window(64, left=5, **BLOCKS)
    assert len(mask.predicates) == 2

    def definition(q, k):
        return ((q - 5 < k) & (k <= q)) | ((q // 20 == k // 20) & (q // 8 == k // 16))

    check(mask, definition, exact=False)


def test_and_of_lists():
    blocks = np.random.default_rng(0).random((8, 4)) < 0.6
    lists = BlockMask.from_block_bool(blocks, 64, 64, **BLOCKS)
    check(lists & BlockMask.causal(64, **BLOCKS), lambda q, k: blocks[q // 8, k // 16] & (k <= q))
    both = lists & (BlockMask.causal(64, **BLOCKS) | BlockMask.chunked(64, size=16, **BLOCKS))
    check(both, lambda q, k: blocks[q // 8, k // 16] & ((k <= q) | (q // 16 == k // 16)), exact=False)


def test_at_most_seven_predicates():
    mask = BlockMask.chunked(64, size=2, **BLOCKS)
    for size in range(3, 9):
        mask = mask | BlockMask.chunked(64, size=size, **BLOCKS)
    with pytest.raises(UsageError, match=f"at most {MAX_PREDICATES}"):
        mask | BlockMask.chunked(64, size=20, **BLOCKS)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), b=st.integers(1, 2), h=st.integers(1, 3), density=st.floats(0, 1))
def test_lists_hold_what_the_blocks_say(seed, b, h, density):
    blocks = np.random.default_rng(seed).random((b, h, 5, 7)) < density
    mask = BlockMask.from_block_bool(blocks, **BLOCKS)
    np.testing.assert_array_equal(mask.tags() > 0, blocks)
    np.testing.assert_array_equal(mask.counts, blocks.sum(-1))
    assert mask.index.shape[-1] == max(1, blocks.sum(-1).max())
    again = BlockMask.from_indices(mask.index, mask.counts, S=7 * 16, **BLOCKS)
    np.testing.assert_array_equal(again.tags(), mask.tags())
    for row in range(5):
        for i in range(b):
            for j in range(h):
                n = mask.counts[i, j, row]
                assert (np.diff(mask.index[i, j, row, :n]) > 0).all()
                assert (mask.index[i, j, row, n:] == mask.index[i, j, row, max(n - 1, 0)]).all()


@pytest.mark.parametrize(
    "mask",
    [
        BlockMask.window(61, 50, left=12, right=3, **BLOCKS),
        BlockMask.from_block_bool(np.random.default_rng(0).random((2, 3, 8, 4)) < 0.5, **BLOCKS),
    ],
    ids=["ranges", "lists"],
)
def test_count_and_entry_inside_jit(mask):
    @jax.jit
    def read(mask):
        rows = jnp.arange(mask.nq)
        return jax.vmap(lambda r: (mask.count(r), *mask.entry(r, jnp.arange(mask.nk))))(rows)

    count, index, tag = map(np.asarray, read(mask))
    tags = mask.tags()
    b, h = mask.lists_shape
    for row in range(mask.nq):
        for i in range(b):
            for j in range(h):
                listed = np.flatnonzero(tags[i, j, row])
                n = count[row, i, j]
                np.testing.assert_array_equal(index[row, i, j, :n], listed)
                np.testing.assert_array_equal(tag[row, i, j, :n], tags[i, j, row, listed])


def test_traced_masks_equal_concrete_ones():
    def tags(left, blocks):
        window = BlockMask.window(64, left=left, **BLOCKS)
        lists = BlockMask.from_block_bool(blocks, 64, 64, **BLOCKS, predicate=Causal())
        either = BlockMask.from_predicate(Window(left) | Chunked(16), 64, **BLOCKS)
        return [m.tags() for m in (window, lists, window | lists, window & lists, either)]

    blocks = np.random.default_rng(1).random((2, 8, 4)) < 0.5
    for traced, concrete in zip(jax.jit(tags)(11, blocks), tags(11, blocks), strict=True):
        np.testing.assert_array_equal(np.asarray(traced) > 0, concrete > 0)
    window = jax.jit(lambda left: BlockMask.window(64, left=left, **BLOCKS).density())(11)
    assert float(window) == pytest.approx(BlockMask.window(64, left=11, **BLOCKS).density())


def test_traced_indices_are_sorted_and_made_unique():
    index = jnp.array([[3, 1, 1, 9, -1], [2, 0, 3, 0, 2], [-1, -1, -1, -1, -1], [1, 0, 0, 2, 3]])
    mask = jax.jit(lambda i: BlockMask.from_indices(i, bq=16, bk=16, predicate=Causal()))(index)
    assert [list(np.flatnonzero(row)) for row in mask.tags()[0, 0]] == [[1, 3], [0, 2, 3], [], [0, 1, 2, 3]]
    np.testing.assert_array_equal(mask.counts[0, 0], [2, 3, 0, 4])
    assert (np.asarray(mask.tags()[0, 0, 3]) >= FULL_TAG).tolist() == [True, True, True, False]


def test_listed_blocks_stay_listed_whatever_the_predicate():
    """A call may bring its own positions, for which the default ones prove nothing."""
    mask = BlockMask.from_block_bool(np.ones((1, 4), bool), 1, 64, bq=1, bk=16, predicate=Causal())
    assert (mask.tags() == 1).all()
    assert ((mask & BlockMask.causal(1, 64, bq=1, bk=16)).tags() > 0).tolist() == [
        [[[True, False, False, False]]]
    ]


def test_prune_false_lists_everything_and_promises_nothing():
    mask = BlockMask.from_predicate(Causal(), 20, 64, **BLOCKS, prune=False)
    assert (mask.tags() == 1).all()


def test_mask_built_inside_jit_from_numbers_stays_concrete():
    @jax.jit
    def f(x):
        masks = (
            BlockMask.window(64, left=9, **BLOCKS),
            BlockMask.from_predicate(lambda q, k: jnp.abs(q - k) < 3, 32, **BLOCKS),
        )
        assert all(isinstance(m.density(), float) for m in masks)
        return x

    f(1.0)


def test_rows_and_columns_are_pieces_of_the_mask():
    lists = BlockMask.from_block_bool(np.random.default_rng(2).random((3, 6, 4)) < 0.5, **BLOCKS)
    for mask in (BlockMask.chunked(48, 64, size=20, **BLOCKS), lists):
        want = mask.tags()[:, :, 2:5, 1:3]
        np.testing.assert_array_equal(mask.rows(2, 3).columns(1, 2).tags(), want)
        traced = jax.jit(lambda i, j, mask=mask: mask.rows(i, 3).columns(j, 2).tags())(2, 1)
        np.testing.assert_array_equal(traced, want)
    ragged = BlockMask.causal(50, **BLOCKS).rows(5, 2)
    assert ragged.T == 10
    with pytest.raises(UsageError, match="whole blocks, got T=50"):
        jax.jit(lambda i: BlockMask.causal(50, **BLOCKS).rows(i, 2))(1)


def test_one_jit_entry_for_all_windows():
    f = jax.jit(lambda mask: mask.density())
    for left in (1, 5, 30):
        f(BlockMask.window(64, left=left, **BLOCKS))
    assert f._cache_size() == 1


def test_predicate_algebra():
    assert jax.tree.structure(Causal()) != jax.tree.structure(Everything())
    assert isinstance(Causal() & Everything(), Causal)
    assert isinstance(Everything() | Causal(), Everything)
    assert isinstance(Causal() | Causal(), Causal)
    assert repr(Window(9)) == "Window(9, 0)"


def test_repr_is_short_and_useful():
    text = repr(BlockMask.window(8192, left=1024))
    assert text == "BlockMask(T=8192, S=8192, blocks 128x128, ranges of Window(1024, 0), density 13.2%)"
    traced = []
    jax.jit(lambda left: traced.append(repr(BlockMask.window(64, left=left))))(3)
    assert traced == ["BlockMask(T=64, S=64, blocks 128x128, ranges of Window(traced, 0), traced)"]
    lists = BlockMask.from_predicate(Function(np.less), 64, **BLOCKS) | BlockMask.causal(64, **BLOCKS)
    assert "lists [1, 1] of Function(less, ()) | Causal()" in repr(lists)


@pytest.mark.parametrize("which", ["one", "heads", "many"])
def test_plot(which):
    import matplotlib.pyplot as plt

    mask = {
        "one": BlockMask.window(100, left=20, **BLOCKS),
        "heads": BlockMask.from_block_bool(np.random.default_rng(0).random((3, 6, 4)) < 0.5, **BLOCKS),
        "many": BlockMask.causal(1200, **BLOCKS),
    }[which]
    figure = mask.plot(head=2 if which == "heads" else 0)
    (axes,) = figure.axes
    assert "blocks visited" in axes.get_title() and axes.get_xlabel() == "key token"
    assert axes.get_ylim() == (mask.T, 0)
    figure.canvas.draw()
    plt.close(figure)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BlockMask.causal(0), "T must be a positive integer.*T=0"),
        (lambda: BlockMask.causal(8, bq=0), "bq=0"),
        (lambda: BlockMask.causal(8.0), "T=8.0"),
        (lambda: BlockMask.window(8, left=-1), "left=-1"),
        (lambda: BlockMask.window(8, left=FAR + 1), f"left={FAR + 1}"),
        (lambda: BlockMask.window(8, left=0), "sees nothing"),
        (lambda: BlockMask.chunked(8, size=0), "size=0"),
        (lambda: BlockMask.from_block_bool(np.ones(4)), r"got shape \(4,\)"),
        (lambda: BlockMask.from_block_bool(np.ones((2, 3)), 64, 64, bq=16, bk=16), r"\(2, 3\).*\(4, 4\)"),
        (
            lambda: BlockMask.from_indices([[0, 0]], **BLOCKS, S=64),
            r"Key block 0 at \[0, 0, 0, 1\] appears twice",
        ),
        (lambda: BlockMask.from_indices([[2, 1]], **BLOCKS, S=64), "Key block 1 .* smaller"),
        (lambda: BlockMask.from_indices([[2, 4]], **BLOCKS, S=64), "Key block 4 .* 4 key blocks"),
        (lambda: BlockMask.from_indices([[-1, 1]], **BLOCKS, S=64), "Key block 1 .* after padding"),
        (lambda: BlockMask.from_indices([[0, 1]], [[2]], **BLOCKS, S=64), r"Counts of shape \(1, 1\)"),
        (lambda: BlockMask.from_indices([[0, 1]], **BLOCKS, T=64), "1 rows, but T=64 with bq=8 has 8"),
        (lambda: BlockMask.causal(64) & BlockMask.causal(32), r"\(64, 64, 128, 128\) and \(32, 32"),
        (lambda: BlockMask.causal(64) | BlockMask.causal(64, q_offset=1), "same q_offset"),
        (lambda: BlockMask.causal(64).plot(head=1), "1 heads, got batch=0, head=1"),
        (lambda: jax.jit(lambda n: BlockMask.window(64, left=n).visible_pairs())(3), "outside jit"),
    ],
)
def test_mistakes_are_named_with_their_numbers(build, message):
    with pytest.raises(UsageError, match=message):
        build()


def test_counting_a_long_context_is_linear():
    mask = BlockMask.window(2**20, left=2**14, bq=1024, bk=1024)
    n, w = 2**20, 2**14
    assert mask.visible_pairs() == n * w - w * (w - 1) / 2
