"""The four TPU kernels. Each sees a tile of tokens, whole rows of M, of every array.

What is linear in queries goes through the matrix units, for all queries and heads at once: `w` [rows, M] has
the query of one head in each of its first R * h rows and zeros elsewhere. What weighs tokens one by one is
elementwise, over groups of rows and pieces of M that stay in registers. Numbers per token lie in columns of
one array, `Columns`. Formulas: with the passes of `xla.py`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

LANES = 128
PIECE = 512
"""Of M, at most: a group of rows takes eight registers."""


@dataclass(frozen=True)
class Call:
    """All that is static about one kernel."""

    n: int
    R: int
    M: int
    heads: int
    tokens: int
    tile: int  # rows
    group: int  # of rows, a divisor of the tile
    eps: float
    norm_eps: float

    @property
    def rh(self) -> int:
        return self.R * self.heads

    @property
    def ragged(self) -> bool:
        """Whether the last tile reaches beyond the last token."""
        return self.tokens % self.tile > 0

    def groups(self, body) -> None:
        """Calls `body(rows)` for each group of rows of a tile."""

        def step(i, carry):
            body(pl.ds(pl.multiple_of(i * self.group, self.group), self.group))
            return carry

        lax.fori_loop(0, self.tile // self.group, step, 0)

    def pieces(self, body, carry=None):
        """Folds `body(head, columns, carry)` over pieces of M that lie in one head each.

        In a loop where heads are whole registers wide, with `head` traced if there are several.
        """
        width = self.M // self.heads
        sizes = [size for size in range(LANES, PIECE + 1, LANES) if width % size == 0]
        if not sizes:
            for start in range(0, self.M, width):
                for low in range(start, start + width, PIECE):
                    columns = slice(low, min(low + PIECE, start + width))
                    carry = body(start // width, columns, carry)
            return carry
        size = sizes[-1]

        def step(i, carry):
            head = 0 if self.heads == 1 else i // (width // size)
            return body(head, pl.ds(pl.multiple_of(i * size, size), size), carry)

        return lax.fori_loop(0, self.M // size, step, carry)

    def zeros(self, columns: int = 1) -> jax.Array:
        """Numbers of a group of rows."""
        return jnp.zeros((self.group, columns), jnp.float32)

    def first(self) -> jax.Array:
        """The token of the tile's first row."""
        return (pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)) * self.tile

    def exists(self, first, rows) -> jax.Array:
        """[rows, 1], whether the tokens are there: what lies beyond the last one is not to be added up."""
        if not self.ragged:
            return jnp.bool_(True)
        start, size = (0, self.tile) if isinstance(rows, slice) else (rows.start, rows.size)
        return first + start + lax.broadcasted_iota(jnp.int32, (size, 1), 0) < self.tokens


class Columns:
    """Where the numbers of a read lie: n times R * h logits, R * h of lse, n norms."""

    def __init__(self, call: Call):
        self.n, self.rh = call.n, call.rh

    def logits(self, i: int) -> slice:
        return slice(i * self.rh, (i + 1) * self.rh)

    @property
    def lse(self) -> slice:
        return self.logits(self.n)

    def norm(self, i: int) -> slice:
        return _column(self.lse.stop + i)


def read_forward(call: Call, streamed, shared, out, sums, scratch):
    """Sources [tile, M] and `w` to R means [tile, M] and their numbers [tile, columns]."""
    (sources, w), (means, stats) = (streamed, shared), out
    means, at = _each(call, means), Columns(call)
    for i, source in enumerate(sources):
        stats[:, at.logits(i)] = exact_dot(source[...], w[...], ((1,), (1,)))[:, : call.rh]

    def group(rows):
        def square(head, cols, carry):
            return tuple(x + _sum(_wide(v[rows, cols]) ** 2) for x, v in zip(carry, sources, strict=True))

        squares = call.pieces(square, (call.zeros(),) * call.n)
        logits = []
        for i in range(call.n):
            norm = lax.rsqrt(squares[i] / call.M + call.eps)
            logits.append(norm * stats[rows, at.logits(i)])
            stats[rows, at.logits(i)] = logits[-1]
            stats[rows, at.norm(i)] = norm
        top = logits[0]
        for logit in logits[1:]:
            top = jnp.maximum(top, logit)
        lse = top + jnp.log(sum(jnp.exp(logit - top) for logit in logits))
        stats[rows, at.lse] = lse
        weights = [jnp.exp(logit - lse) for logit in logits]

        def mix(head, cols, carry):
            for r, mean in enumerate(means):
                pairs = zip(weights, sources, strict=True)
                parts = (_pick(p, r * call.heads + head) * _wide(v[rows, cols]) for p, v in pairs)
                mean[rows, cols] = sum(parts).astype(mean.dtype)

        call.pieces(mix)

    call.groups(group)


