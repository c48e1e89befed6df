"""Which runs of layers do alike: phases of depth, and the loss of a tied surrogate of a trained stack.

The block-recurrent hypothesis (Raptor) is that the layers of a trained network fall into few contiguous
phases, each of which one block of tied weights can stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from blockjax.errors import UsageError


def dissimilarity(outputs: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """How far layers are apart: mean over tokens of 1 - cos(output of layer i, output of layer j).

    Args:
      outputs: [L, ..., M] of the layers, any floating dtype.
      mask: [...] bool, the tokens that count; default all.

    Returns:
      [L, L] float32, symmetric, 0 on the diagonal up to rounding.
    """
    x = outputs.astype(jnp.float32)
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    x = x.reshape(len(x), -1, x.shape[-1])
    weights = jnp.ones(x.shape[1]) if mask is None else mask.reshape(-1).astype(jnp.float32)
    cosines = jnp.einsum("ITM,JTM,T->IJ", x, x, weights, precision="highest")
    return 1 - cosines / jnp.sum(weights)


def phases(weights: np.ndarray, count: int) -> list[int]:
    """Contiguous phases of layers with the least sum of weights between layers of one phase.

    Since all weights add to the same, the weight between phases is largest: a weighted max-cut with
    contiguous parts, by dynamic programming over the last boundary, O(count L^2).

    Args:
      weights: [L, L] symmetric, such as `dissimilarity`.
      count: number of phases.

    Returns:
      The first layer of each phase, in order; the first is 0.

    Raises:
      UsageError: there are fewer layers than phases.
    """
    w = np.asarray(weights, np.float64)
    L = len(w)
    if w.shape != (L, L) or not 1 <= count <= L:
        raise UsageError(f"{count} phases need at least as many layers; weights are {w.shape}.")
    # Of the square of rows and columns below i: within[i, j] is half of what lies in i .. j - 1.
    total = np.zeros((L + 1, L + 1))
    total[1:, 1:] = (w - np.diag(np.diag(w))).cumsum(0).cumsum(1)
    d = np.diag(total)
    within = (d[None, :] - total - total.T + d[:, None]) / 2
    best = np.full((count + 1, L + 1), np.inf)
    best[0, 0], last = 0.0, np.zeros((count + 1, L + 1), int)
    for p in range(1, count + 1):
        for j in range(p, L + 1):
            costs = best[p - 1, p - 1 : j] + within[p - 1 : j, j]
            last[p, j] = p - 1 + int(np.argmin(costs))
            best[p, j] = costs.min()
    starts, j = [], L
    for p in range(count, 0, -1):
        j = int(last[p, j])
        starts.append(j)
    return starts[::-1]


def cost(weights: np.ndarray, starts: Sequence[int]) -> float:
    """The sum of weights between layers of one phase; `starts` as `phases` returns them."""
    w = np.asarray(weights, np.float64)
    ends = [*starts[1:], len(w)]
    return float(sum(np.triu(w[a:b, a:b], 1).sum() for a, b in zip(starts, ends, strict=True)))


def surrogate_loss(
    block: Callable[[jax.Array, jax.Array], jax.Array],
    teacher: jax.Array,
    forced: jax.Array | float,
    first: int = 0,
) -> jax.Array:
    """How far a tied block is from the layers of a teacher: forced * L_TF + (1 - forced) * L_AR.

    L_TF takes each step from the teacher's activation before it, L_AR from the block's own output; both are
    means over steps of the mean square error.

    Args:
      block: `(x, layer) -> x`, the block applied once, told the number of the layer that it stands for.
      teacher: [n + 1, ...], activations before and after n layers.
      forced: weight of L_TF, from `forcing`; may be traced.
      first: number of the first of these layers.

    Returns:
      float32 scalar. The target gives no gradient.
    """
    teacher = jax.lax.stop_gradient(teacher)
    layers = first + jnp.arange(len(teacher) - 1)
    error = lambda a, b: jnp.mean(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)))  # noqa: E731

    def step(x, inputs):
        before, after, layer = inputs
        own = block(x, layer)
        return own, (error(block(before, layer), after), error(own, after))

    _, (tf, ar) = jax.lax.scan(step, teacher[0], (teacher[:-1], teacher[1:], layers))
    return forced * jnp.mean(tf) + (1 - forced) * jnp.mean(ar)


def forcing(step: jax.Array | int, steps: int, share: float = 0.25) -> jax.Array:
    """The weight of teacher forcing: from 1 linearly to 0 over the first `share` of all steps."""
    return jnp.clip(1 - step / (share * steps), 0.0, 1.0)
