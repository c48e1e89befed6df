"""What a call looks like to a backend: its static description and its arrays.

A backend has `supports(spec) -> reason | None` and two passes, which `passes.py` ties together; `wide` is
float32, or float64 where q is.

    forward_pass(Inputs, Options) -> (o [B, T, N, Hv] in q's dtype, state [B, K, Hk, Hv] wide), residuals
    backward_pass(Inputs, residuals, do, dstate, Options) -> Inputs of gradients

`residuals` is whatever the backend wants to see again in its backward pass; `do` and `dstate` are like the
outputs. Gradients are like the inputs, None for what was None and for `documents`.

For each state, with S = initial_state (0 if None), token by token, where d = exp(log_decay):

    S <- 0 if the token starts a document
    S <- d S                                    d for each row of S, [Hk]
    S <- S + k v^T                              kind "decay"
    S <- S + beta k (v - S^T k)^T               kind "delta"
    o_n = scale S^T q_n                         for each of the G = N / K queries n of the state
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from blockjax.kernels.platforms import Target

KINDS = "decay", "delta"
DECAYS = "none", "head", "token", "channel"
"""Forms of `log_decay`: None, [K], [B, T, K], [B, T, K, Hk]."""


@dataclass(frozen=True)
class Spec:
    """All that `supports` may look at: sizes, dtype, options and device; no arrays.

    Attributes:
      decay: one of `DECAYS`.
      documents: whether there may be more than one in a row.
      chunk: tokens a chunk that were asked for, None for the backend's own number.
    """

    target: Target
    dtype: jnp.dtype
    kind: str
    decay: str
    B: int
    T: int
    N: int
    K: int
    Hk: int
    Hv: int
    documents: bool = False
    chunk: int | None = None


class Inputs(NamedTuple):
    """The arrays of one call after the checks: what every backend receives.

    Attributes:
      q: [B, T, N, Hk]; query n reads the state of head n // (N / K).
      k: [B, T, K, Hk], v: [B, T, K, Hv], in q's dtype.
      log_decay: wide, None or one of the forms in `DECAYS`, not below `floor(dtype)`.
      beta: [B, T, K] wide for the delta rule, else None.
      documents: [B, T] int32, not falling along T; 0 continues the initial state, each start adds 1. None if
        all tokens continue it.
      state: [B, K, Hk, Hv] wide, before the first token; None for zeros.

    Padding has been made to write and read nothing: q, k, v, log_decay and beta are 0 there.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array | None = None
    beta: jax.Array | None = None
    documents: jax.Array | None = None
    state: jax.Array | None = None


class Options(NamedTuple):
    """What a pass needs besides its arrays.

    Attributes:
      chunk: tokens that are worked on at once, None for the backend's own number.
      shared_decay: whether all tokens have the same log-decays, also where `Inputs.log_decay` names them
        token by token: their gradients will be summed, where what rounding leaves of each does not cancel.
    """

    kind: str
    scale: float
    chunk: int | None = None
    shared_decay: bool = False


def form(log_decay: jax.Array | None) -> str:
    """Which of `DECAYS` it is."""
    return "none" if log_decay is None else {1: "head", 3: "token", 4: "channel"}[jnp.ndim(log_decay)]


def floor(dtype) -> float:
    """The least log-decay: its exponential is 0 in this dtype, and sums of it over a chunk stay exact."""
    return -1024.0 if dtype == jnp.float64 else -128.0


def log_decays(inputs: "Inputs") -> jax.Array:
    """Those of every token, [B, T, K, 1 | Hk]; zeros for none."""
    x = inputs.log_decay
    x = jnp.zeros((), wide(inputs.q.dtype)) if x is None else x
    return x if x.ndim == 4 else jnp.broadcast_to(x, inputs.k.shape[:3])[..., None]


def running_sums(log_decay: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The running sum along the tokens of a chunk in two parts, whose differences are as exact as the terms.

    After a large decay a float32 sum has too few digits left for the small ones that follow. The first part
    sums multiples of 2^-8, exactly: log-decays are at least `floor`, and chunks have at most 512 tokens.
    """
    coarse = jnp.round(log_decay * 256) / 256
    return jnp.cumsum(coarse, axis=axis), jnp.cumsum(log_decay - coarse, axis=axis)


def wide(dtype) -> jnp.dtype:
    """float32, in which states and decays are kept; float64 stays float64."""
    return jnp.promote_types(dtype, jnp.float32)
