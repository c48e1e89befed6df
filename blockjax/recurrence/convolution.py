"""The short causal convolution in front of recurrent layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from blockjax.kernels.linear_attention.api import count_documents
from blockjax.recurrence.past import Past


class ShortConvolution(nnx.Module):
    """y_t = silu(sum_i w_i x_{t-i}), each channel on its own (Mamba, arXiv:2312.00752, fig. 3).

    Tokens before the document are zeros.

    Args:
      size: tokens that it reaches, its own included.
      shape: of a token: logical name -> size.
    """

    def __init__(self, size: int, shape: dict[str, int], *, rngs: nnx.Rngs):
        value = jax.random.normal(rngs.params(), (size, *shape.values()), jnp.float32) * size**-0.5
        # Not a matrix between features: no weight decay, and nothing for Muon to orthogonalise.
        self.taps = nnx.Param(value, axes=("gain", *shape))

    def empty(self, batch: int, dtype) -> jax.Array:
        """The memory before the first token, [B, size - 1, ...]."""
        size, *shape = self.taps.shape
        return jnp.zeros((batch, size - 1, *shape), dtype)

    def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, jax.Array | None]:
        """x [B, T, ...] -> the same, and the memory: the last inputs of the document that goes on."""
        taps, (B, T), size = self.taps[...], x.shape[:2], self.taps.shape[0]
        axes = tuple(range(2, x.ndim))
        if past.ids is not None:
            x = jnp.where(jnp.expand_dims(past.ids >= 0, axes), x, 0)
        memory = self.empty(B, x.dtype) if past.memory is None else past.memory
        whole = jnp.concatenate([memory, x], axis=1)
        documents = jnp.zeros((B, T), jnp.int32)
        if past.ids is not None:
            documents = jnp.where(past.ids >= 0, count_documents(past.ids), -1)
        documents = jnp.pad(documents, ((0, 0), (size - 1, 0)))
        y = 0.0
        for i in range(size):
            start = size - 1 - i
            part = whole[:, start : start + T].astype(taps.dtype)
            if past.ids is not None and i:
                same = documents[:, start : start + T] == documents[:, size - 1 :]
                part = jnp.where(jnp.expand_dims(same, axes), part, 0)
            y += taps[i] * part
        y = jax.nn.silu(y).astype(x.dtype)
        if not past.keep:
            return y, None
        index = jnp.broadcast_to(past.end(T), (B,))[:, None] + jnp.arange(size - 1)
        kept = jnp.take_along_axis(whole, jnp.expand_dims(index, axes), axis=1)
        of = jnp.take_along_axis(documents, index, axis=1)
        return y, jnp.where(jnp.expand_dims(of == of[:, -1:], axes), kept, 0)
