"""Affine maps of a state, `S -> M S + N`: the monoid behind every linear recurrence in this library.

A run of tokens maps the state before it to the state after it. Two runs in sequence compose into the map of
both; composition is associative but, unlike the merge of `blockjax.partials`, not commutative, and the
identity is M = 1, N = 0.

Folded over tokens it is the recurrence, over chunks a kernel, over devices sequence parallelism. Gradients of
states go through the transposed maps, in the opposite order: `dS -> M^T dS + N'`.

Shapes: N is `[..., Hk, Hv]`; M is `[..., Hk, Hk]`, or `[..., 1 | Hk, 1]` if it is diagonal, as where states
only decay. Float32: products of many maps lose what bfloat16 keeps of one.
Source: prefix scans of linear recurrences, Blelloch 1990; Martin and Cundy 2018, arXiv:1709.04057.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Affine(NamedTuple):
    """`S -> M S + N`."""

    M: jax.Array
    N: jax.Array

    @property
    def diagonal(self) -> bool:
        return self.M.shape[-1] == 1

    def __call__(self, S: jax.Array) -> jax.Array:
        return _times(self.M, S) + self.N

    def after(self, earlier: "Affine") -> "Affine":
        """The map of both: first the earlier one, then this one."""
        return Affine(_times(self.M, earlier.M), self(earlier.N))

    def identity(self) -> "Affine":
        """The identity in the shapes of this map."""
        if self.diagonal:
            return Affine(jnp.ones_like(self.M), jnp.zeros_like(self.N))
        eye = jnp.eye(self.M.shape[-1], dtype=self.M.dtype)
        return Affine(jnp.broadcast_to(eye, self.M.shape), jnp.zeros_like(self.N))

    def back(self, N: jax.Array) -> "Affine":
        """The map of the states' gradients, where N is what the run itself adds to them."""
        return Affine(self.M if self.diagonal else self.M.swapaxes(-1, -2), N)


def _times(M: jax.Array, x: jax.Array) -> jax.Array:
    if M.shape[-1] == 1:
        return M * x
    return jnp.matmul(M, x, precision="highest")
