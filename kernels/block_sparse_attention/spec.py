"""What a call looks like to a backend: its static description and its arrays."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from blockjax.kernels.platforms import Target

from blockjax.masks import BlockMask

RESIDUAL = "block_sparse_attention"
"""Name of q, k, v, `o` and `lse` for checkpoint policies: if kept, the backward recomputes none of them."""


@dataclass(frozen=True)
class Spec:
    """All that `supports` may look at: sizes, dtype, options and device; no arrays."""

    target: Target
    dtype: jnp.dtype
    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    Hv: int
    bq: int
    bk: int
    form: str  # "ranges" or "lists"
    lists: tuple[int, int]  # over (batch, heads), each 1 or the full number
    soft_cap: bool
    segments: bool
    positions: bool
    bias: bool


class Tiles(NamedTuple):
    """How a backend cuts the work of each of its kernels.

    Hopper: tokens a step, and steps in flight. TPU: most rows of the tile that stays, and of the one that
    streams past it.
    """

    forward: tuple[int, int]
    dq: tuple[int, int]
    dkv: tuple[int, int]


class Inputs(NamedTuple):
    """The arrays of one call after the checks: what every backend receives.

    `q` [B, T, N, H], `k` [B, S, K, H], `v` [B, S, K, Hv]; `slope` [N] float32; segment ids and positions
    [1 | B, T] and [1 | B, S] int32, both sides or neither.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    mask: BlockMask
    slope: jax.Array | None = None
    q_segment_ids: jax.Array | None = None
    kv_segment_ids: jax.Array | None = None
    q_positions: jax.Array | None = None
    kv_positions: jax.Array | None = None


class Options(NamedTuple):
    """What a pass needs besides its arrays; `tiles` is None for a backend that has nothing to choose."""

    scale: float
    soft_cap: float | None
    tiles: Tiles | None


class Cotangents(NamedTuple):
    """What a backward pass starts from.

    `do` [B, T, N, Hv] in q's dtype; float32 [B, N, T]: `lse`, natural log, -inf where a row saw nothing, and
    `delta = sum(do o) - dlse`. If `lse` and `delta` are those of a softmax over more keys than the pass has,
    its gradients are these keys' share, and shares add up.
    """

    do: jax.Array
    lse: jax.Array
    delta: jax.Array


class Gradients(NamedTuple):
    """Of q, k and v in their dtypes, and of `slope` [N] float32, None without one."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    slope: jax.Array | None
