"""What decays do within a chunk of a head, as the TPU kernels compute it: see `xla/decays.py`.

Both kinds have `enter`, how much of the state that enters a token sees, `leave`, how much leaves of what a
token writes, `across`, how much leaves of the state that enters, and weigh pairs of tokens in `scores`.
"""

import functools

import jax
import jax.numpy as jnp
from blockjax.kernels.linear_attention.tpu.products import dot, exact, row_sums, times
from jax import lax
from jax.experimental.pallas import tpu as pltpu

SUBLANES = 8
"""Rows of a register of 32 bits."""


class Chunk:
    """The `Gates` of a chunk of a few heads, taken apart. Columns are one transposition of all rows.

    `pairs` says whether a kernel weighs pairs of tokens.
    """

    def __init__(self, call, gates, C: int, pairs: bool = True):
        self.call, self.C, self.pairs, self.log_decay = call, C, pairs, gates.log_decay
        if gates.rows is not None:
            self.rows = gates.rows[0, 0, 0]
            self.columns = self.rows.T
        if gates.log_decay is not None:
            total = jnp.sum(gates.log_decay[0], 0, keepdims=True)
            total = jnp.concatenate([total[:, call.keys(h)] for h in range(call.heads)])
            self.across = jnp.exp(jnp.pad(total, ((0, -call.heads % 8), (0, 0)))).T

    def head(self, h: int) -> "TokenDecays | ChannelDecays":
        return (TokenDecays if self.log_decay is None else ChannelDecays)(self, h)

    def row(self, part: int, h: int) -> jax.Array:
        at = part * self.call.heads + h
        return self.rows[at : at + 1]

    def column(self, part: int, h: int) -> jax.Array:
        """[C, lanes], equal over as many lanes as any product has: spreading is what costs."""
        at = part * self.call.heads + h
        lanes = max(self.C, self.call.Hk, self.call.Hv)
        return jnp.broadcast_to(self.columns[:, at : at + 1], (self.C, lanes))


class _Decays:
    """Of head h."""

    def __init__(self, chunk: Chunk, h: int):
        self.chunk, self.h, self.C = chunk, h, chunk.C

    @functools.cached_property
    def pair(self) -> tuple[jax.Array, jax.Array]:
        """The two tokens of each pair, [C, C]."""
        return tuple(lax.broadcasted_iota(jnp.int32, (self.C, self.C), axis) for axis in (0, 1))

    def seen(self, diagonal: bool) -> jax.Array:
        token, other = self.pair
        return token >= other if diagonal else token > other


class TokenDecays(_Decays):
    """One a token: factors are [C, lanes]. Where pairs need the running sums spread, all are of those."""

    @functools.cached_property
    def enter(self) -> jax.Array:
        column = functools.partial(self.chunk.column, h=self.h)
        return jnp.exp(column(0) + column(1)) if self.chunk.pairs else column(2)

    @functools.cached_property
    def leave(self) -> jax.Array:
        if not self.chunk.pairs:
            return self.chunk.column(3, self.h)
        coarse, fine = (
            self.chunk.row(part, self.h)[:, -1:] - self.chunk.column(part, self.h) for part in (0, 1)
        )
        return jnp.exp(coarse + fine)

    @property
    def across(self) -> jax.Array:
        """[1, 1]."""
        return self.chunk.row(2, self.h)[:, -1:]

    @functools.cached_property
    def beta(self) -> jax.Array:
        return self.chunk.column(4, self.h)

    @functools.cached_property
    def weights(self) -> jax.Array:
        """Of pairs, [C, C]."""
        coarse, fine = (
            self.chunk.column(part, self.h)[:, : self.C] - self.chunk.row(part, self.h) for part in (0, 1)
        )
        return jnp.exp(jnp.where(self.seen(True), coarse + fine, -jnp.inf))

    def weighted(self, p, scale, diagonal: bool) -> jax.Array:
        p *= self.weights if scale is None else scale * self.weights
        return p if diagonal else jnp.where(self.seen(False), p, 0)

    def scores(self, a, b, scale=None, diagonal: bool = True, exactly: bool = False) -> jax.Array:
        """`scale sum_c a_ic b_jc e^(G_i - G_j)_c` of a, b [C, Hk], float32, 0 but for j <= i, or j < i."""
        return self.weighted(dot(a, b, 1, 1), scale, diagonal)

    def gradients(self, dp, a, b, scale=None, diagonal: bool = True) -> tuple[jax.Array, jax.Array]:
        """Those of a and b, for the gradient of `scores(a, b)`, [C, C]."""
        dp = self.weighted(dp, scale, diagonal).astype(b.dtype)
        return dot(dp, b, 1, 0), dot(dp, a, 0, 0)

    def read(self, factors, x, S) -> jax.Array:
        """What x [C, Hk] times factors reads of a state."""
        return times(factors, dot(x, S, 1, 0))

    def sums(self, dG, last, across, dtype) -> jax.Array:
        """The gradient of the running sum [C, 1]: see `ChannelDecays.sums`."""
        total = row_sums(jnp.sum(last, 0, keepdims=True))
        total += self.across * row_sums(jnp.sum(across, 0, keepdims=True))
        end = lax.broadcasted_iota(jnp.int32, (self.C, 1), 0) == self.C - 1
        return row_sums(dG) + jnp.where(end, total, 0)


