"""`BlockMask`: which key blocks each block of queries visits.

A mask is a pytree in one of two forms behind one interface, `count(row)` and `entry(row, s)`:

- `Ranges`: the visited blocks of a row are consecutive and follow from a predicate's (possibly traced)
  scalars. Nothing is stored.
- `Lists`: sorted unique key blocks per (batch | 1, head | 1 | K | N, row), with a count.

Each entry carries a tag: bit i says that predicate i may grant visibility in this tile (one of them
suffices), bit 7 promises that they grant all of it, so that a kernel may skip the test. The ragged last
block of a length that is no multiple of the block size is never promised.

Positions are global: query token i is at `q_offset + i`, key token j at `kv_offset + j`. Nothing here
allocates T x S; what is quadratic counts blocks.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import jax
import jax.numpy as jnp
import numpy as np

from blockjax.errors import UsageError
from blockjax.masks import views
from blockjax.masks.blocks import count_before, number, split
from blockjax.masks.predicates import (
    EMPTY,
    FAR,
    FULL,
    FULL_TAG,
    PARTIAL,
    Causal,
    Chunked,
    Everything,
    Function,
    Predicate,
    Window,
    array_module,
    is_concrete,
    same,
)

MAX_PREDICATES = 7

_static = functools.partial(field, metadata={"static": True})


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockMask:
    """Sizes and positions common to both forms; build one with the static methods below.

    `T`, `S` tokens, `bq`, `bk` tokens a block, `q_offset`, `kv_offset` the position of the first token
    on each side (leaves, possibly traced). `q_blocks` [nq] and `kv_blocks` [nk] int32: which blocks of the
    sequence these are, None for consecutive ones; both or neither: see `pick`.
    """

    T: int = _static()
    S: int = _static()
    bq: int = _static()
    bk: int = _static()
    q_offset: int | jax.Array = 0
    kv_offset: int | jax.Array = 0
    q_blocks: np.ndarray | jax.Array | None = None
    kv_blocks: np.ndarray | jax.Array | None = None

    @staticmethod
    def causal(T: int, S: int | None = None, **geometry) -> "BlockMask":
        """Each query sees itself and the keys before it.

        All builders take `T` and `S` (default `T`), then by keyword `bq=128, bk=128, q_offset=0,
        kv_offset=0`, and raise `UsageError` for sizes that are not positive integers.
        """
        return BlockMask.from_predicate(Causal(), T, S, **geometry)

    @staticmethod
    def window(T: int, S: int | None = None, *, left, right=0, **geometry) -> "BlockMask":
        """Keys at `pq - left < pk <= pq + right`; `left` counts the query itself and may be traced."""
        for name, value in (("left", left), ("right", right)):
            if is_concrete(value) and not (_is_integer(value) and 0 <= value <= FAR):
                raise UsageError(
                    f"A window needs an integer 0 <= {name} <= {FAR}, got {name}={value}; it is a distance."
                )
        if is_concrete((left, right)) and left + right < 1:
            raise UsageError(
                "A window with left=0 and right=0 sees nothing; left counts the query itself: left=1."
            )
        return BlockMask.from_predicate(Window(left, right), T, S, **geometry)

    @staticmethod
    def chunked(T: int, S: int | None = None, *, size, **geometry) -> "BlockMask":
        """Keys in the query's own chunk of `size` positions, both directions; `& causal` for one."""
        if is_concrete(size) and not (_is_integer(size) and 1 <= size <= FAR):
            raise UsageError(f"A chunk needs at least one token, and at most {FAR}, got size={size}.")
        return BlockMask.from_predicate(Chunked(size), T, S, **geometry)

    @staticmethod
    def full(T: int, S: int | None = None, **geometry) -> "BlockMask":
        """Every query sees every key."""
        return BlockMask.from_predicate(Everything(), T, S, **geometry)

    @staticmethod
    def from_predicate(
        predicate: Predicate | Callable,
        T: int,
        S: int | None = None,
        *,
        bq: int = 128,
        bk: int = 128,
        q_offset=0,
        kv_offset=0,
        prune: bool = True,
    ) -> "BlockMask":
        """The blocks in which `predicate`, or a function `(pq, pk) -> bool` of positions, holds somewhere.

        Predicates with an `interval` give ranges, others lists (exact when concrete, one tile at a time).
        `prune=False` lists every block and promises nothing: for calls that pass `q_positions` or
        `kv_positions`, where the default positions say nothing about the tokens in a block.
        """
        base = _geometry(T, T if S is None else S, bq, bk, q_offset, kv_offset)
        if not isinstance(predicate, Predicate):
            predicate = Function(predicate)
        predicate = _normal(predicate)
        if not prune:
            return from_tags(np.ones((1, 1, base.nq, base.nk), np.uint8), (predicate,), base)
        if predicate.interval(np.zeros((), np.int32)) is not None:
            return Ranges(**vars(base), predicate=predicate)
        kind = base.classify(predicate, np.arange(base.nq)[:, None], np.arange(base.nk))
        if is_concrete((predicate, kind, base.q_offset, base.kv_offset)):
            kind = views.refine(predicate, kind, base)
        return from_tags(kind_to_tag(kind)[None, None], (predicate,), base)

    @staticmethod
    def from_block_bool(
        blocks,
        T: int | None = None,
        S: int | None = None,
        *,
        bq: int = 128,
        bk: int = 128,
        predicate: Predicate | None = None,
        q_offset=0,
        kv_offset=0,
    ) -> "BlockMask":
        """Lists from a boolean `[nq, nk]`, `[h, nq, nk]` or `[b, h, nq, nk]`, concrete or traced.

        Exactly these blocks are listed; inside them `predicate` decides (default: everything is visible).
        `T` and `S` default to whole blocks. To drop blocks in which, say, causality leaves nothing:
        `& BlockMask.causal(...)`.
        """
        shape = np.shape(blocks)
        if not 2 <= len(shape) <= 4:
            raise UsageError(f"Blocks must be [nq, nk], [h, nq, nk] or [b, h, nq, nk], got shape {shape}.")
        nq, nk = shape[-2:]
        _check_sizes(bq=bq, bk=bk)
        base = _geometry(
            nq * bq if T is None else T, nk * bk if S is None else S, bq, bk, q_offset, kv_offset
        )
        if (nq, nk) != (base.nq, base.nk):
            raise UsageError(
                f"Blocks of shape {shape} do not cover T={base.T}, S={base.S}: with bq={bq}, bk={bk} "
                f"they must end in ({base.nq}, {base.nk})."
            )
        xp = array_module(blocks)
        blocks = xp.asarray(blocks, bool).reshape((1,) * (4 - len(shape)) + shape)
        predicate = _normal(predicate or Everything())
        tag = base._tag(predicate, np.arange(nq)[:, None], np.arange(nk))
        xp = array_module(blocks, tag)
        return from_tags(xp.where(blocks, tag, np.uint8(0)), (predicate,), base)

    @staticmethod
    def from_indices(
        index,
        count=None,
        *,
        bq: int = 128,
        bk: int = 128,
        T: int | None = None,
        S: int | None = None,
        predicate: Predicate | None = None,
        q_offset=0,
        kv_offset=0,
    ) -> "BlockMask":
        """Lists from key-block indices `[nq, W]`, `[h, nq, W]` or `[b, h, nq, W]` int32.

        The first `count` (same shape without `W`) entries of a row are used; without it, those that are
        not negative. Concrete lists must be sorted, unique and in range, or `UsageError` is raised.
        Traced ones are made so: sorted, with duplicates and what is out of range dropped. `T` defaults to
        whole blocks and `S` to `T`; `predicate` as in `from_block_bool`.
        """
        shape = np.shape(index)
        if not 2 <= len(shape) <= 4:
            raise UsageError(f"Indices must be [nq, W], [h, nq, W] or [b, h, nq, W], got shape {shape}.")
        if count is not None and np.shape(count) != shape[:-1]:
            raise UsageError(
                f"Counts of shape {np.shape(count)} do not fit indices {shape}: give {shape[:-1]}."
            )
        _check_sizes(bq=bq, bk=bk)
        T = shape[-2] * bq if T is None else T
        base = _geometry(T, T if S is None else S, bq, bk, q_offset, kv_offset)
        if shape[-2] != base.nq:
            raise UsageError(
                f"Indices {shape} have {shape[-2]} rows, but T={T} with bq={bq} has {base.nq} blocks."
            )
        xp = array_module(index, count)
        index = xp.asarray(index, np.int32).reshape((1,) * (4 - len(shape)) + shape)
        slot = np.arange(shape[-1], dtype=np.int32)
        if count is None:
            used = index >= 0
        else:
            used = slot < xp.asarray(count, np.int32).reshape(index.shape[:-1])[..., None]
        if xp is np:
            _check_lists(index, used, base.nk)
        predicate = _normal(predicate or Everything())
        used &= (index >= 0) & (index < base.nk)
        index = xp.sort(xp.where(used, index, base.nk), axis=-1)
        repeated = xp.concatenate(
            [xp.zeros_like(index[..., :1], bool), index[..., 1:] == index[..., :-1]], -1
        )
        tag = base._tag(predicate, np.arange(base.nq)[:, None], index)
        xp = array_module(index, tag)
        tag = xp.where((index < base.nk) & ~repeated, tag, np.uint8(0))
        return compact(index, tag, (predicate,), base)

    @property
    def nq(self) -> int:
        return -(-self.T // self.bq)

    @property
    def nk(self) -> int:
        return -(-self.S // self.bk)

    def __and__(self, other: "BlockMask") -> "BlockMask":
        """Visible where both masks are."""
        _check_same_geometry(self, other)
        if isinstance(self, Ranges) and isinstance(other, Ranges):
            return replace(self, predicate=self.predicate & other.predicate)
        a, b = self.tags(), other.tags()
        predicates: list[Predicate] = []
        tag = a[..., :1, :1] * 0
        for i, p in enumerate(self.predicates):
            for j, q in enumerate(other.predicates):
                tag = tag | (((a >> i) & (b >> j) & 1) << _bit(predicates, p & q))
        return from_tags(tag | (a & b & FULL_TAG), tuple(predicates), self)

    def __or__(self, other: "BlockMask") -> "BlockMask":
        """Visible where at least one mask is."""
        _check_same_geometry(self, other)
        predicates: list[Predicate] = []
        tag = np.zeros((1, 1, 1, 1), np.uint8)
        for mask in (self, other):
            tags = mask.tags()
            tag = tag | (tags & FULL_TAG)
            for i, p in enumerate(mask.predicates):
                tag = tag | (((tags >> i) & 1) << _bit(predicates, p))
        return from_tags(tag, tuple(predicates), self)

    def visible(self, tag, pq, pk):
        """Boolean, broadcast: may `pq` see `pk` in a tile of this `tag`; ignores the promise of bit 7."""
        granted = [(tag >> i) & 1 == 1 for i in range(len(self.predicates))]
        return functools.reduce(
            operator.or_, [g & p.visible(pq, pk) for g, p in zip(granted, self.predicates, strict=True)]
        )

    def density(self):
        """Listed blocks over all blocks, mean over the lists; a traced scalar if the mask is traced."""
        counts = self.counts_per_row()
        return array_module(counts).mean(counts) / self.nk

    def executed_pairs(self):
        """Query-key pairs in listed tiles, padding included: the work done. Mean over the lists."""
        return self.density() * self.nq * self.bq * self.nk * self.bk

    def visible_pairs(self) -> float:
        """Query-key pairs that see each other: the useful work. Mean over the lists; concrete masks only."""
        views.require_concrete(self, "visible_pairs()")
        return self._visible_pairs()

    def plot(self, *, batch: int = 0, head: int = 0, ax=None):
        """A matplotlib figure of empty, partial and full blocks for one batch entry and head."""
        return views.plot(self, batch=batch, head=head, ax=ax)

    def q_start(self, row):
        """Position of the first token of a row of query blocks."""
        return self.q_offset + number(self.q_blocks, row) * self.bq

    def kv_start(self, block):
        """Position of the first token of a key block."""
        return self.kv_offset + number(self.kv_blocks, block) * self.bk

    def positions(self):
        """Of each token, [T] and [S]."""
        rows, blocks = (self.q_start(np.arange(self.nq)), self.kv_start(np.arange(self.nk)))
        return tuple(
            (start[:, None] + np.arange(n)).reshape(-1)[:length]
            for start, n, length in ((rows, self.bq, self.T), (blocks, self.bk, self.S))
        )

    def rows(self, start, count: int) -> "BlockMask":
        """The mask of query blocks `start .. start + count`; `start` may be traced if T is whole blocks."""
        T = _piece(self.T, self.bq, start, count, "T")
        return self._rows(start, count, replace(self, T=T, q_offset=self.q_offset + start * self.bq))

    def columns(self, start, count: int) -> "BlockMask":
        """The mask of key blocks `start .. start + count`; `start` may be traced if S is whole blocks."""
        S = _piece(self.S, self.bk, start, count, "S")
        return self._columns(start, count, replace(self, S=S, kv_offset=self.kv_offset + start * self.bk))

    def __repr__(self) -> str:
        concrete = is_concrete(self)
        density = f"density {float(self.density()):.1%}" if concrete else "traced"
        return f"BlockMask(T={self.T}, S={self.S}, blocks {self.bq}x{self.bk}, {self._form()}, {density})"

    def classify(self, predicate: Predicate, rows, blocks):
        """EMPTY, PARTIAL or FULL per tile at default positions; `rows` and `blocks` broadcast."""
        q_first = self.q_offset + rows * self.bq
        k_first = self.kv_offset + blocks * self.bk
        kind = predicate.classify(q_first, q_first + self.bq - 1, k_first, k_first + self.bk - 1)
        whole = ((rows + 1) * self.bq <= self.T) & ((blocks + 1) * self.bk <= self.S)
        xp = array_module(kind, whole)
        return xp.where(whole, kind, xp.minimum(kind, PARTIAL))

    def _tag(self, predicate: Predicate, rows, blocks):
        """Tags of tiles that stay listed even where the predicate holds nowhere."""
        kind = self.classify(predicate, rows, blocks)
        return kind_to_tag(array_module(kind).maximum(kind, PARTIAL))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Ranges(BlockMask):
    """Visited blocks are consecutive; everything follows from `predicate.interval`.

    `q_blocks` and `kv_blocks` ascend.
    """

    predicate: Predicate

    lists_shape = (1, 1)

    @property
    def predicates(self) -> tuple[Predicate, ...]:
        return (self.predicate,)

    def bounds(self, row):
        """`lo, full_lo, full_hi, hi` int32: blocks `lo .. hi` are visited, `full_lo .. full_hi` full."""
        q_first = self.q_start(row)
        q_last = q_first + self.bq - 1
        first, stop_of_first = self.predicate.interval(q_first)
        # The tokens of a ragged last row end early; the last real one has the widest reach.
        q_end = self.q_offset + self.T - 1 if self.q_blocks is None else q_last
        xp = array_module(q_last, q_end, first)
        first_of_last, stop = self.predicate.interval(xp.minimum(q_last, q_end))
        first, stop, first_of_last, stop_of_first = (
            x - self.kv_offset for x in (first, stop, first_of_last, stop_of_first)
        )
        xp = array_module(first, stop)
        picked = self.kv_blocks is not None
        most, whole = (FAR, FAR) if picked else (self.nk, self.S // self.bk)
        lo = xp.clip(first // self.bk, 0, most)
        hi = xp.clip(-(-stop // self.bk), lo, most)
        full_lo = xp.clip(-(-first_of_last // self.bk), lo, hi)
        full_hi = xp.clip(xp.minimum(stop_of_first // self.bk, whole), full_lo, hi)
        full_hi = xp.where((row + 1) * self.bq <= self.T, full_hi, full_lo)
        bounds = (xp.asarray(x, np.int32) for x in (lo, full_lo, full_hi, hi))
        return tuple(count_before(self.kv_blocks, x) if picked else x for x in bounds)

    def finer(self, bq: int, bk: int) -> "Ranges":
        """The same in blocks of divisors of `bq` and `bk`."""
        q_blocks = split(self.q_blocks, self.bq // bq)
        return replace(self, bq=bq, bk=bk, q_blocks=q_blocks, kv_blocks=split(self.kv_blocks, self.bk // bk))

    def count(self, row):
        """Number of visited key blocks, `[1, 1]` int32."""
        lo, _, _, hi = self.bounds(row)
        return (hi - lo)[None, None]

    def entry(self, row, s):
        """Key block and tag of the `s`-th visit, `[1, 1, *s.shape]`; undefined from `count(row)` on."""
        lo, full_lo, full_hi, _ = self.bounds(row)
        block = (lo + s)[None, None]
        full = (full_lo <= block) & (block < full_hi)
        return block, jnp.where(full, 1 | FULL_TAG, 1).astype(jnp.uint8)

    def counts_per_row(self):
        lo, _, _, hi = self.bounds(np.arange(self.nq))
        return (hi - lo)[None, None]

    def tags(self):
        """Tags of all blocks, `[1, 1, nq, nk]` uint8; 0 where not listed."""
        lo, full_lo, full_hi, hi = (x[:, None] for x in self.bounds(np.arange(self.nq)))
        block = np.arange(self.nk)
        xp = array_module(lo)
        tag = xp.where((full_lo <= block) & (block < full_hi), 1 | FULL_TAG, 1)
        return xp.where((lo <= block) & (block < hi), tag, 0).astype(np.uint8)[None, None]

    def _visible_pairs(self) -> float:
        pq, pk = self.positions()
        first, stop = (np.searchsorted(pk, x) for x in self.predicate.interval(pq))
        return float(np.maximum(stop - first, 0).sum())

    def _rows(self, start, count, piece):
        return piece

    def _columns(self, start, count, piece):
        return piece

    def _form(self) -> str:
        return f"ranges of {self.predicate!r}"


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Lists(BlockMask):
    """Stored lists: `index`, `tag` `[b, h, nq, W]` int32 and uint8, `counts` `[b, h, nq]` int32.

    Slots from the count on repeat the last valid index with tag 0.
    """

    index: np.ndarray | jax.Array
    tag: np.ndarray | jax.Array
    counts: np.ndarray | jax.Array
    predicates: tuple[Predicate, ...]

    @property
    def lists_shape(self) -> tuple[int, int]:
        """`(b, h)`: how many lists there are over batch and heads."""
        return np.shape(self.counts)[:2]

    def count(self, row):
        """Number of visited key blocks, `[b, h]` int32."""
        return jax.lax.dynamic_index_in_dim(jnp.asarray(self.counts), row, 2, keepdims=False)

    def entry(self, row, s):
        """Key block and tag of the `s`-th visit, `[b, h, *s.shape]`; undefined from `count(row)` on."""

        def at(x):
            x = jax.lax.dynamic_index_in_dim(jnp.asarray(x), row, 2, keepdims=False)
            return jnp.take(x, s, axis=2, mode="clip")

        return at(self.index), at(self.tag)

    def counts_per_row(self):
        return self.counts

    def tags(self):
        """Tags of all blocks, `[b, h, nq, nk]` uint8; 0 where not listed."""
        b, h, nq, _ = np.shape(self.index)
        where = (*(x[..., None] for x in np.ix_(*map(np.arange, (b, h, nq)))), self.index)
        # `max`, not assignment: padding slots repeat a listed index with tag 0.
        if array_module(self.index, self.tag) is np:
            tags = np.zeros((b, h, nq, self.nk), np.uint8)
            np.maximum.at(tags, where, self.tag)
            return tags
        return jnp.zeros((b, h, nq, self.nk), jnp.uint8).at[where].max(self.tag)

    def _visible_pairs(self) -> float:
        return views.visible_pairs_of_tiles(self)

    def _rows(self, start, count, piece):
        def cut(x):
            if is_concrete((x, start)):
                return x[:, :, start : start + count]
            return jax.lax.dynamic_slice_in_dim(jnp.asarray(x), start, count, 2)

        return replace(piece, index=cut(self.index), tag=cut(self.tag), counts=cut(self.counts))

    def _columns(self, start, count, piece):
        inside = (self.index >= start) & (self.index < start + count)
        xp = array_module(inside, self.tag)
        return compact(self.index - start, xp.where(inside, self.tag, np.uint8(0)), self.predicates, piece)

    def _form(self) -> str:
        b, h = self.lists_shape
        return f"lists [{b}, {h}] of {' | '.join(map(repr, self.predicates))}"


def _is_integer(value) -> bool:
    return np.ndim(value) == 0 and np.issubdtype(np.asarray(value).dtype, np.integer)


def _check_sizes(**sizes) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int | np.integer) or value < 1:
            raise UsageError(f"{name} must be a positive integer known before tracing, got {name}={value!r}.")
        if value > FAR:
            raise UsageError(f"{name}={value} is more than the {FAR} that positions in int32 allow.")


def _geometry(T, S, bq, bk, q_offset, kv_offset) -> BlockMask:
    _check_sizes(T=T, S=S, bq=bq, bk=bk)
    return BlockMask(
        T=int(T), S=int(S), bq=int(bq), bk=int(bk), q_offset=_normal(q_offset), kv_offset=_normal(kv_offset)
    )


def _normal(tree):
    """Concrete leaves as NumPy, Python integers as int32: one jit cache entry however a mask was built."""

    def leaf(x):
        if isinstance(x, jax.core.Tracer):
            return x
        return np.asarray(x, np.int32) if isinstance(x, int) else np.asarray(x)

    return jax.tree.map(leaf, tree)


def kind_to_tag(kind):
    xp = array_module(kind)
    return xp.where(kind == FULL, 1 | FULL_TAG, xp.where(kind == EMPTY, 0, 1)).astype(np.uint8)


def from_tags(tags, predicates, base: BlockMask) -> "Lists":
    xp = array_module(tags)
    return compact(xp.broadcast_to(np.arange(base.nk, dtype=np.int32), tags.shape), tags, predicates, base)


def compact(index, tag, predicates, base: BlockMask) -> "Lists":
    """Lists of the entries whose tag is not 0, in their order; concrete lists are cut to the longest row."""
    if 0 in index.shape:
        raise UsageError(
            f"Lists of shape {index.shape} have no place: give each row one, negative if unused."
        )
    xp = array_module(index, tag)
    tag = xp.broadcast_to(tag, index.shape)
    counts = xp.sum(tag != 0, axis=-1, dtype=np.int32)
    width = max(1, int(counts.max())) if xp is np else index.shape[-1]
    slot = np.arange(width, dtype=np.int32)
    order = xp.argsort(tag == 0, axis=-1, stable=True)
    order = xp.take_along_axis(order, xp.minimum(slot, xp.maximum(counts - 1, 0)[..., None]), axis=-1)
    tag = xp.where(slot < counts[..., None], xp.take_along_axis(tag, order, axis=-1), np.uint8(0))
    index = xp.clip(xp.take_along_axis(index, order, axis=-1), 0, base.nk - 1)
    shared = {f.name: getattr(base, f.name) for f in fields(BlockMask)}
    return Lists(**shared, index=index.astype(np.int32), tag=tag, counts=counts, predicates=predicates)


def _bit(predicates: list[Predicate], p: Predicate) -> int:
    """The bit of `p`, appended when it is new."""
    for i, known in enumerate(predicates):
        if same(known, p):
            return i
    if len(predicates) == MAX_PREDICATES:
        raise UsageError(
            f"A mask holds at most {MAX_PREDICATES} predicates; join some with | or & before building."
        )
    predicates.append(p)
    return len(predicates) - 1


def _check_lists(index, used, nk):
    bad = used & ((index < 0) | (index >= nk))
    step = index[..., 1:] - index[..., :-1]
    both = used[..., 1:] & used[..., :-1]
    problems = (
        (bad, f"is not one of the {nk} key blocks; indices count blocks, not tokens"),
        (both & (step == 0), "appears twice in its row; keep one"),
        (both & (step < 0), "is smaller than the one before it; sort each row"),
        (used[..., 1:] & ~used[..., :-1], "comes after padding; put padding last or give `count`"),
    )
    for where, problem in problems:
        if where.any():
            b, h, row, s = np.argwhere(where)[0]
            s += where.shape[-1] != index.shape[-1]
            raise UsageError(f"Key block {index[b, h, row, s]} at [{b}, {h}, {row}, {s}] {problem}.")


def _check_same_geometry(a: BlockMask, b: BlockMask):
    sizes = [(m.T, m.S, m.bq, m.bk) for m in (a, b)]
    if sizes[0] != sizes[1]:
        raise UsageError(f"Masks combine only with equal (T, S, bq, bk), got {sizes[0]} and {sizes[1]}.")
    if not same(*((m.q_offset, m.kv_offset, m.q_blocks, m.kv_blocks) for m in (a, b))):
        raise UsageError(
            "Masks combine only with the same q_offset and kv_offset; build both with the same ones."
        )


def _piece(length: int, block: int, start, count: int, name: str) -> int:
    if is_concrete(start):
        return min(count * block, length - int(start) * block)
    if length % block:
        raise UsageError(f"A traced start needs whole blocks, got {name}={length} with blocks of {block}.")
    return count * block
