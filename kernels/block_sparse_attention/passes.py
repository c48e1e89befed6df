"""The op from the two passes of a backend, `forward_pass` and `backward_pass`, tied together for gradients.

Formulas of the backward: FlashAttention-2, arXiv:2307.08691; dlse enters as delta = sum(do o) - dlse.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from blockjax.kernels.block_sparse_attention.spec import RESIDUAL, Cotangents, Inputs, Options
from blockjax.kernels.platforms import vary, varying_axes
from jax.ad_checkpoint import checkpoint_name

from blockjax.masks.predicates import is_concrete


def attend(backend, inputs: Inputs, options: Options) -> tuple[jax.Array, jax.Array]:
    """`o` [B, T, N, Hv] in q's dtype and `lse` [B, N, T] float32, differentiable in q, k, v and slope."""
    leaves, tree = jax.tree.flatten(inputs.mask)
    known = tuple(x if is_concrete(x) else None for x in leaves)
    inputs = inputs._replace(mask=tuple(x for x in leaves if not is_concrete(x)))
    axes = varying_axes(inputs)
    inputs = jax.tree.map(lambda x: vary(jnp.asarray(x), axes), inputs)
    return _attend(_Static(backend, options, tree, known), inputs)


def delta(do: jax.Array, o: jax.Array, dlse: jax.Array) -> jax.Array:
    """`sum(do o) - dlse`, float32 (float64 stays float64) [B, N, T]."""
    wide = jnp.promote_types(o.dtype, jnp.float32)
    return jnp.sum(do.astype(wide) * o.astype(wide), -1).swapaxes(1, 2) - dlse


@dataclass(frozen=True, eq=False)
class _Static:
    """What a call knows while it is traced, with the known leaves of its mask: their walks are constants."""

    backend: Any
    options: Options
    tree: Any
    known: tuple

    def whole(self, inputs: Inputs) -> Inputs:
        """With the mask put together again."""
        traced = iter(inputs.mask)
        leaves = [next(traced) if x is None else x for x in self.known]
        return inputs._replace(mask=jax.tree.unflatten(self.tree, leaves))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, inputs: Inputs):
    return _forward(static, inputs)[0]


def _forward(static, inputs):
    o, lse = static.backend.forward_pass(static.whole(inputs), static.options)
    q, k, v, o, lse = (checkpoint_name(x, RESIDUAL) for x in (*inputs[:3], o, lse))
    return (o, lse), (inputs._replace(q=q, k=k, v=v), o, lse)


def _backward(static, kept, cotangents):
    inputs, o, lse = kept
    do, dlse = cotangents
    cotangents = Cotangents(do, lse, delta(do, o, dlse))
    gradients = static.backend.backward_pass(static.whole(inputs), cotangents, static.options)
    slope = None if inputs.slope is None else gradients.slope.astype(inputs.slope.dtype)
    return (Inputs(*gradients[:3], mask=None, slope=slope),)


_attend.defvjp(_forward, _backward)
