"""Plain XLA: runs anywhere, linear memory, its own backward.

Forward: a scan over rows of query blocks; in each, a loop to the row's count with an online softmax.
Backward: the same loops once more. Every tile's probabilities are recomputed from lse, dq accumulates in
the row and dk, dv in whole float32 arrays updated in place, so there are five products a tile, no
transposed lists and one fixed order of summation.

Layouts inside: query rows `[nq, B, K, G, bq, H]`, key blocks `[B, K, nk, bk, H]`. With lists per query head
every query head counts as its own key head (K = N, G = 1) and its blocks are gathered from the real one.
Source of the formulas: FlashAttention-2, arXiv:2307.08691; dlse enters as delta = sum(do o) - dlse.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from blockjax.kernels.block_sparse_attention import plan
from blockjax.kernels.block_sparse_attention.spec import Cotangents, Gradients, Inputs, Options, Spec
from blockjax.kernels.platforms import vary, varying_axes
from jax import lax

from blockjax.masks import FULL_TAG

STEP_KEYS = 128
"""Least number of keys a step: smaller blocks are gathered together, to feed one larger product."""


def supports(spec: Spec) -> str | None:
    return None


def default_tiles(spec: Spec) -> None:
    """There is nothing to choose."""


def forward_pass(inputs: Inputs, options: Options):
    """`o` [B, T, N, Hv] in q's dtype and `lse` [B, N, T] float32."""
    scores = _Scores(options.scale, options.soft_cap)
    tiles = _Tiles(inputs)
    q = tiles.to_rows(inputs.q)
    slope = tiles.per_head(inputs.slope)
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def row(_, x):
        where, q = x

        def step(s, carry):
            top, total, acc = carry
            tile = tiles.visit(where, s)
            z, _ = scores(q, tile, slope)
            new_top = jnp.maximum(top, z.max(-1))
            base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            p = jnp.exp(z - base[..., None])
            kept = jnp.exp(top - base)
            acc = acc * kept[..., None] + _dot("bkgqt,bkth->bkgqh", p.astype(q.dtype), tile.v)
            return new_top, total * kept + p.sum(-1), acc

        top = jnp.full(q.shape[:-1], -jnp.inf, wide)
        acc = jnp.zeros((*q.shape[:-1], inputs.v.shape[-1]), wide)
        top, total, acc = tiles.loop(where, step, (top, jnp.zeros_like(top), acc))
        some = total > 0
        total = jnp.where(some, total, 1.0)
        lse = jnp.where(some, top + jnp.log(total), -jnp.inf)
        return None, ((acc / total[..., None]).astype(q.dtype), lse)

    _, (o, lse) = lax.scan(row, None, (tiles.where, q))
    lse = tiles.from_rows(lse[..., None])[..., 0].swapaxes(1, 2)
    return tiles.from_rows(o), lse


def backward_pass(inputs: Inputs, cotangents: Cotangents, options: Options) -> Gradients:
    scores = _Scores(options.scale, options.soft_cap)
    do, lse, delta = cotangents
    tiles = _Tiles(inputs)
    wide = jnp.promote_types(do.dtype, jnp.float32)
    # A row that saw nothing, and a padded one, get lse = +inf here: every p is then exactly 0.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    lse, delta = (
        tiles.to_rows(x.swapaxes(1, 2)[..., None], pad)[..., 0] for x, pad in ((lse, jnp.inf), (delta, 0))
    )
    slope = tiles.per_head(inputs.slope)

    def row(carry, x):
        where, q, do, lse, delta = x

        def step(s, carry):
            dq, dk, dv, dslope = carry
            tile = tiles.visit(where, s)
            z, dcap = scores(q, tile, slope)
            p = jnp.exp(z - lse[..., None])
            dz = p * (_dot("bkgqh,bkth->bkgqt", do, tile.v) - delta[..., None])
            if slope is not None:
                dslope = dslope - jnp.sum(dz * tile.distance, (0, 3, 4))
            dz = (dz if dcap is None else dz * dcap).astype(q.dtype)
            dq = dq + _dot("bkgqt,bkth->bkgqh", dz, tile.k)
            dk = tiles.add(dk, tile, _dot("bkgqt,bkgqh->bkth", dz, q))
            dv = tiles.add(dv, tile, _dot("bkgqt,bkgqh->bkth", p.astype(q.dtype), do))
            return dq, dk, dv, dslope

        dq, *carry = tiles.loop(where, step, (jnp.zeros(q.shape, wide), *carry))
        return tuple(carry), (scores.scale * dq).astype(q.dtype)

    dk, dv = (jnp.zeros((x.shape[0], tiles.K, *x.shape[2:]), wide) for x in (tiles.k, tiles.v))
    dslope = None if slope is None else jnp.zeros(slope.shape, wide)
    xs = (tiles.where, tiles.to_rows(inputs.q), tiles.to_rows(do), lse, delta)
    (dk, dv, dslope), dq = lax.scan(row, tiles.alike((dk, dv, dslope)), xs)
    return Gradients(
        q=tiles.from_rows(dq),
        k=tiles.from_blocks(scores.scale * dk).astype(inputs.k.dtype),
        v=tiles.from_blocks(dv).astype(inputs.v.dtype),
        slope=None if slope is None else dslope.reshape(-1),
    )


