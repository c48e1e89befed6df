"""Walks list exactly what the mask and the segment ids leave, and call full only what is."""

import jax
import numpy as np
import pytest
from blockjax.kernels.block_sparse_attention import plan, reference
from blockjax.kernels.block_sparse_attention.spec import Inputs

from blockjax.masks import FULL_TAG, BlockMask
from tests.kernels.block_sparse_attention_suite import MASKS

LISTS = [name for name, make in MASKS.items() if not hasattr(make(), "bounds")]


def inputs(mask, segments=False, positions=False, seed=0):
    B, N = 2, 4
    q, k = np.zeros((B, mask.T, N, 8), "f"), np.zeros((B, mask.S, 2, 8), "f")
    rng = np.random.default_rng(seed)
    ids = [np.sort(rng.integers(-1, 4, (B, n)).astype("i")) if segments else None for n in (mask.T, mask.S)]
    where = [
        np.broadcast_to(np.arange(n, dtype="i"), (1, n)) if positions else None for n in (mask.T, mask.S)
    ]
    return Inputs(q, k, k, mask, None, *ids, *where)


def walked(walk, n):
    """`{(b, h, row): (partial, full)}` as sets of (block, tag), read as a kernel reads them."""
    found = {}
    if isinstance(walk, plan.RangeWalk):
        for b, bounds in enumerate(np.asarray(walk.bounds)):
            for row, (lo, full_lo, full_hi, hi) in enumerate(bounds.T):
                assert lo <= full_lo <= full_hi <= hi
                partial = [*range(lo, full_lo), *range(full_hi, hi)]
                found[b, 0, row] = ({(i, 1) for i in partial}, {(i, 1) for i in range(full_lo, full_hi)})
        return found
    entries, start, partial, total = map(np.asarray, walk)
    for b, h, row in np.ndindex(start.shape):
        first = start[b, h, row]
        listed = entries[b, h, first : first + total[b, h, row]]
        listed = [(int(e) >> plan.TAG_BITS, int(e) & (1 << plan.TAG_BITS) - 1) for e in listed]
        cut = partial[b, h, row]
        assert listed[:cut] == sorted(listed[:cut]) and listed[cut:] == sorted(listed[cut:])
        found[b, h, row] = set(listed[:cut]), set(listed[cut:])
        assert len(found[b, h, row][0]) + len(found[b, h, row][1]) == total[b, h, row]
    assert start.shape[2] == n
    return found


@pytest.mark.parametrize("traced", [False, True], ids=["concrete", "traced"])
@pytest.mark.parametrize("name", MASKS)
def test_walks_list_what_the_mask_lists(name, traced):
    mask = MASKS[name]()
    make = jax.jit if traced else lambda f: f
    tags = np.asarray(mask.tags())
    rows = walked(make(plan.rows)(inputs(mask)), mask.nq)
    columns = walked(make(plan.columns)(inputs(mask)), mask.nk)
    for walk, axis in ((rows, 3), (columns, 2)):
        for (b, h, i), (partial, full) in walk.items():
            row = np.take(tags[b, h], i, axis - 2 - 1)
            assert full == {(j, t & 127) for j, t in enumerate(row.tolist()) if t >= FULL_TAG}
            assert partial == {(j, t) for j, t in enumerate(row.tolist()) if 0 < t < FULL_TAG}


@pytest.mark.parametrize("name", ["causal", "window-both-sides", "lists-query-heads", "or"])
def test_segments_drop_tiles_and_never_promise_too_much(name):
    mask = MASKS[name]()
    call = inputs(mask, segments=True)
    seen = np.asarray(reference.visible(call))
    listed_before = np.asarray(mask.tags()) > 0
    rows = walked(jax.jit(plan.rows)(call), mask.nq)
    columns = walked(jax.jit(plan.columns)(call), mask.nk)
    dropped = 0
    for b, head, i, j in np.ndindex(2, seen.shape[1], mask.nq, mask.nk):
        h = head * listed_before.shape[1] // seen.shape[1]
        tile = seen[b, head, i * mask.bq : (i + 1) * mask.bq, j * mask.bk : (j + 1) * mask.bk]
        for partial, full, block in ((*rows[b, h, i], j), (*columns[b, h, j], i)):
            is_full, is_listed = (block in {x for x, _ in s} for s in (full, partial | full))
            assert is_listed or not tile.any()
            assert not is_full or (tile.all() and tile.shape == (mask.bq, mask.bk))
        dropped += bool(listed_before[0, h, i, j]) and not is_listed
    assert dropped > 0


def test_given_positions_promise_nothing():
    mask = BlockMask.causal(64, bq=16, bk=16)
    for walk in (plan.rows(inputs(mask, positions=True)), plan.columns(inputs(mask, positions=True))):
        assert all(not full for _, full in walked(walk, 4).values())


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_longest_walks_start_first(groups):
    mask = MASKS["lists-query-heads"]()
    walk = plan.rows(inputs(mask))
    order = plan.longest_first(walk, groups)
    visits = np.asarray(mask.counts_per_row()).reshape(1, groups, -1, mask.nq).sum(2)
    assert (np.diff(np.take_along_axis(visits, order, -1)) <= 0).all()
    assert (np.sort(order) == np.arange(mask.nq)).all()
    np.testing.assert_array_equal(order, jax.jit(plan.longest_first, static_argnums=1)(walk, groups))


@pytest.mark.parametrize(
    "mask", [BlockMask.causal(1 << 20), BlockMask.window(1 << 20, left=4096)], ids=["causal", "window"]
)
def test_a_million_tokens_take_no_memory(mask):
    walks = plan.rows(Inputs(None, None, None, mask)), plan.columns(Inputs(None, None, None, mask))
    assert sum(x.nbytes for x in jax.tree.leaves(walks)) <= 1 << 19
    assert sum(np.asarray(x).nbytes for x in jax.tree.leaves(mask)) < 100
