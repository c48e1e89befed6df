"""What a call looks like to a backend: its static description, its arrays, and the bytes it has to move.

A backend has `supports(spec) -> reason | None` and four passes, which `passes.py` ties together. In their
shapes `...` are the axes of tokens, h is heads; `wide` is float32, or float64 where sources are.

    read_forward(ReadInputs, ReadOptions) -> (Read, norms)
    read_backward(ReadInputs, Read, norms, do, dlse, ReadOptions) -> ReadInputs of gradients
    join_forward(JoinInputs, JoinOptions) -> (Join, norms)
    join_backward(JoinInputs, Join, norms, dpartial, dx, JoinOptions) -> JoinInputs of gradients

`norms` is whatever small arrays the backend wants to see again in its backward pass.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from blockjax.kernels.platforms import Target


@dataclass(frozen=True)
class Spec:
    """All that `supports` may look at: sizes, dtype, options and device; no arrays.

    Attributes:
      op: `read` or `join`.
      n: sources of a read; 1 for a join, its running sum.
      R: queries of a read; 1 for a join.
      tokens: product of the axes before M, on this device.
      update: whether a join has an update to add.
    """

    target: Target
    dtype: jnp.dtype
    op: str
    n: int
    R: int
    tokens: int
    M: int
    heads: int
    update: bool = False


def floor_bytes(spec: Spec) -> tuple[int, int]:
    """Bytes that the forward and the backward pass cannot avoid to move: arrays of M a token, each once.

    A read has n sources in and R means out; backward sources and the R cotangents in, n gradients out. A join
    reads running sum, update and mean and writes the new running sum and x; without an update it reads two
    and writes one. Its backward reads running sum, mean and two cotangents and writes two gradients.
    """
    n, R = spec.n, spec.R
    forward, backward = (n + R, 2 * n + R) if spec.op == "read" else (5 if spec.update else 3, 6)
    tensor = spec.tokens * spec.M * jnp.dtype(spec.dtype).itemsize
    return forward * tensor, backward * tensor


class ReadOptions(NamedTuple):
    heads: int
    eps: float
    unstacked: bool


class ReadInputs(NamedTuple):
    """`sources`: n arrays [..., M] of one floating dtype; `queries` [R, M] wide, gains multiplied in."""

    sources: tuple[jax.Array, ...]
    queries: jax.Array


class Read(NamedTuple):
    """What R queries read of n sources.

    Attributes:
      o: [R, ..., M] in the sources' dtype, or a tuple of R arrays [..., M] if `unstacked`.
      lse: [R, ..., heads] float32 (float64 for float64 sources), natural log.
      logits: [n, R, ..., heads] likewise; weights are `exp(logits - lse)`. Without a gradient.
    """

    o: jax.Array | tuple[jax.Array, ...]
    lse: jax.Array
    logits: jax.Array


class JoinOptions(NamedTuple):
    """`first`: whether there may be no running sum, see `JoinInputs`."""

    heads: int
    eps: float
    norm_eps: float
    first: bool = True


class JoinInputs(NamedTuple):
    """What a join starts from; all [..., M] of one floating dtype unless noted.

    With `JoinOptions.first` there is no running sum yet where `lse` is +inf: `partial` and `update` are then
    not used, whatever is in them, and count as 0; their gradient is 0.

    Attributes:
      update: added to `partial`; None for nothing.
      lse: [..., heads] wide.
      query: [M] wide, gains multiplied in.
      norm_gain: [M] wide.
    """

    partial: jax.Array
    update: jax.Array | None
    o: jax.Array
    lse: jax.Array
    query: jax.Array
    norm_gain: jax.Array


class Join(NamedTuple):
    """What a join gives.

    Attributes:
      partial: [..., M], the new running sum, rounded to its dtype before anything is computed from it.
      x: [..., M], the normalised merge.
      logit: [..., heads] wide, of the running sum; -inf where there is none. Without a gradient.
    """

    partial: jax.Array
    x: jax.Array
    logit: jax.Array


def wide(dtype) -> jnp.dtype:
    """What is computed in: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def tokens(shape: tuple[int, ...]) -> int:
    """How many rows of M an array [..., M] has."""
    return math.prod(shape[:-1])