def read_backward(call: Call, streamed, shared, out, sums, scratch):
    """Sources, cotangents of means and of lse [tile, R * h], numbers, `w` to gradients of sources and `w`.

    `scratch`: for each source `r ds` [tile, rows of w]; weights [tile, n * R * h]; `r^2 / M sum(ds s)`
    [tile, n]; one product [tile, M].
    """
    (sources, dmeans, dlse, stats), w, dsources, dw = streamed, shared, out, sums
    dmeans, at = _each(call, dmeans), Columns(call)
    *scaled, weights, back, along = scratch
    first = call.first()
    if call.rh < w.shape[0]:
        for a in scaled:
            a[...] = jnp.zeros(a.shape, a.dtype)

    def gradients(rows):
        lse = stats[rows, at.lse]
        p = [jnp.exp(stats[rows, at.logits(i)] - lse) for i in range(call.n)]
        c = [_products(call, rows, source, dmeans) for source in sources]
        mean = sum(a * b for a, b in zip(p, c, strict=True)) - dlse[rows, :]
        there = call.exists(first, rows)
        for i in range(call.n):
            ds, norm = p[i] * (c[i] - mean), stats[rows, at.norm(i)]
            weights[rows, at.logits(i)] = p[i]
            scaled[i][rows, : call.rh] = jnp.where(there, norm * ds, 0)
            back[rows, _column(i)] = norm * norm / call.M * _sum(ds * stats[rows, at.logits(i)])

    call.groups(gradients)
    _zero_first(dw)
    for i, (source, dsource) in enumerate(zip(sources, dsources, strict=True)):
        v = jnp.where(call.exists(first, slice(None)), source[...], 0) if call.ragged else source[...]
        dw[...] += exact_dot(scaled[i][...], v, ((0,), (0,)))
        along[...] = exact_dot(scaled[i][...], w[...], ((1,), (0,)))

        def group(rows, i=i, source=source, dsource=dsource):
            p, b = weights[rows, at.logits(i)], back[rows, _column(i)]

            def gradient(head, cols, carry):
                dv = along[rows, cols] - b * _wide(source[rows, cols])
                for r, dmean in enumerate(dmeans):
                    dv += _pick(p, r * call.heads + head) * _wide(dmean[rows, cols])
                dsource[rows, cols] = dv.astype(dsource.dtype)

            call.pieces(gradient)

        call.groups(group)


def join_forward(call: Call, streamed, shared, out, sums, scratch):
    """Running sum, update or None, mean [tile, M], lse [tile, h] to running sum, x and numbers.

    Numbers [tile, h + 2] are logits, norm and rms; `shared` are query and gain [1, M].
    """
    (partial, update, mean, lse), (query, gain), (total, x, stats) = streamed, shared, out

    def group(rows):
        absent = lse[rows, 0:1] == jnp.inf

        def add(head, cols, carry):
            square, products = carry
            s = _wide(partial[rows, cols])
            s = s if update is None else s + _wide(update[rows, cols])
            total[rows, cols] = jnp.where(absent, 0, s).astype(total.dtype)
            s = _wide(total[rows, cols])
            return square + _sum(s * s), products + _place(_sum(s * query[:, cols]), head, call.heads)

        square, products = call.pieces(add, (call.zeros(), call.zeros(call.heads)))
        norm = lax.rsqrt(square / call.M + call.eps)
        logit = norm * products
        g = _sigmoid(logit - lse[rows, :])

        def merged(head, cols):
            return _merge(_pick(g, head), total, mean, rows, cols)

        square = call.pieces(lambda head, cols, carry: carry + _sum(merged(head, cols) ** 2), call.zeros())
        rms = lax.rsqrt(square / call.M + call.norm_eps)

        def normalise(head, cols, carry):
            x[rows, cols] = (rms * merged(head, cols) * gain[:, cols]).astype(x.dtype)

        call.pieces(normalise)
        stats[rows, 0 : call.heads] = jnp.where(absent, -jnp.inf, logit)
        stats[rows, _column(call.heads)] = norm
        stats[rows, _column(call.heads + 1)] = rms

    call.groups(group)


