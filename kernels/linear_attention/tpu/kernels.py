"""The TPU kernels. Each sees a chunk of tokens of a few heads, [1, C, heads * H], and walks over the chunks.

Heads are unrolled: each is a chain of products, and the others fill its gaps. A number per token is needed as
a row and as a column; columns are one transposition of all rows. Spreading a column over lanes is what costs
most beside products: where pairs of tokens need the running sums spread, all factors are computed of those.
Formulas: `xla/chunks.py`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl


@dataclass(frozen=True)
class Call:
    """What is static: queries a state, states, channels of keys and values, the factor of scores."""

    G: int
    heads: int
    Hk: int
    Hv: int
    scale: float

    def keys(self, h: int) -> slice:
        return slice(h * self.Hk, (h + 1) * self.Hk)

    def values(self, h: int) -> slice:
        return slice(h * self.Hv, (h + 1) * self.Hv)

    def queries(self, h: int) -> list[int]:
        return [h * self.G + g for g in range(self.G)]


class Gates:
    """What `gates.Rows` holds of a chunk, [parts * heads and more, C]: each part of all heads.

    Factors per token are [C, lanes], equal over lanes: `_times` multiplies with as many as it needs. `pairs`
    says whether a kernel needs `weights`.
    """

    def __init__(self, call: Call, rows, pairs: bool = True):
        self.rows, self.heads, self.pairs = rows, call.heads, pairs
        self.columns = rows.T
        self.C = C = rows.shape[1]
        self.lanes = max(C, call.Hk, call.Hv)
        self.token, self.other = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))

    def row(self, part: int, h: int) -> jax.Array:
        at = part * self.heads + h
        return self.rows[at : at + 1]

    def column(self, part: int, h: int) -> jax.Array:
        at = part * self.heads + h
        return jnp.broadcast_to(self.columns[:, at : at + 1], (self.C, self.lanes))

    def weights(self, h: int) -> jax.Array:
        """Of pairs of tokens, [C, C]."""
        coarse, fine = (self.column(part, h)[:, : self.C] - self.row(part, h) for part in (0, 1))
        return jnp.exp(jnp.where(self.token >= self.other, coarse + fine, -jnp.inf))

    def enter(self, h: int) -> jax.Array:
        """How much of the state that enters a token sees."""
        return jnp.exp(self.column(0, h) + self.column(1, h)) if self.pairs else self.column(2, h)

    def leave(self, h: int) -> jax.Array:
        """How much leaves of what a token writes."""
        if not self.pairs:
            return self.column(3, h)
        coarse, fine = (self.row(part, h)[:, -1:] - self.column(part, h) for part in (0, 1))
        return jnp.exp(coarse + fine)

    def across(self, h: int) -> jax.Array:
        """How much leaves of the state that enters, [1, 1]."""
        return self.row(2, h)[:, -1:]

    def beta(self, h: int) -> jax.Array:
        return self.column(4, h)


def inverse(call: Call, k, rows, inverses, _):
    """Keys and gates to (I + A)^-1, A = beta KK^T D below the diagonal: doubling, as `xla.chunks.inverse`."""
    gates = Gates(call, rows[0, 0, 0])
    i, j = gates.token, gates.other
    C = i.shape[0]
    for h in range(call.heads):
        keys = k[0, :, call.keys(h)]
        A = _times(gates.beta(h), jnp.where(i > j, _dot(keys, keys, 1, 1) * gates.weights(h), 0))
        X = jnp.where(i == j, 1.0, 0.0)
        for bit in range(C.bit_length() - 1):
            below = ((i >> bit) ^ (j >> bit) == 1) & (i > j)
            X -= _exact(_exact(X, jnp.where(below, A, 0), keys.dtype), X, keys.dtype)
        inverses[0, h, 0] = X.astype(inverses.dtype)


def forward(call: Call, q, k, v, rows, inverses, first, o, last, state):
    """Queries, keys, values, gates, inverses and the first states to outputs and the last states."""
    _begin(state, first)
    gates = Gates(call, rows[0, 0, 0])
    for h in range(call.heads):
        S, keys, values = state[h], k[0, :, call.keys(h)], v[0, :, call.values(h)]
        narrow = S.astype(v.dtype)
        written, _ = _written(gates, h, narrow, keys, values, inverses)
        weights, enter = call.scale * gates.weights(h), call.scale * gates.enter(h)
        for n in call.queries(h):
            queries = q[0, :, call.keys(n)]
            p = (_dot(queries, keys, 1, 1) * weights).astype(v.dtype)
            read = _times(enter, _dot(queries, narrow, 1, 0))
            o[0, :, call.values(n)] = (_dot(p, written, 1, 0) + read).astype(o.dtype)
        state[h] = _update(gates, h, S, keys, written)
    _end(state, last)


def states(call: Call, k, v, rows, inverses, first, entries, state):
    """The states before each chunk, rounded as products take them."""
    _begin(state, first)
    gates = Gates(call, rows[0, 0, 0], pairs=False)
    for h in range(call.heads):
        keys, narrow = k[0, :, call.keys(h)], state[h].astype(entries.dtype)
        entries[0, h, 0] = narrow
        written, _ = _written(gates, h, narrow, keys, v[0, :, call.values(h)], inverses)
        state[h] = _update(gates, h, state[h], keys, written)


def backward(call: Call, q, k, v, do, rows, inverses, entries, dlast, dq, dk, dv, sums, dfirst, dstate):
    """From the last chunk to the first; `sums` are the gradients of the gates' running sums, and of beta."""
    _begin(dstate, dlast)
    gates = Gates(call, rows[0, 0, 0])
    C, dtype = rows.shape[-1], v.dtype
    found = _Columns(C)
    for h in range(call.heads):
        R, S = dstate[h], entries[0, h, 0]
        keys, values = k[0, :, call.keys(h)], v[0, :, call.values(h)]
        written, unread = _written(gates, h, S, keys, values, inverses)
        pairs = gates.weights(h)
        weights, enter = call.scale * pairs, call.scale * gates.enter(h)
        leave, across, narrow = gates.leave(h), gates.across(h), R.astype(dtype)
        leaving = _times(leave, _dot(written, narrow, 1, 1))
        dwritten = _times(leave, _dot(keys, narrow, 1, 0))
        write, along, into = leaving, 0, across * R
        for n in call.queries(h):
            queries, cotangents = q[0, :, call.keys(n)], do[0, :, call.values(n)]
            p = (_dot(queries, keys, 1, 1) * weights).astype(dtype)
            dp = (_dot(cotangents, written, 1, 1) * weights).astype(dtype)
            dqueries = _dot(dp, keys, 1, 0) + _times(enter, _dot(cotangents, S, 1, 1))
            dq[0, :, call.keys(n)] = dqueries.astype(dq.dtype)
            along += _sum(queries * dqueries)
            write += _dot(dp, queries, 0, 0)
            dwritten += _dot(p, cotangents, 0, 0)
            into += _dot(_times(enter, queries).astype(dtype), cotangents, 0, 0)
        if inverses is None:
            dvalues, read = dwritten, jnp.zeros_like(write)
        else:
            beta, reading = gates.beta(h), gates.beta(h) * gates.enter(h)
            Y = _dot(inverses[0, h, 0], dwritten.astype(dtype), 0, 0)
            dvalues, Y = _times(beta, Y), Y.astype(dtype)
            da = -jnp.where(gates.token > gates.other, _dot(Y, written, 1, 1) * pairs, 0)
            scaled = _times(beta, da).astype(dtype)
            read = _dot(scaled, keys, 1, 0) - _times(reading, _dot(Y, S, 1, 1))
            write += _dot(scaled, keys, 0, 0)
            into -= _dot(_times(reading, keys).astype(dtype), Y, 0, 0)
            dbeta = _sum(Y * unread) + _sum(da * _dot(keys, keys, 1, 1))
            found.put(call.heads + h, dbeta)
        dk[0, :, call.keys(h)] = (read + write).astype(dk.dtype)
        dv[0, :, call.values(h)] = dvalues.astype(dv.dtype)
        total = jnp.sum(_sum(keys * leaving), 0, keepdims=True)
        total += across * jnp.sum(_sum(S * R), 0, keepdims=True)
        last = lax.broadcasted_iota(jnp.int32, (C, 1), 0) == C - 1
        found.put(h, along + _sum(keys * (read - write)) + jnp.where(last, total, 0))
        dstate[h] = into
    sums[0, 0, 0] = found.rows(sums.shape[3])
    _end(dstate, dfirst)