@dataclass(frozen=True)
class _Scores:
    """From a tile's products to its masked scores."""

    scale: float
    soft_cap: float | None

    def __call__(self, q, tile: "_Tile", slope):
        """Scores `[B, K, G, bq, t]`, -inf where invisible, and d(capped)/d(scaled product) if capped."""
        z = self.scale * _dot("bkgqh,bkth->bkgqt", q, tile.k)
        dcap = None
        if self.soft_cap is not None:
            ratio = jnp.tanh(z / self.soft_cap)
            z, dcap = self.soft_cap * ratio, 1 - ratio * ratio
        if slope is not None:
            z = z - slope[:, :, None, None] * tile.distance
        return jnp.where(tile.seen, z, -jnp.inf), dcap


class _Where(NamedTuple):
    """One row of query blocks: its number, and positions and segment ids `[1 | B, bq]` where given."""

    row: jax.Array
    positions: jax.Array | None
    segments: jax.Array | None


class _Tile(NamedTuple):
    """The keys of one step, t = per_step * bk: `k`, `v` `[B, K, t, H]`, the rest broadcasts to scores."""

    index: jax.Array  # key blocks [b, h, per_step]
    active: jax.Array  # same shape: not beyond the row's count
    k: jax.Array
    v: jax.Array
    seen: jax.Array
    distance: jax.Array | None


