"""Layers that are applied several times with the same weights, told which time it is."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from blockjax.parameters import weight


class Condition(nnx.Module):
    """What tells tied layers which time they are applied: gains (t1, t2, t3) = 1 + MLP(t) for t = 0, 1, ...

    A layer does x <- t3 * (y + t2 * MLP(norm(y))) with y = x + t1 * mixer(norm(x)), as the blocks of Raptor
    do (block-recurrent hypothesis): one input, SiLU, 3 M outputs whose weights start at 1e-4, so that gains
    start next to 1. Each layer has a network of its own.

    Attributes:
      inner, inner_bias: [layers, inner] float32.
      outer, outer_bias: [layers, inner, 3 M] and [layers, 3 M] float32.
    """

    def __init__(self, layers: int, width: int, inner: int, *, rngs: nnx.Rngs):
        axes = dict(layers=layers, rank=inner, gain=3 * width)
        self.inner = weight(rngs, dict(layers=layers, gain=inner), fan_in=1)
        self.inner_bias = weight(rngs, dict(layers=layers, gain=inner), fan_in=1)
        self.outer = weight(rngs, axes, fan_in=1, scale=1e-4)
        self.outer_bias = nnx.Param(jnp.zeros((layers, 3 * width), jnp.float32), axes=("layers", "gain"))

    def __call__(self, layer: int | slice, times: jax.Array | int) -> jax.Array:
        """Gains [..., 3, M] float32 of a layer at each of `times` [...], which may be traced.

        Of a slice of layers, they are an axis behind those of `times`.
        """
        inner, bias, outer, shift = (
            p[...][layer] for p in (self.inner, self.inner_bias, self.outer, self.outer_bias)
        )
        times = jnp.asarray(times, jnp.float32)
        h = jax.nn.silu(times[(..., *(None,) * inner.ndim)] * inner + bias)
        gains = 1 + jnp.einsum("...C,...CM->...M", h, outer, precision="highest") + shift
        return gains.reshape(*gains.shape[:-1], 3, -1)


class Tied(NamedTuple):
    """A layer at one of the times that it is applied.

    Attributes:
      block: the layer.
      gains: [3, M] float32 from `Condition`.
    """

    block: nnx.Module
    gains: jax.Array

    def sublayers(self, rope, see) -> tuple:
        """What the layer adds to the residual stream at this time."""
        return scaled(self.block.sublayers(rope, see), self.gains)


def scaled(sublayers: tuple, gains: jax.Array | None) -> tuple:
    """Sublayers with the gains [3, M] of one time; as they are without."""
    if gains is None:
        return sublayers

    def scale(sublayer, gain: jax.Array, stream: jax.Array | None):
        def run(x):
            output, memory = sublayer.run(x)
            return (output * gain).astype(output.dtype), memory

        return sublayer._replace(run=run, stream=stream)

    mixer, mlp = sublayers
    return scale(mixer, gains[0], None), scale(mlp, gains[1], gains[2])