class _Columns:
    """Numbers per token [C, 1], put together and turned into rows at once."""

    def __init__(self, C: int):
        self.lane = lax.broadcasted_iota(jnp.int32, (C, 128), 1)
        self.columns = jnp.zeros((C, 128), jnp.float32)

    def put(self, i: int, x) -> None:
        self.columns = jnp.where(self.lane == i, x, self.columns)

    def rows(self, n: int):
        return self.columns.T[:n]


def _written(gates: Gates, h: int, S, keys, values, inverses):
    """What a chunk writes, and of the delta rule what it did not read of the state that enters, float32."""
    if inverses is None:
        return values, None
    unread = values - _times(gates.enter(h), _dot(keys, S, 1, 0))
    written = _dot(inverses[0, h, 0], _times(gates.beta(h), unread).astype(values.dtype), 1, 0)
    return written.astype(values.dtype), unread


def _update(gates: Gates, h: int, S, keys, written):
    """The state after a chunk."""
    return gates.across(h) * S + _dot(_times(gates.leave(h), keys).astype(written.dtype), written, 0, 0)


def _begin(state, first):
    """Before the first chunk of the walk; None for zeros."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = jnp.zeros(state.shape, state.dtype) if first is None else first[0]


def _end(state, last):
    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        last[0] = state[...]


def _dot(a, b, i: int, j: int):
    """Contracts axis i of a with axis j of b, in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((i,), (j,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _exact(a, b, dtype):
    """The product of float32 matrices; to 16 bits, in three products of bfloat16, if that is the dtype."""
    if dtype == jnp.float32:
        return _dot(a, b, 1, 0)
    (a, a_rest), (b, b_rest) = (_halves(x) for x in (a, b))
    return _dot(a, b, 1, 0) + _dot(a, b_rest, 1, 0) + _dot(a_rest, b, 1, 0)


def _halves(x):
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _times(factors, x):
    """Each row of x [C, H] times its factor, [C, lanes]."""
    return factors[:, : x.shape[1]] * x


def _sum(x):
    return jnp.sum(x, axis=1, keepdims=True)
