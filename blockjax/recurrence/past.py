"""What a recurrent layer knows of the tokens before those it is given."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from blockjax.kernels.linear_attention import linear_attention
from blockjax.parallel import recurrence
from blockjax.parallel.layouts import Layout
from blockjax.parallel.mesh import cut, mesh_axis


class Past(NamedTuple):
    """Handed to a recurrent layer in place of the `attend` that an attention is handed.

    Attributes:
      memory: what the layer returned after the tokens before; None if nothing came before. Arrays with B
        in front; a row of zeros says that nothing came before in that row.
      ids: [B, T] int32 of documents: where they change the memory is cut. Negative ones are padding, which
        must end a row. None is one document.
      keep: whether the layer is to return its memory after the last token that is not padding.
      layer: index of the layer, possibly traced, where a decay depends on it; else None.
      layout: in whose order tokens lie, where the mesh cuts sequences; None is that of the sequence.
    """

    memory: Any = None
    ids: jax.Array | None = None
    keep: bool = False
    layer: int | jax.Array | None = None
    layout: Layout | None = None

    def end(self, tokens: int) -> int | jax.Array:
        """How many of T tokens are not padding, [B] int32; T without ids."""
        if self.ids is None:
            return tokens
        index = jnp.arange(tokens)[None]
        index = index if self.layout is None else self.layout.apply(index)
        return 1 + jnp.max(jnp.where(self.ids >= 0, index, -1), axis=1)


def forget(memory, rows: jax.Array):
    """The memory without that of the rows, [B] bool, in which nothing came before what comes next."""
    keep = lambda x: jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), jnp.zeros_like(x), x)  # noqa: E731
    return jax.tree.map(keep, memory)


def linear_recurrence(q, k, v, past: Past, state: jax.Array | None, **options):
    """`linear_attention` from a state on; every device works on its own rows, heads and tokens.

    Args:
      q, k, v: [B, T, heads, H] as there.
      past: its ids, `keep` and layout.
      state: [B, K, Hk, Hv] float32 before the first token, or None.
      options: `log_decay`, `beta`, `kind`, `scale` of the op.

    Returns:
      o [B, T, N, Hv] and the state after the last token, None unless it is kept.
    """
    options |= dict(initial_state=state, segment_ids=past.ids, return_state=past.keep)
    batch, heads = cut("batch", v.shape[0]), cut("heads", v.shape[2])
    if past.layout is not None:
        where = dict(axis=mesh_axis("time"), layout=past.layout, batch=batch, heads=heads)
        out = recurrence.linear_attention(q, k, v, **where, **options)
        return out if past.keep else (out, None)
    if q.shape[2] != v.shape[2]:
        heads = None  # shared queries belong to no device's heads
    if batch is None and heads is None:
        out = linear_attention(q, k, v, **options)
        return out if past.keep else (out, None)
    rows = P(batch, None, heads)
    log_decay = options.get("log_decay")
    specs = dict(
        log_decay=P(heads) if log_decay is not None and log_decay.ndim == 1 else rows,
        beta=rows,
        initial_state=P(batch, heads),
        segment_ids=P(batch),
    )
    arrays = {name: options.pop(name) for name in specs if options.get(name) is not None}
    options = {name: value for name, value in options.items() if value is not None}

    def local(q, k, v, arrays):
        out = linear_attention(q, k, v, **arrays, **options)
        return out if past.keep else (out, None)

    return jax.shard_map(
        local,
        in_specs=(rows, rows, rows, {name: specs[name] for name in arrays}),
        out_specs=(rows, P(batch, heads) if past.keep else None),
        check_vma=False,
    )(q, k, v, arrays)
