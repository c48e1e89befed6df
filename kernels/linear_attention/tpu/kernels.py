"""The TPU kernels. Each sees a chunk of tokens of a few heads, [1, C, heads * H], and walks over the chunks.

Heads are unrolled: each is a chain of products, and the others fill its gaps. Formulas: `xla/chunks.py`.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from blockjax.kernels.linear_attention.tpu.decays import Chunk
from blockjax.kernels.linear_attention.tpu.products import dot, exact, row_sums, times
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


def inverse(call: Call, k, gates, inverses, _):
    """Keys and gates to (I + A)^-1, A = beta KK^T D below the diagonal: doubling, as `xla.chunks.inverse`."""
    chunk = Chunk(call, gates, k.shape[1])
    for h in range(call.heads):
        keys, gate = k[0, :, call.keys(h)], chunk.head(h)
        A = times(gate.beta, gate.scores(keys, keys, diagonal=False, exactly=True))
        i, j = gate.pair
        X = jnp.where(i == j, 1.0, 0.0)
        for bit in range(gate.C.bit_length() - 1):
            below = ((i >> bit) ^ (j >> bit) == 1) & (i > j)
            X -= exact(exact(X, jnp.where(below, A, 0), 1, 0, keys.dtype), X, 1, 0, keys.dtype)
        inverses[0, h, 0] = X.astype(inverses.dtype)


def forward(call: Call, q, k, v, gates, inverses, first, o, last, state):
    """Queries, keys, values, gates, inverses and the first states to outputs and the last states."""
    _begin(state, first)
    chunk = Chunk(call, gates, k.shape[1])
    for h in range(call.heads):
        S, keys, values, gate = state[h], k[0, :, call.keys(h)], v[0, :, call.values(h)], chunk.head(h)
        narrow = S.astype(v.dtype)
        written, _ = _written(gate, narrow, keys, values, inverses)
        enter = call.scale * gate.enter
        for n in call.queries(h):
            queries = q[0, :, call.keys(n)]
            p = gate.scores(queries, keys, call.scale).astype(v.dtype)
            o[0, :, call.values(n)] = (dot(p, written, 1, 0) + gate.read(enter, queries, narrow)).astype(
                o.dtype
            )
        state[h] = _update(gate, S, keys, written)
    _end(state, last)


def states(call: Call, k, v, gates, inverses, first, entries, state):
    """The states before each chunk, rounded as products take them."""
    _begin(state, first)
    chunk = Chunk(call, gates, k.shape[1], pairs=False)
    for h in range(call.heads):
        keys, narrow, gate = k[0, :, call.keys(h)], state[h].astype(entries.dtype), chunk.head(h)
        entries[0, h, 0] = narrow
        written, _ = _written(gate, narrow, keys, v[0, :, call.values(h)], inverses)
        state[h] = _update(gate, state[h], keys, written)


def backward(call: Call, q, k, v, do, gates, inverses, entries, dlast, dq, dk, dv, dgates, dfirst, dstate):
    """From the last chunk to the first; `dgates.rows` are of each head the gradients of what is a number a
    token: the running sum of such decays, and beta.
    """
    _begin(dstate, dlast)
    C, dtype = k.shape[1], v.dtype
    chunk, found = Chunk(call, gates, C), _Columns(C)
    for h in range(call.heads):
        R, S, gate = dstate[h], entries[0, h, 0], chunk.head(h)
        keys, values = k[0, :, call.keys(h)], v[0, :, call.values(h)]
        written, unread = _written(gate, S, keys, values, inverses)
        enter, leave, narrow = call.scale * gate.enter, gate.leave, R.astype(dtype)
        leaving = times(leave, dot(written, narrow, 1, 1))
        dwritten = gate.read(leave, keys, narrow)
        write, dG, into = leaving, 0, gate.across * R
        for n in call.queries(h):
            queries, cotangents = q[0, :, call.keys(n)], do[0, :, call.values(n)]
            p = gate.scores(queries, keys, call.scale).astype(dtype)
            dp = dot(cotangents, written, 1, 1)
            dqueries, dkeys = gate.gradients(dp, queries, keys, call.scale)
            dqueries += times(enter, dot(cotangents, S, 1, 1))
            dq[0, :, call.keys(n)] = dqueries.astype(dq.dtype)
            dG += queries * dqueries
            write += dkeys
            dwritten += dot(p, cotangents, 0, 0)
            into += dot(times(enter, queries).astype(dtype), cotangents, 0, 0)
        dvalues, read, dbeta = dwritten, 0, None
        if inverses is not None:
            reading = times(gate.beta, gate.enter)
            Y = dot(inverses[0, h, 0], dwritten.astype(dtype), 0, 0)
            dvalues, Y = times(gate.beta, Y), Y.astype(dtype)
            # Of A / beta = scores(keys, keys), and beta times it = scores(scaled, keys).
            scaled, da = times(gate.beta, keys).astype(dtype), -dot(Y, written, 1, 1)
            read, dkeys = gate.gradients(da, scaled, keys, diagonal=False)
            dbeta = row_sums(Y * unread) + row_sums(keys * read)
            read = times(gate.beta, read) - times(reading, dot(Y, S, 1, 1))
            write += dkeys
            into -= dot(times(reading, keys).astype(dtype), Y, 0, 0)
        dk[0, :, call.keys(h)] = (read + write).astype(dk.dtype)
        dv[0, :, call.values(h)] = dvalues.astype(dv.dtype)
        dG = gate.sums(dG + keys * (read - write), keys * leaving, S * R, dtype)
        if dgates.log_decay is None:
            found.add(dG)
        else:
            dgates.log_decay[0, :, call.keys(h)] = dG
        if dbeta is not None:
            found.add(dbeta)
        dstate[h] = into
    if dgates.rows is not None:
        dgates.rows[0, 0, 0] = found.rows(dgates.rows.shape[3])
    _end(dstate, dfirst)


class _Columns:
    """Numbers per token [C, 1], put together and turned into rows at once."""

    def __init__(self, C: int):
        self.lane, self.count = lax.broadcasted_iota(jnp.int32, (C, 128), 1), 0
        self.columns = jnp.zeros((C, 128), jnp.float32)

    def add(self, x) -> None:
        self.columns = jnp.where(self.lane == self.count, x, self.columns)
        self.count += 1

    def rows(self, n: int):
        return self.columns.T[:n]


def _written(gate, S, keys, values, inverses):
    """What a chunk writes, and of the delta rule what it did not read of the state that enters, float32."""
    if inverses is None:
        return values, None
    unread = values - gate.read(gate.enter, keys, S)
    written = dot(inverses[0, gate.h, 0], times(gate.beta, unread).astype(values.dtype), 1, 0)
    return written.astype(values.dtype), unread


def _update(gate, S, keys, written):
    """The state after a chunk."""
    return gate.across * S + dot(times(gate.leave, keys).astype(written.dtype), written, 0, 0)


def _begin(state, first):
    """Before the first chunk of the walk; None for zeros."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = jnp.zeros(state.shape, state.dtype) if first is None else first[0]


def _end(state, last):
    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        last[0] = state[...]
