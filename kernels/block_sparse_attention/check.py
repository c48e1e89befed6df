"""Each backend against the oracle, at every head dim and in every family of tiles: `kernels/checking.py`."""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from blockjax.kernels.block_sparse_attention.api import DistanceBias, block_sparse_attention
from blockjax.kernels.checking import Result
from blockjax.kernels.checking import measure as measure_call

from blockjax.masks import BlockMask, Causal

B, N, K = 2, 4, 2
NAMES = "o", "lse", "dq", "dk", "dv", "dslope"
LABELS = "head dims", "blocks"
"""Of a case, see `Case.labels`."""


class Family(NamedTuple):
    """Tiles of one kind, ragged at the end, with an option that rides along.

    `heads` is how many have lists of their own, None for ranges without lists.
    """

    bq: int
    bk: int
    heads: int | None
    option: str = ""  # or "bias", "segments", "soft_cap"

    def __str__(self):
        form = {None: "window", 1: "lists", K: "lists a key head", N: "lists a head"}[self.heads]
        return ", ".join(filter(None, (f"{self.bq} x {self.bk}", form, self.option)))

    def mask(self) -> BlockMask:
        T, S = (max(n, 5 * block // 2) + 1 for n, block in ((250, self.bq), (390, self.bk)))
        sizes = dict(bq=self.bq, bk=self.bk, q_offset=max(0, S - T))
        if self.heads is None:
            return BlockMask.window(T, S, left=150, **sizes)
        listed = np.random.default_rng(0).random((self.heads, -(-T // self.bq), -(-S // self.bk))) < 0.5
        return BlockMask.from_block_bool(listed, T, S, **sizes, predicate=Causal())


FAMILIES = (
    Family(128, 128, None, "bias"),
    Family(128, 128, N),
    Family(16, 16, 1, "segments"),
    Family(32, 128, K, "bias"),
    Family(64, 32, N, "soft_cap"),
    Family(256, 64, 1),
    Family(512, 256, K, "segments"),
)


class Backend(NamedTuple):
    """What it is held to, in which dtype, and at which head dims `(H, Hv)`: the first for a quick check."""

    peer: str
    dtype: str
    head_dims: tuple[tuple[int, int], ...]


CHECKED = {
    "hopper": Backend("xla", "bfloat16", ((128, 128), (64, 64), (192, 128), (256, 256))),
    "tpu": Backend("xla", "bfloat16", ((128, 128), (64, 64), (256, 256), (80, 40))),
    "xla": Backend("reference", "float32", ((64, 64), (24, 40))),
}


class Case(NamedTuple):
    implementation: str
    H: int
    Hv: int
    family: Family

    @property
    def labels(self) -> tuple[str, ...]:
        return f"{self.H}" if self.Hv == self.H else f"{self.H}, {self.Hv}", str(self.family)


def cases(implementation: str, quick: bool = False) -> list[Case]:
    head_dims = CHECKED[implementation].head_dims[: 1 if quick else None]
    return [Case(implementation, *dims, family) for dims, family in itertools.product(head_dims, FAMILIES)]


def measure(case: Case) -> Result:
    peer = CHECKED[case.implementation].peer
    return measure_call(functools.partial(call, case), case.implementation, peer, make(case), NAMES)


def make(case: Case):
    """Random `(q, k, v, slope)`, `slope` being None without a bias, and the cotangents of `o` and `lse`."""
    mask, rng = case.family.mask(), np.random.default_rng(0)
    shapes = (mask.T, N, case.H), (mask.S, K, case.H), (mask.S, K, case.Hv), (mask.T, N, case.Hv)
    dtype = CHECKED[case.implementation].dtype
    q, k, v, do = (jnp.asarray(rng.normal(size=(B, *shape)), dtype) for shape in shapes)
    dlse = jnp.asarray(rng.normal(size=(B, N, mask.T)), "float32")
    slope = jnp.geomspace(0.5, 0.005, N) if case.family.option == "bias" else None
    return (q, k, v, slope), (do, dlse)


def call(case: Case, implementation: str) -> Callable:
    """A function of what `make` returns: the outputs and gradients of `NAMES`, `dslope` only with a bias."""
    mask, options = case.family.mask(), {}
    if case.family.option == "soft_cap":
        options["soft_cap"] = 3.0
    if case.family.option == "segments":
        # Documents of 100 tokens, after some that belong to none.
        for side, first, n in (("q", mask.q_offset, mask.T), ("kv", 0, mask.S)):
            options[f"{side}_segment_ids"] = (first + jnp.arange(n)) // 100 - 1

    def both(inputs, cotangents):
        def attend(q, k, v, slope):
            bias = None if slope is None else DistanceBias(slope)
            return block_sparse_attention(
                q, k, v, mask, bias=bias, **options, return_lse=True, implementation=implementation
            )

        out, pullback = jax.vjp(attend, *inputs)
        return *out, *(gradient for gradient in pullback(cotangents) if gradient is not None)

    return both
