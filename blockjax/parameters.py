"""What layers of all kinds are made of: weights with logical axis names, the norm, RoPE."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


def weight(rngs: nnx.Rngs, axes: dict[str, int], *, fan_in: int, scale: float = 1.0) -> nnx.Param:
    """A normal weight of standard deviation scale / sqrt(fan_in), float32.

    Args:
      axes: logical name -> size of each dimension; the names say how
        `parallel.mesh` shards it and which dimensions Muon orthogonalises.
    """
    value = jax.random.normal(rngs.params(), tuple(axes.values()), jnp.float32)
    return nnx.Param(value * (scale * fan_in**-0.5), axes=tuple(axes))


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * gain, computed in float32 (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float):
        self.gain = nnx.Param(jnp.ones(size, jnp.float32), axes=("gain",))
        self.eps = eps

    def __call__(self, x: jax.Array, eps: float | None = None) -> jax.Array:
        """x [..., size] -> the same; `eps` replaces the norm's own."""
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        eps = self.eps if eps is None else eps
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
        return (y * self.gain[...]).astype(x.dtype)


def rope_table(positions: jax.Array, head_dim: int, base: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, 1, H/2] of the rotary angles (arXiv:2104.09864, eq. 15)."""
    frequency = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns feature i with feature i + H/2 of x [B, T, N, H]."""
    cos, sin = table
    a, b = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
