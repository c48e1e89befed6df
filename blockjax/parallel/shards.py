"""Attention between the queries of one place and the keys of another: what every schedule folds."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from blockjax import partials
from blockjax.kernels.block_sparse_attention.api import select
from blockjax.kernels.block_sparse_attention.spec import Cotangents, Inputs
from blockjax.kernels.block_sparse_attention.tpu.layout import Route
from blockjax.masks import BlockMask, Ranges, pick
from blockjax.parallel.circulate import Ring


class Queries(NamedTuple):
    """Of one place: `q` [B, T, N, H]; ids and positions [1 | B, T] or None; rows of the mask's lists."""

    q: jax.Array
    ids: jax.Array | None
    positions: jax.Array | None
    lists: tuple[jax.Array, jax.Array, jax.Array] | None  # index, tag, counts


class Keys(NamedTuple):
    """Of one place: `k` [B, S, K, H], `v` [B, S, K, Hv]; ids and positions [1 | B, S] or None."""

    k: jax.Array
    v: jax.Array
    ids: jax.Array | None
    positions: jax.Array | None


@dataclass(frozen=True, eq=False)
class Job:
    """One call inside `shard_map`: what all its shards have in common.

    `mask` is the whole one, of whole blocks, without the rows of its lists; `q_blocks` and `kv_blocks`
    [places, n] the blocks of each place; `options` are those of `select`.
    """

    ring: Ring
    mask: BlockMask
    q_blocks: np.ndarray
    kv_blocks: np.ndarray
    slope: jax.Array | None
    options: dict[str, Any]

    @property
    def consecutive(self) -> bool:
        return all((x.ravel() == np.arange(x.size)).all() for x in (self.q_blocks, self.kv_blocks))

    @property
    def ascending(self) -> bool:
        """Whether each place holds its blocks in the order of the sequence."""
        return all((np.diff(x) > 0).all() for x in (self.q_blocks, self.kv_blocks))

    def piece(self, lists, q_place, kv_place) -> BlockMask:
        """The mask of one place's queries and another's keys, or all keys as the places hold them."""
        mask, nq, nk = self.mask, self.q_blocks.shape[1], self.kv_blocks.shape[1]
        rows = jnp.asarray(self.q_blocks)[q_place]
        blocks = self.kv_blocks.ravel() if kv_place is None else jnp.asarray(self.kv_blocks)[kv_place]
        if isinstance(mask, Ranges) and not self.consecutive:
            return pick(mask, rows, blocks, self.ascending and kv_place is not None)
        if isinstance(mask, Ranges):
            mask = mask.rows(q_place * nq, nq)
        else:
            mask = replace(mask, T=nq * mask.bq, index=lists[0], tag=lists[1], counts=lists[2])
            if self.consecutive:
                mask = replace(mask, q_offset=mask.q_offset + q_place * nq * mask.bq)
            else:
                mask = replace(mask, q_blocks=rows, kv_blocks=np.arange(mask.nk, dtype=np.int32))
        if not self.consecutive:
            return pick(mask, None, blocks)
        return mask if kv_place is None else mask.columns(kv_place * nk, nk)

    def inputs(self, queries: Queries, keys: Keys, mask: BlockMask) -> Inputs:
        positions = queries.positions, keys.positions
        if mask.q_blocks is not None and queries.positions is None:
            positions = (jnp.asarray(x)[None] for x in mask.positions())
        return Inputs(queries.q, keys.k, keys.v, mask, self.slope, queries.ids, keys.ids, *positions)

    def forward(self, queries: Queries, keys: Keys, mask: BlockMask) -> partials.Partial:
        """The partial of these keys, `o` [B, T, N, Hv] in q's dtype and `lse` [B, T, N] float32."""
        inputs = self.inputs(queries, keys, mask)
        backend, options = select(inputs, **self.options)
        o, lse = backend.forward_pass(inputs, options)
        return o, lse.swapaxes(1, 2)

    def forward_round(self, queries: Queries, keys: Keys, route: Route) -> partials.Partial:
        """`forward` over the shards of all places of the route, which a TPU kernel moves itself.

        Raises:
            UsageError: the kernel cannot serve the call, with the reason.
        """
        from blockjax.kernels.block_sparse_attention.tpu import ring

        here, S = self.ring.place, keys.k.shape[1]
        # What says whom to see is small, and needed before the kernel starts: all places know it of all.
        known = jax.tree.map(self.ring.gather, keys[2:])
        visits = []
        for offset in route.visits:
            there = (here - offset) % self.ring.size
            ids = jax.tree.map(lambda x, at=there: lax.dynamic_slice_in_dim(x, at * S, S, axis=1), known)
            visits.append(self.inputs(queries, Keys(*keys[:2], *ids), self.piece(queries.lists, here, there)))
        _, options = select(visits[0], **self.options | dict(implementation="tpu"))
        o, lse = ring.forward_pass(route, visits, options)
        return o, lse.swapaxes(1, 2)

    def backward(self, queries: Queries, keys: Keys, mask: BlockMask, statistics: Cotangents):
        """These keys' share of the gradients, in their arrays' dtypes: `(dq, dslope), (dk, dv)`."""
        inputs = self.inputs(queries, keys, mask)
        backend, options = select(inputs, **self.options)
        dq, dk, dv, dslope = backend.backward_pass(inputs, statistics, options)
        return (dq, dslope), (dk, dv)


def heads(x, cut: Callable):
    """A job, Queries, Keys or Cotangents of some heads: `cut(array, axis)` takes their part of each."""
    match x:
        case Job():
            return replace(x, slope=None if x.slope is None else cut(x.slope, 0))
        case Queries(q, ids, positions, lists):
            if lists is not None and lists[0].shape[1] > 1:
                lists = tuple(cut(a, 1) for a in lists)
            return Queries(cut(q, 2), ids, positions, lists)
        case Keys(k, v, ids, positions):
            return Keys(cut(k, 2), cut(v, 2), ids, positions)
        case Cotangents(do, lse, delta):
            return Cotangents(cut(do, 2), cut(lse, 1), cut(delta, 1))
    raise TypeError(type(x))


def add(a, b):
    """The sum of two results, float32; one alone stays, and travels, as the kernel rounded it."""
    return jax.tree.map(lambda x, y: partials.wide(x) + partials.wide(y), a, b)
