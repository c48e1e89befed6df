"""What kinds of recurrent layers have in common: options, and how a pattern names them."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from blockjax.errors import UsageError
from blockjax.kernels.linear_attention.xla import CHUNK


class Sizes(Protocol):
    """What a layer reads of a `TransformerConfig`."""

    depth: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    rope_base: float
    norm_eps: float
    attention_block: int
    dtype: str


class Work(NamedTuple):
    """FLOPs of a token's forward pass beside those of weights; see `train.flops.FlopCounter`.

    Attributes:
      useful: of the recurrence, token by token.
      executed: of the form in which it is computed, a chunk at a time.
    """

    useful: float = 0.0
    executed: float = 0.0


@dataclasses.dataclass(frozen=True)
class Mixer:
    """The options of a kind of recurrent layer; `build` makes the layer.

    A layer is a module with two functions. `layer(x, past)` takes x [B, T, M] and a `Past` and returns
    [B, T, M] and its memory, None unless `past.keep`. `layer.empty(B)` is the memory before the first token:
    a tree of zeros with B in front.
    """

    kind: ClassVar[str]
    by_depth: ClassVar[bool] = False  # whether the layer needs `Past.layer`
    window: ClassVar[int | None] = None  # tokens that see each other directly; None where none do
    reach: ClassVar[int] = 0  # tokens before its own that a token sees through a convolution
    serial: ClassVar[bool] = False  # whether a block of tokens must wait for the one before

    def check(self, sizes: Sizes) -> None:
        """Raises `UsageError` where the options do not fit the sizes of the model."""

    def build(self, sizes: Sizes, *, rngs: nnx.Rngs) -> nnx.Module:
        """The layer."""
        raise NotImplementedError

    def work(self, sizes: Sizes) -> Work:
        """What a token costs."""
        raise NotImplementedError

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.kind}:{'/'.join(changed)}" if changed else self.kind

    def least(self, **numbers: float) -> None:
        """Checks that options are at least these numbers."""
        for name, number in numbers.items():
            if getattr(self, name) < number:
                raise UsageError(
                    f"model.pattern: {name}={getattr(self, name)} of {self.kind} must be at least {number}."
                )


@functools.cache
def num_params(mixer: Mixer, sizes: Sizes) -> int:
    """Number of parameters of a layer."""
    layer = nnx.eval_shape(lambda: mixer.build(sizes, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param)))


def linear_work(states: int, Hk: int, Hv: int, *, delta: bool) -> Work:
    """A write and a read of each state a token, and with the delta rule a read before the write.

    Executed in chunks of C tokens: those products, and C x C scores and their products with values; the delta
    rule also multiplies keys with keys and inverts a triangle in 2 log2 C products.
    """
    products = 3 if delta else 2
    useful = 2 * products * Hk * Hv
    chunk = 2 * CHUNK * (Hk + Hv) * (2 if delta else 1)
    inverse = 4 * CHUNK * math.log2(CHUNK) if delta else 0
    return Work(states * useful, states * (useful + chunk + inverse))


def rate_parameters(shape: tuple[int, ...], heads: int, *, rngs: nnx.Rngs) -> tuple[nnx.Param, nnx.Param]:
    """log A [heads] with A in U(1, 16), and the bias of a softplus whose value is log-uniform in 1e-3 .. 0.1.

    Source: Mamba-2 (arXiv:2405.21060), its released initialisation.
    """
    A = jax.random.uniform(rngs.params(), (heads,), jnp.float32, 1.0, 16.0)
    uniform = jax.random.uniform(rngs.params(), shape, jnp.float32)
    step = jnp.maximum(jnp.exp(uniform * math.log(0.1 / 1e-3) + math.log(1e-3)), 1e-4)
    bias = step + jnp.log(-jnp.expm1(-step))  # the inverse of softplus
    axes = ("gain",) if len(shape) == 1 else ("gain", "head_dim")
    return nnx.Param(jnp.log(A), axes=("gain",)), nnx.Param(bias, axes=axes)


def unit(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x / |x| along the last axis, computed in float32."""
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (y * jax.lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype)
