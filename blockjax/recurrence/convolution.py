"""The short causal convolution in front of recurrent layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from blockjax.kernels.linear_attention.api import count_documents
from blockjax.parallel.halo import runs_with_halo, tokens_at
from blockjax.parallel.mesh import cut, mesh_axis
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
        taps, (B, T), reach = self.taps[...], x.shape[:2], self.taps.shape[0] - 1
        where = dict(layout=past.layout, axis=mesh_axis("time"), batch=cut("batch", B))
        heads = cut("heads", x.shape[2]) if x.ndim > 3 else None
        wide = lambda a, ndim: jnp.expand_dims(a, range(a.ndim, ndim))  # noqa: E731
        if past.ids is not None:
            x = jnp.where(wide(past.ids >= 0, x.ndim), x, 0)
        memory = self.empty(B, x.dtype) if past.memory is None else past.memory
        # [B, runs, reach + tokens of a run, ...]
        runs = runs_with_halo(x, memory, heads=heads, **where)
        documents = None if past.ids is None else _documents(past.ids, reach, where)
        y, length = 0.0, runs.shape[2] - reach
        for i in range(reach + 1):
            here = slice(reach - i, reach - i + length)
            part = runs[:, :, here].astype(taps.dtype)
            if documents is not None and i:
                same = documents[:, :, here] == documents[:, :, reach:]
                part = jnp.where(wide(same, part.ndim), part, 0)
            y += taps[i] * part
        y = jax.nn.silu(y).astype(x.dtype).reshape(x.shape)
        if not past.keep:
            return y, None
        index = jnp.broadcast_to(past.end(T), (B,))[:, None] + jnp.arange(-reach, 0)
        before = jnp.take_along_axis(memory, wide(jnp.clip(index + reach, 0, reach - 1), x.ndim), axis=1)
        kept = jnp.where(wide(index < 0, x.ndim), before, tokens_at(x, index, heads=heads, **where))
        if past.ids is None:
            return y, kept
        # What came before the row is of its first document.
        of = count_documents(tokens_at(past.ids, jnp.maximum(index, 0), **where))
        return y, jnp.where(wide(of == of[:, -1:], x.ndim), kept, 0)


def _documents(ids: jax.Array, reach: int, where: dict) -> jax.Array:
    """Numbers that differ between documents of a run, -1 of padding: [B, runs, reach + tokens] int32.

    The first run begins with document 0, which goes on from the memory.
    """
    none = jnp.full((len(ids), reach), -1, ids.dtype)
    ids = runs_with_halo(ids, none, **where)
    count = jax.vmap(count_documents, in_axes=1, out_axes=1)(ids)
    documents = jnp.where(ids >= 0, count, -1)
    _, runs, tokens = documents.shape
    memory = (jnp.arange(runs)[:, None] == 0) & (jnp.arange(tokens) < reach)
    return jnp.where(memory, 0, documents)