class _Tiles:
    """The call cut into rows of query blocks and blocks of keys."""

    def __init__(self, inputs: Inputs):
        q, mask = inputs.q, inputs.mask
        self.mask = mask
        self.promised = plan.promised(inputs)
        self.axes = varying_axes(inputs)
        _, self.T, N, _ = q.shape
        _, self.S, self.K_real, _ = inputs.k.shape
        # One short row or block (decoding) is not padded to the mask's block size.
        self.bq, self.bk = min(mask.bq, self.T), min(mask.bk, self.S)
        b, h = mask.lists_shape
        self.shared = b == h == 1
        self.K = N if h == N else self.K_real
        self.G = N // self.K
        self.per_step = min(mask.nk, max(1, STEP_KEYS // self.bk))
        self.k, self.v = self.to_blocks(inputs.k), self.to_blocks(inputs.v)
        self.has_slope = inputs.slope is not None

        self.kv_positions = self.kv_segments = rows_positions = rows_segments = None
        if inputs.q_positions is not None:
            rows_positions = _cut(inputs.q_positions, self.bq).swapaxes(0, 1)
            self.kv_positions = _cut(inputs.kv_positions, self.bk)
        if inputs.q_segment_ids is not None:
            rows_segments = _cut(inputs.q_segment_ids, self.bq, -1).swapaxes(0, 1)
            self.kv_segments = _cut(inputs.kv_segment_ids, self.bk, -1)
        self.where = _Where(jnp.arange(mask.nq, dtype=jnp.int32), rows_positions, rows_segments)

    def alike(self, tree):
        return jax.tree.map(lambda x: vary(x, self.axes), tree)

    def to_rows(self, x, pad=0):
        """[B, T, N, D] -> [nq, B, K, G, bq, D]"""
        x = _cut(x, self.bq, pad)
        return x.reshape(*x.shape[:3], self.K, self.G, -1).transpose(1, 0, 3, 4, 2, 5)

    def from_rows(self, x):
        """[nq, B, K, G, bq, D] -> [B, T, N, D]"""
        x = x.transpose(1, 0, 4, 2, 3, 5)
        return x.reshape(x.shape[0], -1, self.K * self.G, x.shape[-1])[:, : self.T]

    def to_blocks(self, x):
        """[B, S, K, D] -> [B, K, nk, bk, D]"""
        return _cut(x, self.bk).transpose(0, 3, 1, 2, 4)

    def from_blocks(self, x):
        """[B, K, nk, bk, D] -> [B, S, K_real, D], summed over the query heads that share a key head."""
        B, _, nk, bk, D = x.shape
        x = x.reshape(B, self.K_real, -1, nk * bk, D).sum(2)
        return x.swapaxes(1, 2)[:, : self.S]

    def per_head(self, x):
        """[N] -> [K, G]"""
        return None if x is None else x.reshape(self.K, self.G)

    def loop(self, where: _Where, step, carry):
        """Runs `step` to the row's count: the longest of the lists that share the loop."""
        steps = -(-jnp.max(self.mask.count(where.row)) // self.per_step)
        body = step
        if self.kv_segments is not None:

            def body(s, carry):
                return lax.cond(self.segments_meet(where, s), step, lambda _, c: c, s, carry)

        return lax.fori_loop(jnp.zeros_like(steps), steps, body, self.alike(carry))

    def slots(self, s):
        return s * self.per_step + jnp.arange(self.per_step, dtype=jnp.int32)

    def visit(self, where: _Where, s) -> _Tile:
        mask, row = self.mask, where.row
        index, tag = mask.entry(row, self.slots(s))
        active = self.slots(s) < mask.count(row)[..., None]

        if where.positions is None:
            pq = mask.q_offset + row * self.bq + jnp.arange(self.bq)[None]
            pk = mask.kv_offset + index[..., None] * self.bk + jnp.arange(self.bk)
        else:
            pq, pk = where.positions, _pick(self.kv_positions, index)
        pq, pk = pq[:, None, :, None], _flat(pk)[:, :, None, :]

        def test():
            return self.mask.visible(jnp.repeat(tag, self.bk, axis=-1)[:, :, None, :], pq, pk)

        if self.promised:
            full = jnp.all((tag >= FULL_TAG) | ~active)
            shape = jax.eval_shape(test).shape
            seen = lax.cond(full, lambda: self.alike(jnp.ones(shape, bool)), lambda: self.alike(test()))
        else:
            seen = test()
        if where.segments is not None:
            ids_q = where.segments[:, None, :, None]
            ids_k = _flat(_pick(self.kv_segments, index))[:, :, None, :]
            seen = seen & (ids_q == ids_k) & (ids_q >= 0)
        if self.S % self.bk:
            real = index[..., None] * self.bk + jnp.arange(self.bk) < self.S
            seen = seen & _flat(real)[:, :, None, :]
        k, v = self.take(self.k, index), self.take(self.v, index)
        if not self.exact:
            # Slots beyond a list's own count are zeroed, not only masked: 0 * NaN is NaN.
            live = active[..., None, None]
            k, v = jnp.where(live, k, 0), jnp.where(live, v, 0)
            seen = seen & jnp.repeat(active, self.bk, axis=-1)[:, :, None, :]
        distance = None
        if self.has_slope:
            distance = jnp.abs(pq - pk)[:, :, None].astype(jnp.float32)
        k, v = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (k, v))
        return _Tile(index, active, k, v, seen[:, :, None], distance)

    @property
    def exact(self) -> bool:
        """Every step is a visit: no list ends before another."""
        return self.shared and self.per_step == 1

    def segments_meet(self, where: _Where, s):
        """False when the ranges of segment ids prove that the tile is empty in every batch entry."""
        index, _ = self.mask.entry(where.row, self.slots(s))
        q_lo, q_hi = _id_range(where.segments)
        k_lo, k_hi = (_pick(x, index) for x in _id_range(self.kv_segments))
        q_lo, q_hi = q_lo[:, None, None], q_hi[:, None, None]
        return jnp.any((q_lo <= k_hi) & (k_lo <= q_hi))

    def take(self, blocks, index):
        """[B, K, nk, bk, D] -> [B, K, per_step, bk, D]"""
        if self.shared:
            # Slices, not a gather: they are faster on every platform.
            return jnp.stack([lax.dynamic_index_in_dim(blocks, i, 2, False) for i in index[0, 0]], 2)
        return blocks[(*self.batch_and_head(blocks, self.K // self.K_real), index)]

    def add(self, blocks, tile: _Tile, x):
        """Adds `[B, K, t, D]` to the tile's key blocks, in place inside a loop."""
        x = x.reshape(*x.shape[:2], self.per_step, self.bk, -1)
        if not self.shared:
            index = jnp.where(tile.active, tile.index, self.mask.nk)
            return blocks.at[(*self.batch_and_head(blocks, 1), index)].add(x, mode="drop")
        for slot, i in enumerate(tile.index[0, 0]):
            old = lax.dynamic_index_in_dim(blocks, i, 2, False)
            blocks = lax.dynamic_update_index_in_dim(blocks, old + x[:, :, slot], i, 2)
        return blocks

    def batch_and_head(self, blocks, sharing: int):
        return jnp.arange(blocks.shape[0])[:, None, None], (jnp.arange(self.K) // sharing)[:, None]


def _dot(subscripts: str, a, b):
    """Product in the operands' dtype, accumulated in float32."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _cut(x, block: int, pad=0):
    """[B, T, ...] -> [B, n, block, ...], padded to whole blocks."""
    missing = -x.shape[1] % block
    if missing:
        x = jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)), constant_values=pad)
    return x.reshape(x.shape[0], -1, block, *x.shape[2:])


def _pick(blocks, index):
    """`[1 | B, nk, ...]` at key blocks `[b, h, c]`: `[max(b, B), h, c, ...]`."""
    return blocks[jnp.arange(blocks.shape[0])[:, None, None], index]


def _flat(x):
    """[b, h, c, bk] -> [b, h, t]"""
    return x.reshape(*x.shape[:2], -1)


def _id_range(ids):
    """Least and greatest valid segment id over the last axis; an empty range when none is valid."""
    return jnp.where(ids < 0, jnp.iinfo(jnp.int32).max, ids).min(-1), ids.max(-1)
