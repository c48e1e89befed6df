"""The four TPU kernels. Each sees a tile of tokens, whole rows of M, of every array.

All is elementwise, over groups of rows and pieces of M that stay in registers: queries are few, and a matrix
unit takes as long for one as for a hundred. Numbers per token lie in columns of one array, `Columns`.
Formulas: with the passes of `xla.py`.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from blockjax.kernels.depth_mix.tpu import LANES, PIECE, SUBLANES
from jax import lax
from jax.experimental import pallas as pl


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

    def along(self, head, products) -> jax.Array:
        """Sums over a piece in a head of R products [rows, columns]: [rows, R * h]."""
        columns = lax.broadcasted_iota(jnp.int32, (self.group, self.rh), 1)
        return sum(jnp.where(columns == r * self.heads + head, _sum(x), 0) for r, x in enumerate(products))

    def first(self) -> jax.Array:
        """The token of the tile's first row."""
        return (pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)) * self.tile

    def exists(self, first, rows) -> jax.Array:
        """[rows, 1], whether the tokens are there: what lies beyond the last one is not to be added up."""
        return first + rows.start + lax.broadcasted_iota(jnp.int32, (rows.size, 1), 0) < self.tokens

    def add_down(self, ref, r: int, cols, x, there) -> None:
        """Adds up [rows, columns] into eight rows, those of query r."""
        x = jnp.where(there, x, 0) if self.ragged else x
        ref[SUBLANES * r : SUBLANES * (r + 1), cols] += x.reshape(-1, SUBLANES, x.shape[1]).sum(0)


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


def read_forward(call: Call, streamed, shared, out, sums):
    """Sources [tile, M] and queries `w` [R, M] to R means [tile, M] and their numbers [tile, columns]."""
    (sources, w), (means, stats) = (streamed, shared), out
    means, at = _each(call, means), Columns(call)

    def group(rows):
        def add(head, cols, carry):
            squares, products = [], []
            for source, square, product in zip(sources, *carry, strict=True):
                v = _wide(source[rows, cols])
                squares.append(square + _sum(v * v))
                products.append(product + call.along(head, [v * w[_column(r), cols] for r in range(call.R)]))
            return squares, products

        zeros = [call.zeros()] * call.n, [call.zeros(call.rh)] * call.n
        squares, products = call.pieces(add, zeros)
        norms = [lax.rsqrt(square / call.M + call.eps) for square in squares]
        logits = [norm * product for norm, product in zip(norms, products, strict=True)]
        top = functools.reduce(jnp.maximum, logits)
        lse = top + jnp.log(sum(jnp.exp(logit - top) for logit in logits))
        weights = [jnp.exp(logit - lse) for logit in logits]
        stats[rows, at.lse] = lse
        for i in range(call.n):
            stats[rows, at.logits(i)] = logits[i]
            stats[rows, at.norm(i)] = norms[i]

        def mix(head, cols, carry):
            values = [_wide(source[rows, cols]) for source in sources]
            for r, mean in enumerate(means):
                parts = (_pick(p, r * call.heads + head) * v for p, v in zip(weights, values, strict=True))
                mean[rows, cols] = sum(parts).astype(mean.dtype)

        call.pieces(mix)

    call.groups(group)


def read_backward(call: Call, streamed, shared, out, sums):
    """Sources, cotangents of means and of lse [tile, R * h], numbers, `w` to gradients of sources and `w`.

    That of `w` has eight rows a query, added up over tiles.
    """
    (sources, dmeans, dlse, stats), w, dsources, dw = streamed, shared, out, sums
    dmeans, at = _each(call, dmeans), Columns(call)
    _zero_first(dw)
    first = call.first()

    def group(rows):
        def add(head, cols, carry):
            cotangents = [_wide(dmean[rows, cols]) for dmean in dmeans]
            found = []
            for source, c in zip(sources, carry, strict=True):
                v = _wide(source[rows, cols])
                found.append(c + call.along(head, [v * d for d in cotangents]))
            return found

        c = call.pieces(add, [call.zeros(call.rh)] * call.n)
        logits, norms = ([stats[rows, f(i)] for i in range(call.n)] for f in (at.logits, at.norm))
        p = [jnp.exp(logit - stats[rows, at.lse]) for logit in logits]
        mean = sum(x * y for x, y in zip(p, c, strict=True)) - dlse[rows, :]
        ds = [x * (y - mean) for x, y in zip(p, c, strict=True)]
        scaled = [norm * x for norm, x in zip(norms, ds, strict=True)]
        back = [norm * norm / call.M * _sum(x * s) for norm, x, s in zip(norms, ds, logits, strict=True)]
        there = call.exists(first, rows)

        def gradient(head, cols, carry):
            cotangents = [_wide(dmean[rows, cols]) for dmean in dmeans]
            for i in range(call.n):
                v = _wide(sources[i][rows, cols])
                dv = -back[i] * v
                for r, d in enumerate(cotangents):
                    a = _pick(scaled[i], r * call.heads + head)
                    dv += _pick(p[i], r * call.heads + head) * d + a * w[_column(r), cols]
                    call.add_down(dw, r, cols, a * v, there)
                dsources[i][rows, cols] = dv.astype(dsources[i].dtype)

        call.pieces(gradient)

    call.groups(group)


def join_forward(call: Call, streamed, shared, out, sums):
    """Running sum, update or None, mean [tile, M], lse [tile, h] to running sum, x and numbers.

    The running sum that goes out is None if it is the one that came in.
    Numbers [tile, h + 2] are logits, norm and rms; `shared` are query and gain [1, M].
    """
    (partial, update, mean, lse), (query, gain), (total, x, stats) = streamed, shared, out
    running = partial if total is None else total

    def group(rows):
        absent = lse[rows, 0:1] == jnp.inf

        def add(head, cols, carry):
            square, products = carry
            if total is not None:
                s = _wide(partial[rows, cols])
                s = s if update is None else s + _wide(update[rows, cols])
                total[rows, cols] = jnp.where(absent, 0, s).astype(total.dtype)
            s = _wide(running[rows, cols])
            return square + _sum(s * s), products + call.along(head, [s * query[:, cols]])

        square, products = call.pieces(add, (call.zeros(), call.zeros(call.heads)))
        norm = lax.rsqrt(square / call.M + call.eps)
        logit = norm * products
        g = _sigmoid(logit - lse[rows, :])

        def merged(head, cols):
            return _merge(_pick(g, head), running, mean, rows, cols)

        square = call.pieces(lambda head, cols, carry: carry + _sum(merged(head, cols) ** 2), call.zeros())
        rms = lax.rsqrt(square / call.M + call.norm_eps)

        def normalise(head, cols, carry):
            x[rows, cols] = (rms * merged(head, cols) * gain[:, cols]).astype(x.dtype)

        call.pieces(normalise)
        stats[rows, 0 : call.heads] = jnp.where(absent, -jnp.inf, logit)
        stats[rows, _column(call.heads)] = norm
        stats[rows, _column(call.heads + 1)] = rms

    call.groups(group)


def join_backward(call: Call, streamed, shared, out, sums):
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
            return carry + call.along(head, [dh * (s - _wide(mean[rows, cols]))])

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
            call.add_down(dquery, 0, cols, b * s, there)
            call.add_down(dgain, 0, cols, _wide(dx[rows, cols]) * h, there)

        call.pieces(gradient)

    call.groups(group)


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


def _wide(x):
    return x.astype(jnp.float32)
