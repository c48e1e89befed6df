"""What a call looks like to a backend: its static description and its arrays."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from blockjax.kernels.platforms import Target
from jax.ad_checkpoint import checkpoint_name

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


def residuals(inputs: Inputs, o: jax.Array, lse: jax.Array) -> tuple[Inputs, jax.Array, jax.Array]:
    """What a backend's forward keeps for its backward, named `RESIDUAL`."""
    q, k, v, o, lse = (checkpoint_name(x, RESIDUAL) for x in (*inputs[:3], o, lse))
    return inputs._replace(q=q, k=k, v=v), o, lse