class ChannelDecays(_Decays):
    """One a token and channel: factors are [C, Hk], and pairs are weighted inside the sum over channels.

    A chunk is halved until one token is left. Of each pair some block has the later token in its later half
    and the other in its earlier one: the weight is what passes from there to the border of the halves, times
    what passes from the border on. So of all blocks of a size the pairs are one product.
    All exponents are sums of log-decays: none is positive, and none a difference that has lost its digits.
    """

    @functools.cached_property
    def tree(self) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        """Factors [C, Hk] of blocks of 2, 4, ... C tokens, and log-decays up to and after each token."""
        within = self.chunk.log_decay[0, :, self.chunk.call.keys(self.h)]
        after, factors = jnp.zeros_like(within), []
        for bit in range(self.C.bit_length() - 1):
            factors.append(jnp.exp(self.halves(bit, after, within)))
            total, size = within + after, 1 << bit
            before, behind = pltpu.roll(total, size, 0), pltpu.roll(total, self.C - size, 0)
            within = self.halves(bit, within, within + before)
            after = self.halves(bit, after + behind, after)
        return factors, within, after

    def halves(self, bit: int, earlier, later) -> jax.Array:
        """Of blocks of 2^(bit + 1) rows the earlier halves of one array [C, H], the later of another."""
        size = 1 << bit
        if size % SUBLANES:
            row = lax.broadcasted_iota(jnp.int32, later.shape, 0)
            return jnp.where((row >> bit) % 2 == 1, later, earlier)
        # Whole registers: nothing is computed of the rows that are left out.
        starts = range(0, self.C, size)
        parts = [(later if at & size else earlier)[at : at + size] for at in starts]
        return jnp.concatenate(parts)

    @functools.cached_property
    def enter(self) -> jax.Array:
        return jnp.exp(self.tree[1])

    @functools.cached_property
    def leave(self) -> jax.Array:
        return jnp.exp(self.tree[2])

    @property
    def across(self) -> jax.Array:
        """[Hk, 1]."""
        return self.chunk.across[:, self.h : self.h + 1]

    @functools.cached_property
    def beta(self) -> jax.Array:
        return self.chunk.column(0, self.h)

    def scores(self, a, b, scale=None, diagonal: bool = True, exactly: bool = False) -> jax.Array:
        token, other = self.pair
        p = jnp.where(token == other, row_sums(a.astype(jnp.float32) * b), 0)
        for bit, factors in enumerate(self.tree[0]):
            x, y = factors * a, factors * b
            product = (
                exact(x, y, 1, 1, a.dtype) if exactly else dot(x.astype(a.dtype), y.astype(a.dtype), 1, 1)
            )
            p = jnp.where((token ^ other) >> bit == 1, product, p)
        return jnp.where(self.seen(diagonal), p if scale is None else scale * p, 0)

    def gradients(self, dp, a, b, scale=None, diagonal: bool = True) -> tuple[jax.Array, jax.Array]:
        """For a in the later halves, for b in the earlier ones: of a block both are one product."""
        token, other = self.pair
        dp = dp if scale is None else scale * dp
        both = jnp.where(token > other, dp, dp.T)
        own = row_sums(jnp.where(token == other, dp, 0)) if diagonal else jnp.zeros((self.C, 1))
        da, db = own * b, own * a
        for bit, factors in enumerate(self.tree[0]):
            x = (factors * self.halves(bit, b, a)).astype(a.dtype)
            here = jnp.where((token ^ other) >> bit == 1, both, 0).astype(a.dtype)
            found = factors * dot(here, x, 1, 0)
            da, db = self.halves(bit, da, da + found), self.halves(bit, db + found, db)
        return da, db

    def read(self, factors, x, S) -> jax.Array:
        return dot((factors * x).astype(x.dtype), S, 1, 0)

    def sums(self, dG, last, across, dtype) -> jax.Array:
        """The gradient of log-decays [C, Hk], for `dG` of their running sums.

        `last` [C, Hk] is summed over tokens, `across` [Hk, Hv] over values and times `self.across`: what the
        last of the running sums has besides, as it stands in all that leaves the chunk.
        """
        token, other = self.pair
        ones = jnp.where(token <= other, 1.0, 0.0)
        total = jnp.sum(last, 0, keepdims=True) + jnp.sum((self.across * across).T, 0, keepdims=True)
        return exact(ones, dG, 1, 0, dtype) + total
