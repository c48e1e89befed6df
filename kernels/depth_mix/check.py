"""Each backend against the oracle, read and join, at several sizes: `kernels/checking.py`."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from blockjax.kernels.checking import Result
from blockjax.kernels.checking import measure as measure_call
from blockjax.kernels.depth_mix.api import depth_join, depth_read

TOKENS = 3, 111
NAMES = "o", "lse", "dv", "dw", "s", "x", "ds", "do", "dlse", "dq", "dg"
"""Of a read, then of a join: running sum, x and the gradients of running sum, mean, lse, query, gain."""
LABELS = "n, R", "M, heads"
"""Of a case, see `Case.labels`."""


class Size(NamedTuple):
    n: int
    R: int
    M: int
    heads: int


SIZES = (
    Size(9, 8, 2048, 1),
    Size(2, 1, 1000, 8),
    Size(1, 2, 1280, 1),
    Size(16, 1, 4096, 4),
    Size(5, 3, 7168, 16),
    Size(29, 2, 1024, 1),
    Size(3, 2, 7186, 2),
)


class Backend(NamedTuple):
    """What it is held to, and in which dtype."""

    peer: str
    dtype: str


CHECKED = {
    "triton": Backend("xla", "bfloat16"),
    "tpu": Backend("xla", "bfloat16"),
    "xla": Backend("reference", "float32"),
}


class Case(NamedTuple):
    implementation: str
    size: Size

    @property
    def labels(self) -> tuple[str, ...]:
        n, R, M, heads = self.size
        return f"{n}, {R}", f"{M}, {heads}"


def cases(implementation: str, quick: bool = False) -> list[Case]:
    return [Case(implementation, size) for size in SIZES[: 2 if quick else None]]


def measure(case: Case) -> Result:
    peer = CHECKED[case.implementation].peer
    return measure_call(functools.partial(call, case), case.implementation, peer, make(case), NAMES)


def make(case: Case):
    """Random arguments of a read and of a join, and cotangents of what they return but logits."""
    (n, R, M, heads), rng = case.size, np.random.default_rng(0)

    def draw(*shape, dtype="float32"):
        return jnp.asarray(rng.normal(size=shape), dtype)

    dtype = CHECKED[case.implementation].dtype
    sources = tuple(draw(*TOKENS, M, dtype=dtype) for _ in range(n))
    partial, update, o, dpartial, dx = (draw(*TOKENS, M, dtype=dtype) for _ in range(5))
    read = sources, 0.1 * draw(R, M)
    join = partial, update, o, draw(*TOKENS, heads), 0.1 * draw(M), 1 + 0.1 * draw(M)
    return read, (draw(R, *TOKENS, M, dtype=dtype), draw(R, *TOKENS, heads)), join, (dpartial, dx)


def call(case: Case, implementation: str) -> Callable:
    """A function of what `make` returns: the outputs and gradients of `NAMES`."""
    options = dict(heads=case.size.heads, implementation=implementation)

    def read(sources, queries):
        return depth_read(sources, queries, **options)[:2]

    def join(partial, update, o, lse, query, gain):
        return depth_join(partial, update, o, lse, query, norm_gain=gain, **options)[:2]

    def both(reads, dreads, joins, djoins):
        (o, lse), pullback = jax.vjp(read, *reads)
        dsources, dqueries = pullback(dreads)
        out, pullback = jax.vjp(join, *joins)
        dpartial, _, *gradients = pullback(djoins)
        return o, lse, jnp.stack(dsources), dqueries, *out, dpartial, *gradients

    return both
