"""A ring buffer of keys and values for one layer, as long as the layer can see."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from blockjax.kernels.block_sparse_attention import block_sparse_attention
from blockjax.locality import Boundaries
from blockjax.masks import BlockMask
from blockjax.models import LayerSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the last C tokens of every sequence.

    Token at position p lies in slot p mod C, so sequences of a batch may be of
    unequal length.

    Attributes:
      k, v: [B, C, K, H].
      positions: [B, C] int32 of the token in each slot; -1 where there is none.
      segments: [B, C] int32, index of the segment of that token; None without segments.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    segments: jax.Array | None

    @classmethod
    def from_prompt(
        cls, k: jax.Array, v: jax.Array, lengths: jax.Array, segments: jax.Array | None, size: int
    ) -> KVCache:
        """Keeps the last `size` tokens of prompts.

        Args:
          k, v: [B, T, K, H]; tokens at and beyond a sequence's length are padding.
          lengths: [B] int32.
          segments: [B, T] int32, or None.
          size: C.
        """
        last = lengths[:, None] - 1
        # The newest position below `lengths` that falls into each slot.
        positions = last - (last - jnp.arange(size)) % size
        index = jnp.clip(positions, 0, k.shape[1] - 1)
        return cls(
            jnp.take_along_axis(k, index[..., None, None], axis=1),
            jnp.take_along_axis(v, index[..., None, None], axis=1),
            jnp.where(positions >= 0, positions, -1),
            None if segments is None else jnp.take_along_axis(segments, index, axis=1),
        )

    def append(self, k: jax.Array, v: jax.Array, positions: jax.Array, segments: jax.Array | None) -> KVCache:
        """Writes one token a sequence: k, v [B, 1, K, H] at positions [B], in segments [B]."""
        row, slot = jnp.arange(len(positions)), positions % self.k.shape[1]
        return KVCache(
            self.k.at[row, slot].set(k[:, 0]),
            self.v.at[row, slot].set(v[:, 0]),
            self.positions.at[row, slot].set(positions),
            None if segments is None else self.segments.at[row, slot].set(segments),
        )

    def attend(
        self, q: jax.Array, spec: LayerSpec, positions: jax.Array, *, block: int, soft_cap=None
    ) -> jax.Array:
        """One query a sequence, q [B, 1, N, H] of the token just written, over what the layer sees."""
        C = self.k.shape[1]
        # Slots hold tokens in the order of the ring, so every block is visited and tested.
        mask = BlockMask.from_predicate(spec.predicate, 1, C, bq=1, bk=min(block, C), prune=False)
        ids = jnp.zeros_like(self.positions)
        if spec.group is not None:
            ids = self.segments // spec.group
        own = jnp.take_along_axis(ids, (positions % C)[:, None], axis=1)
        return block_sparse_attention(
            q,
            self.k,
            self.v,
            mask,
            soft_cap=soft_cap,
            q_positions=positions[:, None],
            kv_positions=self.positions,
            q_segment_ids=own,
            kv_segment_ids=jnp.where(self.positions >= 0, ids, -1),
            bias=spec.bias(q.shape[2]),
        )


def cache_size(spec: LayerSpec, max_tokens: int, boundaries: Boundaries | None) -> int:
    """C of a layer for sequences of at most `max_tokens`; `boundaries` are of segments, if it has any.

    Recurrent layers have a memory of their own and no cache: 0.
    """
    if spec.mixer is not None:
        return 0
    if boundaries is not None:
        return min(spec.group * boundaries.limits[1], max_tokens)
    return max_tokens if spec.full else min(spec.window, max_tokens)
