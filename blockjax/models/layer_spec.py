"""One row of the layer table: what kind of layer it is, and what it sees."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from blockjax.kernels.block_sparse_attention import DistanceBias
from blockjax.masks import BlockMask, Causal, Predicate, Window
from blockjax.masks.predicates import FAR, is_concrete
from blockjax.recurrence import Mixer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What differs from layer to layer; every layer is causal.

    A column is None where no layer uses it, a number, or a traced scalar: then one compiled layer
    serves all its values.

    Attributes:
      window: tokens that a query sees, itself included; `FAR` is all.
      group: segments that see each other: those with the same segment // group.
      slope: nats that a key loses for each token of distance.
      layer: index of the layer, where its mixer depends on it.
      mixer: options of a recurrent layer; None is attention.
    """

    window: int | jax.Array | None = None
    group: int | jax.Array | None = None
    slope: float | jax.Array | None = None
    layer: int | jax.Array | None = None
    mixer: Mixer | None = dataclasses.field(default=None, metadata=dict(static=True))

    @classmethod
    def recurrent(cls, mixer: Mixer) -> LayerSpec:
        """The row of a recurrent layer."""
        return cls(window=mixer.window, mixer=mixer)

    @property
    def attends(self) -> bool:
        """Whether tokens see each other directly."""
        return self.mixer is None or self.mixer.window is not None

    def with_columns(self, row: LayerSpec) -> LayerSpec:
        """This row of a period in the layer that has `row` of the table, which is of no kind."""
        if self.mixer is not None:
            return dataclasses.replace(self, layer=row.layer) if self.mixer.by_depth else self
        columns = {name: getattr(row, name) for name in ("window", "group", "slope")}
        return dataclasses.replace(self, **{k: x for k, x in columns.items() if x is not None})

    @property
    def full(self) -> bool:
        """Whether it is known that the window leaves out nothing."""
        return self.window is None or (is_concrete(self.window) and self.window >= FAR)

    @property
    def predicate(self) -> Predicate:
        """Which positions see which."""
        return Causal() if self.full else Window(self.window)

    def mask(self, tokens: int, block: int) -> BlockMask:
        """What the layer visits of a sequence, as blocks of at most `block` tokens a side."""
        size = min(block, tokens)
        if self.full or (is_concrete(self.window) and self.window >= tokens):
            return BlockMask.causal(tokens, bq=size, bk=size)
        return BlockMask.window(tokens, left=self.window, bq=size, bk=size)

    def ids(self, segment_ids: jax.Array | None, segments: jax.Array | None) -> jax.Array | None:
        """Segment ids for the attention: tokens see each other if theirs are equal and not negative.

        Args:
          segment_ids: [B, T] int32 of documents, negative for padding; None is one document.
          segments: [B, T] int32, index of each token's segment in its document; None without segments.

        Returns:
          [B, T] int32: a run of tokens of one document and one group has one id of its own.
        """
        if self.group is None:
            return segment_ids
        group = segments // self.group
        documents = jnp.zeros_like(group) if segment_ids is None else segment_ids
        changes = [jnp.diff(x, axis=1, prepend=x[:, :1]) != 0 for x in (group, documents)]
        return jnp.where(documents < 0, -1, jnp.cumsum(changes[0] | changes[1], axis=1, dtype=jnp.int32))

    def bias(self, heads: int) -> DistanceBias | None:
        """The distance bias of `heads` heads."""
        if self.slope is None:
            return None
        return DistanceBias(jnp.broadcast_to(jnp.asarray(self.slope, jnp.float32), (heads,)))

    def keys_seen(self, positions: jax.Array, ids: jax.Array | None) -> jax.Array:
        """How many keys each token sees, [B, T] int32.

        Args:
          positions: [B, T] int32, offset of each token in its document.
          ids: from `ids`.
        """
        seen = positions + 1
        if self.window is not None:
            seen = jnp.minimum(seen, self.window)
        if self.group is not None:
            index = jnp.arange(ids.shape[1])
            starts = jnp.diff(ids, axis=1, prepend=ids[:, :1] - 1) != 0
            seen = jnp.minimum(seen, index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1) + 1)
        return seen

    def __str__(self) -> str:
        parts = [] if self.mixer is None else [str(self.mixer)]
        if self.group is not None and self.group < FAR:
            parts.append("own segment" if self.group == 1 else f"own {self.group} segments")
        if self.slope:
            parts.append(f"bias {self.slope:.3g} a token")
        if not self.full and self.mixer is None:
            parts.append(f"window {self.window}")
        return ", ".join(parts) or "full causal"


def unstack(table: LayerSpec, layer: int) -> LayerSpec:
    """Row `layer` of a table whose columns are arrays over layers; Python numbers where known."""

    def at(column):
        return column[layer].item() if isinstance(column, np.ndarray) else column[layer]

    return jax.tree.map(at, table)
