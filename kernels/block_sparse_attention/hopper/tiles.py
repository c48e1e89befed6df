"""Tiles as a kernel sees them: what is held, how it moves, which pairs see each other."""

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from blockjax.kernels.block_sparse_attention.hopper import WG_ROWS, WGS
from jax import lax

from blockjax.masks.predicates import And, Between, Causal, Everything, Or, Predicate

LOG2_E = math.log2(math.e)

WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)
COLUMN = WGMMA.reduce(0)


def tiled(shape: tuple[int, ...], dtype) -> pl.MemoryRef:
    """Shared memory in the layout that `wgmma` and the copy engine agree on."""
    transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


@dataclass(frozen=True)
class Rows:
    """What a CTA holds: in each of its `wgs` warpgroups `tokens` of each of `heads` heads.

    The second warpgroup holds the tokens that follow, or if `spread` the heads that follow. Where tokens and
    heads do not fill 64 rows, what the other rows hold is computed and dropped.
    """

    tokens: int
    heads: int
    wgs: int
    spread: bool

    @staticmethod
    def of(block: int, sharing: int) -> "Rows":
        """For blocks of `block` tokens whose list is shared by `sharing` heads."""
        if block >= WGS * WG_ROWS:
            return Rows(WG_ROWS, 1, WGS, spread=False)
        tokens = min(block, WG_ROWS)
        heads = max(h for h in range(1, WG_ROWS // tokens + 1) if sharing % h == 0)
        return Rows(tokens, heads, WGS if sharing % (WGS * heads) == 0 else 1, spread=True)

    @property
    def cta_tokens(self) -> int:
        return self.tokens * (1 if self.spread else self.wgs)

    @property
    def cta_heads(self) -> int:
        return self.heads * (self.wgs if self.spread else 1)

    def units(self, T: int) -> int:
        """Warpgroups' shares that cover T tokens, whole CTAs."""
        return pl.cdiv(T, self.cta_tokens) * self.cta_tokens // self.tokens

    def arrange(self, x, fill=0):
        """From `[b, n, T]`, n heads or 1 for all, to `[b, n / heads | 1, units, 64]`: rows of a warpgroup."""
        b, n, T = x.shape
        units, heads = self.units(T), self.heads if n > 1 else 1
        x = jnp.pad(x, ((0, 0), (0, 0), (0, units * self.tokens - T)), constant_values=fill)
        x = x.reshape(b, n // heads, heads, units, self.tokens).swapaxes(2, 3)
        x = jnp.broadcast_to(x, (*x.shape[:3], self.heads, self.tokens)).reshape(b, n // heads, units, -1)
        return jnp.pad(x, ((0, 0),) * 3 + ((0, WG_ROWS - x.shape[-1]),), constant_values=fill)

    def restore(self, x, T: int):
        """The inverse, `[b, n, T]`."""
        b, groups, units, _ = x.shape
        x = x[..., : self.heads * self.tokens].reshape(b, groups, units, self.heads, self.tokens)
        return x.swapaxes(2, 3).reshape(b, groups * self.heads, -1)[..., :T]

    def share(self, wg, first, head):
        """First token and head of a warpgroup, from those of its CTA."""
        if self.spread:
            return first, head + wg * self.heads
        return first + wg * self.tokens, head

    def pieces(self, ref, shared, batch, first, head):
        """Pairs of `[tokens, H]` in global memory and in a warpgroup's shared memory."""
        for i in range(self.heads):
            here = pl.ds(first, self.tokens)
            yield ref.at[batch, here, head + i], shared.at[pl.ds(i * self.tokens, self.tokens)]


@dataclass(frozen=True)
class Steps:
    """How a CTA moves: `tokens` a step, `buffers` steps in flight, through blocks of `block` tokens.

    A block is cut into tiles of `tokens`, or several blocks are gathered into one.
    """

    tokens: int
    buffers: int
    block: int
    margin: int = 0  # around operands that are padded, if not a step

    @property
    def padding(self) -> int:
        return self.margin or self.tokens

    @property
    def half(self) -> "Steps":
        """Half a step, of the same operands."""
        return replace(self, tokens=self.tokens // 2, margin=self.padding)

    @property
    def gathered(self) -> int:
        return max(1, self.tokens // self.block)

    @property
    def piece(self) -> int:
        return min(self.tokens, self.block)

    def slot(self, s):
        return lax.rem(s, self.buffers)

    def pad(self, x, fill=0):
        """Pads the last axis by a step on both ends: a gathered piece is loaded with what lies around it."""
        after = self.padding + -x.shape[-1] % max(self.tokens, self.block)
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(self.padding, after)], constant_values=fill)


class Side(NamedTuple):
    """Per-token operands of one side of the call, or None where not given.

    Held: `[1 | B, 1, units, 64]`. Moving: `[1 | B, tokens]`, padded as by `Steps.pad`.
    """

    positions: Any
    ids: Any

    @staticmethod
    def held(positions, ids, rows: Rows) -> "Side":
        return Side(*(None if x is None else rows.arrange(x[:, None]) for x in (positions, ids)))

    @staticmethod
    def moving(positions, ids, steps: Steps) -> "Side":
        return Side(*(None if x is None else steps.pad(x) for x in (positions, ids)))


@dataclass(frozen=True)
class Tokens:
    """Functions that give vectors over the tokens of one side of a tile, or None for what is not given.

    Each is called where its vector is used: the compiler finds no layout for one that nobody uses.
    """

    make_index: Callable
    offset: Any
    positions: Callable | None
    ids: Callable | None

    @property
    def index(self) -> jax.Array:
        return self.make_index()

    @property
    def position(self) -> jax.Array:
        return self.index + self.offset if self.positions is None else self.positions()


_LEAST = -(2**31)

NOWHERE = 2**31 - 1024
"""Index of a token of a piece that does not count."""


def held_tokens(side: Side, rows: Rows, batch, first, offset) -> Tokens:
    """Of the rows of a warpgroup whose tokens start at `first`."""

    def index():
        lane = plgpu.broadcasted_iota(jnp.int32, (WG_ROWS,), 0, layout=ROW)
        return first + (lane if rows.heads == 1 else lax.rem(lane, rows.tokens))

    def load(ref):
        if ref is None:
            return None
        where = ref.at[0 if ref.shape[0] == 1 else batch, 0, lax.div(first, rows.tokens)]
        loaded = plgpu.load(where, layout=ROW, optimized=False)
        return lambda: loaded  # once for all steps

    return Tokens(index, offset, *map(load, side))


def held_slope(slope, rows: Rows, head):
    """Of each row of a warpgroup whose heads start at `head`, from `[groups, 64]`; None without a bias."""
    if slope is None:
        return None
    return plgpu.load(slope.at[lax.div(head, rows.heads)], layout=ROW, optimized=False)


def moving_tokens(side: Side, steps: Steps, pieces: list[tuple], batch, offset) -> Tokens:
    """Of one step."""

    def first(i, unit, live):
        own = (unit - i) * steps.piece
        return own if live is None else jnp.where(live, own, NOWHERE)

    def index():
        firsts = [first(i, unit, live) for i, (unit, _, live) in enumerate(pieces)]
        return _join(steps, firsts) + _lane(steps)

    def load(ref):
        if ref is None:
            return None
        batched = 0 if ref.shape[0] == 1 else batch
        return functools.cache(lambda: gather(steps, pieces, lambda first: ref.at[batched, first]))

    return Tokens(index, offset, *map(load, side))


def gather(steps: Steps, pieces: list[tuple], at: Callable):
    """A vector over a step's tokens from global memory padded as by `Steps.pad`; `at` indexes a row of it."""

    def load(i, unit):
        first = pl.ds((unit - i) * steps.piece + steps.padding, steps.tokens)
        return plgpu.load(at(first), layout=COLUMN, optimized=False)

    return _join(steps, [load(i, unit) for i, (unit, _, _) in enumerate(pieces)])


def tags(steps: Steps, pieces: list[tuple]) -> Callable:
    """Makes the tag of a step, or of each of its tokens."""
    return lambda: _join(steps, [tag for _, tag, _ in pieces])


def _join(steps: Steps, parts: list):
    """One vector of which part i fills the tokens of piece i; what is there alone is returned as it is."""
    joined = parts[0]
    for i, part in enumerate(parts[1:], 1):
        joined = jnp.where(_lane(steps) >= i * steps.piece, part, joined)
    return joined


def _lane(steps: Steps):
    return plgpu.broadcasted_iota(jnp.int32, (steps.tokens,), 0, layout=COLUMN)


@dataclass(frozen=True)
class Plane:
    """A tile of scores: queries along `q_axis`."""

    shape: tuple[int, int]
    q_axis: int

    def of_query(self, x):
        return lax.broadcast_in_dim(x, self.shape, [self.q_axis])

    def of_key(self, x):
        return lax.broadcast_in_dim(x, self.shape, [1 - self.q_axis])

    def of_moving(self, x):
        """From a scalar or a vector over the step's tokens."""
        return lax.broadcast_in_dim(x, self.shape, [1] if jnp.ndim(x) else [])

    def visible(self, predicates: tuple[Predicate, ...], tag: Callable, q: Tokens, k: Tokens, limits):
        """Which pairs see each other, None for all.

        `limits` are the indices from which on queries and keys do not exist, None where a tile holds no such.
        """
        granted = []
        for i, predicate in enumerate(predicates):
            held = self._holds(predicate, q, k)
            listed = self.of_moving(tag() & (1 << i)) != 0 if len(predicates) > 1 else None
            granted.append(_all(held, listed))
        seen = None if None in granted else functools.reduce(operator.or_, granted)
        T, S = limits
        seen = _all(
            seen,
            None if T is None else self.of_query(q.index) < T,
            None if S is None else self.of_key(k.index) < S,
        )
        if q.ids is None:
            return seen
        ids = self.of_query(q.ids())
        return _all(seen, ids == self.of_key(k.ids()), ids >= 0)

    def distance(self, q: Tokens, k: Tokens):
        return jnp.abs(self.of_query(q.position) - self.of_key(k.position)).astype(jnp.float32)

    def _holds(self, predicate: Predicate, q: Tokens, k: Tokens):
        """None where a predicate holds everywhere."""
        if isinstance(predicate, Everything):
            return None
        if isinstance(predicate, And):
            return _all(self._holds(predicate.a, q, k), self._holds(predicate.b, q, k))
        if isinstance(predicate, Or):
            a, b = self._holds(predicate.a, q, k), self._holds(predicate.b, q, k)
            return None if a is None or b is None else a | b
        if isinstance(predicate, Causal):
            return self.of_key(k.position) <= self.of_query(q.position)
        if isinstance(predicate, Between):
            keys = self.of_key(k.position)
            return (predicate.first <= keys) & (keys < predicate.stop)
        if predicate.interval(0) is None:
            q, k = self.of_query(q.position), self.of_key(k.position)
            # Always true, for a function that looks at one of the two: both vectors must be used.
            return predicate.visible(q, k) & (q >= _LEAST) & (k >= _LEAST)
        first, stop = map(self.of_query, predicate.interval(q.position))
        return (first <= self.of_key(k.position)) & (self.of_key(k.position) < stop)


class Reach(NamedTuple):
    """Of a few consecutive queries: they see no key before `first` and none from `stop` on."""

    first: jax.Array
    stop: jax.Array

    @staticmethod
    def of(mask, queries, first, tokens: int) -> "Reach | None":
        """Of `tokens` queries from index `first` on; None if it cannot be told or has no limit.

        `mask` is a `call.Mask`, and `queries` has their positions if they are given.
        """
        predicates, first = mask.predicates, first + mask.q_offset
        unknown = any(isinstance(x, Everything) or x.interval(0) is None for x in predicates)
        if unknown or queries.positions is not None:
            return None
        firsts = [x.interval(first)[0] for x in predicates]
        stops = [x.interval(first + tokens - 1)[1] for x in predicates]
        return Reach(functools.reduce(jnp.minimum, firsts), functools.reduce(jnp.maximum, stops))

    def meets(self, first, tokens: int):
        """Whether some of the `tokens` keys from position `first` on may be seen."""
        return (first < self.stop) & (first + tokens > self.first)


def _all(*conditions):
    """Their conjunction; None stands for true."""
    conditions = [x for x in conditions if x is not None]
    return functools.reduce(operator.and_, conditions) if conditions else None


@dataclass(frozen=True)
class Scores:
    """From products to scores."""

    scale: float
    soft_cap: float | None

    def __call__(self, z, penalty=None):
        """`(x, c, slope)`: the score is x c ln 2, and slope its derivative by scale * z, None for 1.

        `penalty` is subtracted from the score, in units of ln 2.
        """
        slope = None
        if self.soft_cap is None:
            x, c = z, self.scale * LOG2_E
        else:
            # tanh from exp2: the chip's own tanh is good to 11 bits.
            x = 1 - 2 / (1 + jnp.exp2(z * (2 * LOG2_E * self.scale / self.soft_cap)))
            c, slope = self.soft_cap * LOG2_E, 1 - x * x
        # The greatest score is found before it is multiplied by c, which must be positive for that.
        if penalty is not None or c <= 0:
            x, c = x * c if penalty is None else x * c - penalty, 1.0
        return x, c, slope