def join_backward(call: Call, streamed, shared, out, sums, scratch):
    """As in the forward, and cotangents, to gradients of running sum, mean and lse; of query and gain."""
    (total, mean, lse, stats, dtotal, dx), (query, gain) = streamed, shared
    (ds, dmean, dlse), (dquery, dgain) = out, sums
    _zero_first(dquery)
    _zero_first(dgain)
    first = call.first()

    def group(rows):
        there, absent = call.exists(first, rows), lse[rows, 0:1] == jnp.inf
        logit, norm = stats[rows, 0 : call.heads], stats[rows, _column(call.heads)]
        rms = stats[rows, _column(call.heads + 1)]
        g = _sigmoid(logit - lse[rows, :])

        def normal(head, cols):
            """Of a piece: the normalised merge and its cotangent."""
            h = rms * _merge(_pick(g, head), total, mean, rows, cols)
            return h, _wide(dx[rows, cols]) * gain[:, cols]

        def multiply(head, cols, carry):
            h, dy = normal(head, cols)
            return carry + _sum(h * dy)

        along = call.pieces(multiply, call.zeros()) / call.M

        def merged(head, cols):
            """Of a piece: running sum, the normalised merge, and the cotangent of the merge."""
            h, dy = normal(head, cols)
            return _wide(total[rows, cols]), h, rms * (dy - h * along)

        def compare(head, cols, carry):
            s, _, dh = merged(head, cols)
            return carry + _place(_sum(dh * (s - _wide(mean[rows, cols]))), head, call.heads)

        a = g * (1 - g) * call.pieces(compare, call.zeros(call.heads))
        dlse[rows, :] = -a
        back = norm * norm / call.M * _sum(a * jnp.where(absent, 0, logit))
        scaled = norm * a

        def gradient(head, cols, carry):
            s, h, dh = merged(head, cols)
            weighted, b = _pick(g, head) * dh, _pick(scaled, head)
            dpartial = weighted + b * query[:, cols] - back * s + _wide(dtotal[rows, cols])
            ds[rows, cols] = jnp.where(absent, 0, dpartial).astype(ds.dtype)
            dmean[rows, cols] = (dh - weighted).astype(dmean.dtype)
            dquery[:, cols] += _down(jnp.where(there, b * s, 0))
            dgain[:, cols] += _down(jnp.where(there, _wide(dx[rows, cols]) * h, 0))

        call.pieces(gradient)

    call.groups(group)


def exact_dot(a, b, contract) -> jax.Array:
    """A product to float32 of what is bfloat16 or float32: the matrix units multiply bfloat16.

    A float32 number is the sum of three bfloat16 ones; what is smaller than the last digit is left out.
    """
    return sum(
        lax.dot_general(x, y, (contract, ((), ())), preferred_element_type=jnp.float32)
        for i, x in enumerate(_parts(a))
        for j, y in enumerate(_parts(b))
        if i + j < 3
    )


def _parts(x) -> list[jax.Array]:
    if x.dtype == jnp.bfloat16:
        return [x]
    parts = []
    for _ in range(3):
        parts.append(x.astype(jnp.bfloat16))
        x = x - _wide(parts[-1])
    return parts


def _products(call: Call, rows, source, others) -> jax.Array:
    """Of a group of rows with each of `others`, head by head: [rows, R * h]."""

    def add(head, cols, carry):
        v = _wide(source[rows, cols])
        for r, other in enumerate(others):
            carry += _place(_sum(v * _wide(other[rows, cols])), r * call.heads + head, call.rh)
        return carry

    return call.pieces(add, call.zeros(call.rh))


def _each(call: Call, means) -> list:
    """R refs [tile, M], from one that holds the stack or from as many."""
    return list(means) if isinstance(means, list | tuple) else [means.at[r] for r in range(call.R)]


def _merge(g, total, mean, rows, cols):
    o = _wide(mean[rows, cols])
    return o + g * (_wide(total[rows, cols]) - o)


def _pick(x, column) -> jax.Array:
    """One column [rows, 1], known or traced."""
    if isinstance(column, int):
        return x[:, _column(column)]
    return _sum(jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 1) == column, x, 0))


def _place(x, column, columns: int) -> jax.Array:
    """[rows, 1] as one of several columns, zeros elsewhere."""
    return jnp.where(lax.broadcasted_iota(jnp.int32, (x.shape[0], columns), 1) == column, x, 0)


def _zero_first(ref) -> None:
    """Before the first tile that is added up."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        ref[...] = jnp.zeros(ref.shape, ref.dtype)


def _sigmoid(x):
    return 1 / (1 + jnp.exp(-x))


def _column(i: int) -> slice:
    return slice(i, i + 1)


def _sum(x):
    return jnp.sum(x, axis=1, keepdims=True)


def _down(x):
    return jnp.sum(x, axis=0, keepdims=True)


def _wide(x):
    return x.astype(jnp.float32)
