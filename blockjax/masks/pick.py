"""Pieces of a mask: some of its blocks in any order, and a mask lengthened to whole blocks.

What sequence parallelism gives to a device. Positions stay those of the whole, so every predicate holds where
it held before.
"""

from dataclasses import fields, replace

import jax.numpy as jnp
import numpy as np

from blockjax.masks.block_mask import BlockMask, Ranges, compact, from_tags, kind_to_tag
from blockjax.masks.predicates import Between, array_module


def pick(mask: BlockMask, q_blocks=None, kv_blocks=None, ascending: bool = False) -> BlockMask:
    """The mask of these blocks, in this order: lists, or ranges of a mask of such if numbers ascend.

    Args:
        mask: of whole blocks, see `lengthen`.
        q_blocks, kv_blocks: [m] and [n] distinct block numbers, possibly traced; None for all as they are.
        ascending: both ascend, which cannot be told of traced ones.
    """
    q_numbers = _numbers(mask.q_blocks, mask.nq, q_blocks)
    kv_numbers = _numbers(mask.kv_blocks, mask.nk, kv_blocks)
    shared = {f.name: getattr(mask, f.name) for f in fields(BlockMask)}
    shared |= dict(T=len(q_numbers) * mask.bq, S=len(kv_numbers) * mask.bk)
    base = BlockMask(**shared | dict(q_blocks=q_numbers, kv_blocks=kv_numbers))
    if isinstance(mask, Ranges):
        if ascending:
            return Ranges(**vars(base), predicate=mask.predicate)
        kind = mask.classify(mask.predicate, q_numbers[:, None], kv_numbers)
        return from_tags(kind_to_tag(kind)[None, None], mask.predicates, base)
    index, tag = mask.index, mask.tag
    if q_blocks is not None:
        index, tag = (array_module(x, q_blocks).take(x, q_blocks, axis=2) for x in (index, tag))
    if kv_blocks is not None:
        index, tag = _columns(index, tag, kv_blocks, mask.nk)
    return compact(index, tag, mask.predicates, base)


def lengthen(mask: BlockMask, T: int, S: int) -> BlockMask:
    """The mask of T queries and S keys, whole blocks; keys past the mask's own are not seen."""
    if (T, S) == (mask.T, mask.S):
        return mask
    nq, real = mask.nq, Between(mask.kv_offset, mask.kv_offset + mask.S)
    mask = replace(mask, T=T, S=S)
    if isinstance(mask, Ranges):
        return replace(mask, predicate=mask.predicate & real)
    rows = ((0, 0), (0, 0), (0, mask.nq - nq))
    xp = array_module(mask.index, mask.tag, mask.counts)
    return replace(
        mask,
        index=xp.pad(mask.index, (*rows, (0, 0))),
        tag=xp.pad(mask.tag, (*rows, (0, 0))),
        counts=xp.pad(mask.counts, rows),
        predicates=tuple(x & real for x in mask.predicates),
    )


def _numbers(own, n: int, chosen):
    """Of the chosen ones among n blocks, whose numbers are `own`."""
    own = np.arange(n, dtype=np.int32) if own is None else own
    return own if chosen is None else array_module(own, chosen).take(own, chosen)


def _columns(index, tag, kv_blocks, nk: int):
    """Entries among `kv_blocks`, counted by their place there, sorted, and as many as can be."""
    n = len(kv_blocks)
    xp = array_module(index, tag, kv_blocks)
    if xp is np:
        place = np.full(nk, n, np.int32)
        place[kv_blocks] = np.arange(n)
    else:
        place = jnp.full(nk, n, jnp.int32).at[kv_blocks].set(jnp.arange(n, dtype=jnp.int32))
    index = xp.where(xp.asarray(tag) > 0, xp.take(place, index), n)
    order = xp.argsort(index, axis=-1)[..., :n]
    index, tag = (xp.take_along_axis(xp.asarray(x), order, axis=-1) for x in (index, tag))
    return index, xp.where(index < n, tag, np.uint8(0))
