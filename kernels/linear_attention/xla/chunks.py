"""Forward and backward of a span of chunks: all matrix products at once, then a short walk over the states.

For each chunk, with Gamma, L and D what `decays.py` calls enter, leave and pairs' weights, S the state that
enters, P = QK^T D:

    decay:  X = V                               what is written
    delta:  X = T (beta (V - Gamma K S)),       T = (I + A)^-1, A = beta KK^T D below the diagonal
    O = Gamma Q S + P X,                        S <- e^(G_C) S + (L K)^T X

Backward, R the gradient of the state that leaves: dX = P^T dO + L K R; delta: Y = T^T dX, dV = beta Y.
Derivation and the form without a gradient through T: Gated DeltaNet, arXiv:2412.06464, and Kimi Linear,
arXiv:2510.26692. The gradient of G is q dq + k dk_read - k dk_write: no product of its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from blockjax.kernels.linear_attention.xla.decays import Decays
from jax import lax


class Chunks(NamedTuple):
    """Of n consecutive chunks, wide.

    Attributes:
      q: [n, B, K, G, C, Hk], times scale.
      k: [n, B, K, 1, C, Hk], v: [n, B, K, 1, C, Hv].
      log_decay: [n, B, K, 1, C, 1 | Hk].
      beta: [n, B, K, 1, C, 1] for the delta rule, else None.
      documents: [n, B, 1, 1, C] or None; `before` [n, B, 1, 1, 1] that of the token before the chunk.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array
    beta: jax.Array | None
    documents: jax.Array | None
    before: jax.Array | None


class Step(NamedTuple):
    """A map of the state in the form a chunk has: `S <- across S + added + write^T (seen - read S)`.

    `added` is None for 0; `write`, `seen` and `read` are None together.
    """

    across: jax.Array
    added: jax.Array | None = None
    write: jax.Array | None = None
    seen: jax.Array | None = None
    read: jax.Array | None = None

    def __call__(self, S: jax.Array) -> jax.Array:
        out = self.across * S
        if self.added is not None:
            out += self.added
        if self.write is not None:
            out += _t(self.write) @ self.values(S)
        return out

    def values(self, S: jax.Array) -> jax.Array:
        """What is written."""
        return self.seen - self.read @ S


def walk(steps: Step, state: jax.Array, reverse: bool = False) -> tuple[jax.Array, jax.Array]:
    """The last state and the one before each step, for steps with a leading axis."""
    return lax.scan(lambda S, step: (step(S), S), state, steps, reverse=reverse)


Walk = Callable[[Step, jax.Array, bool], tuple[jax.Array, jax.Array]]
"""What does as `walk`: the only part of a span that is serial."""


def steps_of(x: Chunks) -> tuple[Decays, Step, jax.Array | None]:
    """Decays, the steps of the states, and the inverses T for the delta rule."""
    decays = Decays.of(x.log_decay, x.documents, x.before)
    leaving = decays.leave * x.k
    if x.beta is None:
        return decays, Step(decays.across, _t(leaving) @ x.v), None
    T = inverse(x.beta * jnp.tril(decays.scores(x.k, x.k), -1))
    read, seen = T @ (x.beta * decays.enter * x.k), T @ (x.beta * x.v)
    return decays, Step(decays.across, None, leaving, seen, read), T


def forward(x: Chunks, state: jax.Array, walk: Walk = walk) -> tuple[jax.Array, jax.Array]:
    """`o` [n, B, K, G, C, Hv] and the last state [B, K, 1, Hk, Hv]."""
    decays, steps, _ = steps_of(x)
    state, entries = walk(steps, state, False)
    written = x.v if x.beta is None else steps.values(entries)
    return (decays.enter * x.q) @ entries + decays.scores(x.q, x.k) @ written, state


def steps_back(x: Chunks, do, decays: Decays, T: jax.Array | None) -> tuple[Step, jax.Array]:
    """The steps of the states' gradients, from last to first, and P^T dO."""
    local = _over_queries(_t(decays.scores(x.q, x.k)) @ do)
    into = _over_queries(_t(decays.enter * x.q) @ do)
    if T is None:
        return Step(decays.across, into), local
    leaving, reading = decays.leave * x.k, x.beta * decays.enter * x.k
    return Step(decays.across, into, -reading, _t(T) @ local, -(_t(T) @ leaving)), local


def backward(x: Chunks, state, do, dstate, walk: Walk = walk) -> tuple[Chunks, jax.Array]:
    """Gradients of the chunks and of the state that enters, for those of `o` and of the last state."""
    decays, steps, T = steps_of(x)
    _, S = walk(steps, state, False)
    back, local = steps_back(x, do, decays, T)
    dstate, R = walk(back, dstate, True)
    written = x.v if T is None else steps.values(S)

    dp = do @ _t(written)
    dq = decays.enter * (do @ _t(S)) + decays.rows(dp, x.k)
    leaving = decays.leave * (written @ _t(R))
    dk_write = leaving + _over_queries(decays.columns(dp, x.q))
    if T is None:
        dk_read, dv, dbeta = 0, local + (decays.leave * x.k) @ R, None
    else:
        Y = back.values(R)
        da = -jnp.tril(Y @ _t(written), -1)
        dk_read = -x.beta * decays.enter * (Y @ _t(S)) + x.beta * decays.rows(da, x.k)
        dk_write += decays.columns(x.beta * da, x.k)
        dv = x.beta * Y
        unread = x.v - (decays.enter * x.k) @ S
        dbeta = jnp.sum(Y * unread, -1, keepdims=True)
        dbeta += jnp.sum(da * decays.scores(x.k, x.k), -1, keepdims=True)

    dG = _over_queries(x.q * dq) + x.k * (dk_read - dk_write)
    last = jnp.sum(x.k * leaving, -2, keepdims=True) + _t(jnp.sum(decays.across * S * R, -1, keepdims=True))
    dG = dG.at[..., -1:, :].add(last)
    if x.log_decay.shape[-1] == 1:
        dG = jnp.sum(dG, -1, keepdims=True)
    dlog = jnp.flip(jnp.cumsum(jnp.flip(dG, -2), -2), -2)
    return Chunks(dq, dk_read + dk_write, dv, dlog, dbeta, None, None), dstate


def inverse(A: jax.Array) -> jax.Array:
    """`(I + A)^-1` of A [..., C, C], 0 on and above the diagonal, C a power of two.

    Doubling: the inverse of blocks of 2b from that of blocks of b. No powers of A, which may overflow.
    """
    C = A.shape[-1]
    i, j = jnp.arange(C)[:, None], jnp.arange(C)
    X, b = jnp.broadcast_to(jnp.eye(C, dtype=A.dtype), A.shape), 1
    while b < C:
        below = (i // (2 * b) == j // (2 * b)) & (i // b % 2 == 1) & (j // b % 2 == 0)
        X -= X @ jnp.where(below, A, 0) @ X
        b *= 2
    return X


def _t(x: jax.Array) -> jax.Array:
    return x.swapaxes(-1, -2)


def _over_queries(x: jax.Array) -> jax.Array:
    """The sum over the G queries of a state, [n, B, K, G, ...] to [n, B, K, 1, ...]."""
    return jnp.sum(x, axis=3, keepdims=True)
