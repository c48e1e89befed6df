"""How far each backend is from the oracle, at every head dim and in every family of tiles.

The criterion, for each output and gradient: the error against the oracle in float32, by norm, is at most
twice that of a peer which computes in the same dtype, plus 1e-5. Kernels are held to plain XLA, and XLA to
the oracle itself.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from blockjax.kernels.block_sparse_attention.api import DistanceBias, block_sparse_attention
from blockjax.kernels.platforms import target

from blockjax.masks import BlockMask, Causal

B, N, K = 2, 4, 2
NAMES = "o", "lse", "dq", "dk", "dv", "dslope"


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


@dataclass(frozen=True)
class Result:
    """Each error as a part of what is allowed; whether a second run was equal bit for bit."""

    parts: dict[str, float]
    repeats: bool

    @property
    def wrong(self) -> list[str]:
        return [name for name, part in self.parts.items() if not part <= 1]

    @property
    def passed(self) -> bool:
        return self.repeats and not self.wrong


def cases(implementation: str, quick: bool = False) -> list[Case]:
    head_dims = CHECKED[implementation].head_dims[: 1 if quick else None]
    return [Case(implementation, *dims, family) for dims, family in itertools.product(head_dims, FAMILIES)]


def measure(case: Case) -> Result:
    """Runs the case, twice, its peer and the oracle."""
    arrays = make(case)
    attend = _compile(call(case, case.implementation), arrays)
    first, second = (jax.device_get(attend(*arrays)) for _ in range(2))
    repeats = all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))

    peer = _compile(call(case, CHECKED[case.implementation].peer), arrays)(*arrays)
    arrays = widen(arrays)
    exact = _compile(call(case, "reference"), arrays)(*arrays)
    parts = map(part_of_allowed, first, peer, exact)
    return Result(dict(zip(NAMES, parts, strict=False)), repeats)


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


def widen(tree):
    """With bfloat16 and float16 as float32."""
    narrow = jnp.bfloat16, jnp.float16
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.result_type(x) in narrow else x, tree)


def part_of_allowed(ours, peer, exact) -> float:
    """The error of `ours` as a part of twice its peer's plus 1e-5: at most 1 if it is close enough."""
    return relative_error(ours, exact) / (2 * relative_error(peer, exact) + 1e-5)


def relative_error(x, exact) -> float:
    """`||x - exact|| / ||exact||` over what is finite; infinite if they differ in anything else."""
    x, exact = (np.asarray(a, "float64") for a in (x, exact))
    finite = np.isfinite(exact)
    if not np.array_equal(x[~finite], exact[~finite]) or not np.isfinite(x[finite]).all():
        return np.inf
    x, exact = x[finite], exact[finite]
    return float(np.linalg.norm(x - exact) / (np.linalg.norm(exact) or 1))


def _compile(function: Callable, arrays) -> Callable:
    (q, *_), _ = arrays
    # Products of float32 would be rounded to less on GPUs and TPUs, and tuning them takes minutes.
    precision = "highest" if q.dtype == jnp.float32 else None
    flags = {"xla_gpu_autotune_level": 0} if target().platform == "gpu" else None
    with jax.default_matmul_precision(precision):
        return jax.jit(function).lower(*arrays).compile(flags)
