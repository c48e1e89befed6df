"""The visits of a call as the fast backends walk them: per row of tiles, or per column, partial tiles first.

A kernel needs no more of a `BlockMask` than a `Walk`: for each row of query blocks the key blocks to visit,
those whose predicate must be tested before those that are full, and for the backward the same per key block.
Segment ids are folded in: a tile whose ids prove it empty is dropped, and one in which they may differ is
partial.

Blocks are counted, tokens never: what is quadratic here is a reduction over blocks that XLA fuses, or as
long as the stored lists. Concrete masks give concrete walks, which become constants of the program.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from blockjax.kernels.block_sparse_attention.spec import Inputs

from blockjax.masks import FULL_TAG, Ranges
from blockjax.masks.blocks import count_before
from blockjax.masks.predicates import array_module

TAG_BITS = 7
"""An entry of a `ListWalk` is `block << TAG_BITS | tag`: which predicates may grant visibility."""


class RangeWalk(NamedTuple):
    """`bounds` [1 | B, 4, n] int32: `lo, full_lo, full_hi, hi` of each row.

    It visits the partial tiles `lo .. full_lo` and `full_hi .. hi`, then the full ones between.
    """

    bounds: jax.Array


class ListWalk(NamedTuple):
    """`entries` [b, h, X] int32; row i visits those from `start[i]` on: `partial[i]` partial ones, then full.

    `start`, `partial`, `total` are [b, h, n] int32, `total` counts both; b and h are as the mask's lists.
    """

    entries: jax.Array
    start: jax.Array
    partial: jax.Array
    total: jax.Array


Walk = RangeWalk | ListWalk


def rows(inputs: Inputs) -> Walk:
    """What each block of queries visits."""
    if isinstance(inputs.mask, Ranges):
        if inputs.q_segment_ids is None:
            return _range_rows(inputs)
        return _range_walk(*_tiles(inputs), axis=2)
    return _row_lists(*_entries(inputs))


def columns(inputs: Inputs) -> Walk:
    """Which blocks of queries visit each block of keys: the transpose."""
    if isinstance(inputs.mask, Ranges):
        return (
            _range_columns(inputs) if inputs.q_segment_ids is None else _range_walk(*_tiles(inputs), axis=1)
        )
    return _column_lists(*_entries(inputs), inputs.mask.nk)


def longest_first(walk: ListWalk, groups: int):
    """Rows in the order in which to start them, [b, 1 | groups, n] int32: those with most visits first.

    Heads are split in `groups`, whose visits count together; 1 where all heads share a list.
    """
    b, h, n = walk.total.shape
    total = walk.total.reshape(b, min(h, groups), -1, n).sum(2)
    return array_module(total).argsort(-total, axis=-1, stable=True).astype(np.int32)


class _Ids(NamedTuple):
    """Of each block, [1 | B, n]: least and greatest valid segment id, and whether all ids are that one."""

    lo: jax.Array
    hi: jax.Array
    one: jax.Array

    @staticmethod
    def of(ids, block: int) -> "_Ids":
        ids = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % block)), constant_values=-1)
        ids = ids.reshape(len(ids), -1, block)
        lo, hi = jnp.where(ids < 0, jnp.iinfo(jnp.int32).max, ids).min(-1), ids.max(-1)
        return _Ids(lo, hi, ids.min(-1) == hi)

    def at(self, index) -> "_Ids":
        return _Ids(*(x[index] for x in self))


def _compare(q: _Ids, k: _Ids):
    """Whether some ids in a tile may be equal, and whether all are."""
    return (q.lo <= k.hi) & (k.lo <= q.hi), q.one & k.one & (q.lo == k.lo)


def _blocks(inputs: Inputs) -> tuple[_Ids, _Ids] | None:
    if inputs.q_segment_ids is None:
        return None
    return _Ids.of(inputs.q_segment_ids, inputs.mask.bq), _Ids.of(inputs.kv_segment_ids, inputs.mask.bk)


def _tiles(inputs: Inputs):
    """Ranges with segment ids: which tiles are listed and which are full, [1 | B, nq, nk]."""
    mask, (q, k) = inputs.mask, _blocks(inputs)
    block = np.arange(mask.nk)
    lo, full_lo, full_hi, hi = (x[:, None] for x in mask.bounds(np.arange(mask.nq)))
    listed = ((lo <= block) & (block < hi))[None]
    full = ((full_lo <= block) & (block < full_hi))[None] & promised(inputs)
    meet, same = _compare(q.at(np.s_[:, :, None]), k.at(np.s_[:, None]))
    return listed & meet, full & same


def _entries(inputs: Inputs):
    """Lists: key blocks, tags, and which slots are listed and which are full, [b, h, nq, W]."""
    mask, ids = inputs.mask, _blocks(inputs)
    xp = array_module(mask.index, mask.tag, mask.counts)
    listed = np.arange(np.shape(mask.index)[-1]) < xp.asarray(mask.counts)[..., None]
    index, tag = xp.asarray(mask.index, np.int32), xp.asarray(mask.tag, np.int32)
    full = (tag >= FULL_TAG) & promised(inputs)
    if ids is not None:
        q, k = ids
        batch = np.arange(len(k.lo))[:, None, None, None]
        meet, same = _compare(q.at(np.s_[:, None, :, None]), k.at((batch, index)))
        listed, full = listed & meet, full & same
    return *(xp.broadcast_to(x, listed.shape) for x in (index, tag & (FULL_TAG - 1))), listed, full


def promised(inputs: Inputs) -> bool:
    """A mask promises full tiles for its own positions only."""
    return inputs.q_positions is None or inputs.mask.q_blocks is not None


def _range_rows(inputs: Inputs) -> RangeWalk:
    lo, full_lo, full_hi, hi = inputs.mask.bounds(np.arange(inputs.mask.nq))
    return _bounds(lo, full_lo, full_hi if promised(inputs) else full_lo, hi)


def _range_columns(inputs: Inputs) -> RangeWalk:
    """Row i visits block j if `lo[i] <= j < hi[i]`; both are sorted, so the rows that do are consecutive."""
    mask = inputs.mask
    lo, full_lo, full_hi, hi = mask.bounds(np.arange(mask.nq))
    xp, block = array_module(lo, full_lo), np.arange(mask.nk)
    first, stop = (count_before(x, block, side="right") for x in (hi, lo))
    # A ragged last row has no full tile, and its bounds say so out of order.
    whole = mask.T // mask.bq if promised(inputs) else 0
    full = (count_before(x[:whole], block, side="right") for x in (full_hi, full_lo))
    full_first, full_stop = (xp.clip(x, first, stop) for x in full)
    return _bounds(first, full_first, xp.maximum(full_first, full_stop), stop)


def _bounds(*bounds) -> RangeWalk:
    return RangeWalk(array_module(*bounds).stack(bounds)[None].astype(np.int32))


def _range_walk(listed, full, axis: int) -> RangeWalk:
    """What is listed along `axis`; full tiles count only where they are consecutive."""
    lo, hi, _ = _extent(listed, axis)
    full_lo, full_hi, gaps = _extent(full, axis)
    xp = array_module(lo, full_lo)
    none = gaps | (full_lo == full_hi)
    bounds = lo, xp.where(none, hi, full_lo), xp.where(none, hi, full_hi), hi
    return RangeWalk(xp.stack(bounds, 1).astype(np.int32))


def _extent(tiles, axis: int):
    """First true, last true plus one, and whether some between are false; equal if there is none."""
    xp = array_module(tiles)
    n = tiles.shape[axis]
    i = np.arange(n, dtype=np.int32).reshape([-1 if a == axis else 1 for a in range(3)])
    stop = xp.where(tiles, i + 1, 0).max(axis)
    first = xp.minimum(xp.where(tiles, i, n).min(axis), stop)
    return first, stop, tiles.sum(axis) != stop - first


def _row_lists(index, tag, listed, full) -> ListWalk:
    """Partial entries before full ones, each in ascending order; rows start every W entries."""
    xp = array_module(index, tag, listed, full)
    b, h, n, W = listed.shape
    order = xp.where(listed, xp.where(full, 1, 0), 2)
    # One operand to sort: the order above the entry.
    packed = order << 29 | index << TAG_BITS | tag
    entries = xp.sort(packed, axis=-1) & (1 << 29) - 1
    partial = (listed & ~full).sum(-1)
    start = xp.broadcast_to(np.arange(n) * W, (b, h, n))
    return _list_walk(entries.reshape(b, h, n * W), start, partial, listed.sum(-1))


def _column_lists(index, tag, listed, full, nk: int) -> ListWalk:
    """The transpose in compressed form: all entries sorted by key block, partial before full, then by row."""
    xp = array_module(index, tag, listed, full)
    b, h, n, W = listed.shape
    row = np.arange(n, dtype=np.int32)[:, None]
    key = xp.where(listed, 2 * index + full, 2 * nk).reshape(b, h, n * W)
    entry = xp.broadcast_to(row << TAG_BITS | tag, listed.shape).reshape(b, h, n * W)
    if xp is np:
        order = np.argsort(key, axis=-1, kind="stable")
        key, entry = (np.take_along_axis(x, order, axis=-1) for x in (key, entry))
    else:
        key, entry = jax.lax.sort((key, entry), dimension=-1, num_keys=1, is_stable=True)
    edges = np.arange(2 * nk + 1, dtype=np.int32)
    at = np.array if xp is np else jnp.array
    search = np.vectorize(lambda k: np.searchsorted(k, edges), signature="(x)->(e)")
    if xp is not np:
        # Unrolled, the steps of the search are one kernel.
        search = jnp.vectorize(
            lambda k: jnp.searchsorted(k, edges, method="scan_unrolled"), signature="(x)->(e)"
        )
    edge = search(at(key))
    start, middle, stop = edge[..., :-1:2], edge[..., 1::2], edge[..., 2::2]
    return _list_walk(entry, start, middle - start, stop - start)


def _list_walk(*arrays) -> ListWalk:
    return ListWalk(*(array_module(*arrays).asarray(x, np.int32) for x in arrays))
