"""Softmax partials `(o, lse)`: the commutative monoid behind every attention in this library.

A partial is attention over *some* of the keys: `o` is the softmax-weighted mean of their values and
`lse` the natural log of the sum of their exponentials. Two partials over disjoint keys merge into the
partial over both, in any order; the identity has seen nothing.

Folded over key blocks it is a kernel, over devices it is sequence parallelism, over stored parts it
is a KV cache or block diffusion, over depth blocks it is Block AttnRes. An attention sink is the
partial `(0, sink)`.

Shapes: `o` is `[..., H]`, `lse` is `[...]`; both float32 (float64 stays float64).
Source: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867; the merge as in
FlashAttention-2, arXiv:2307.08691, section 3.1.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp

Partial = tuple[jax.Array, jax.Array]


def empty(shape: tuple[int, ...], dtype=jnp.float32) -> Partial:
    """The identity for an `o` of this shape: o = 0, lse = -inf."""
    return jnp.zeros(shape, dtype), jnp.full(shape[:-1], -jnp.inf, dtype)


def merge(a: Partial, b: Partial) -> Partial:
    """The partial over the keys of both; broadcasts. Two empty ones give (0, -inf), with zero gradient."""
    (o_a, lse_a), (o_b, lse_b) = map(wide, a), map(wide, b)
    w_a, w_b, lse = shares(lse_a, lse_b)
    return w_a[..., None] * o_a + w_b[..., None] * o_b, lse


def shares(lse_a: jax.Array, lse_b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weights of two partials in their merge, and its `lse`: kernels merge by them, in their layouts."""
    top = jnp.maximum(lse_a, lse_b)
    seen = top > -jnp.inf
    # -inf must be gone before exp and log: a `where` on their results alone leaves NaN in the gradient.
    top = jax.lax.stop_gradient(jnp.where(seen, top, 0.0))
    w_a, w_b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    total = jnp.where(seen, w_a + w_b, 1.0)
    return w_a / total, w_b / total, jnp.where(seen, top + jnp.log(total), -jnp.inf)


def fold(parts: Iterable[Partial]) -> Partial:
    """Merges one or more partials, left to right."""
    return functools.reduce(merge, parts)


def wide(x: jax.Array) -> jax.Array:
    """x in float32, in which parts are summed; float64 stays float64."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))
