"""What a short convolution sees of a sequence that is cut over devices: the tokens before each run of them.

Devices hold runs of consecutive tokens (`Layout.pieces`). A run is sent the last tokens of the run before it,
which lies on a neighbour or on the same device: as many tokens as the convolution reaches, however long the
sequence.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from blockjax.errors import UsageError
from blockjax.kernels.platforms import Axes
from blockjax.parallel.circulate import step
from blockjax.parallel.layouts import Layout


def runs_with_halo(
    x: jax.Array,
    before: jax.Array,
    layout: Layout | None = None,
    *,
    axis: str | None = "seq",
    batch: Axes = None,
    heads: Axes = None,
) -> jax.Array:
    """Every run of consecutive tokens, with the n tokens before it in front.

    Args:
      x: [B, T, ...], in the order of the layout.
      before: [B, n, ...], the tokens before the sequence, in the dtype of x.
      layout: on the mesh in use; None: the sequence is one run.
      axis: the mesh axis along which it is cut.
      batch, heads: mesh axes over which B, and the third dimension, are cut.

    Returns:
      [B, R, n + T / R, ...] of R runs, as the layout has them.

    Raises:
      UsageError: the layout has no runs, or they are shorter than n.
    """
    if layout is None:
        return jnp.concatenate([before, x], axis=1)[:, None]
    n, pieces, devices = before.shape[1], layout.pieces, layout.devices
    length = layout.tokens // (devices * len(pieces))
    if n > length:
        raise UsageError(
            f"Runs of {length} tokens ({layout.name} over {devices} devices) are shorter than the {n} tokens "
            "before them that a convolution reaches; cut the sequence over fewer devices."
        )

    def local(x, before):
        place, runs = lax.axis_index(axis), jnp.split(x, len(pieces), axis=1)
        for i, direction in enumerate(pieces):
            tail = lax.slice_in_dim(runs[i], length - n, length, axis=1)
            begins = place == (0 if direction > 0 else devices - 1)
            arrived = jnp.where(begins, before, step(tail, axis, devices, direction))
            runs[i], before = jnp.concatenate([arrived, runs[i]], axis=1), tail
        return jnp.stack(runs, axis=1)

    rest = (heads,) if x.ndim > 2 else ()
    cut = jax.shard_map(
        local, in_specs=(P(batch, axis, *rest), P(batch, None, *rest)),
        out_specs=P(batch, axis, None, *rest), check_vma=False,
    )  # fmt: skip
    return cut(x, before)


def tokens_at(
    x: jax.Array,
    index: jax.Array,
    layout: Layout | None = None,
    *,
    axis: str | None = "seq",
    batch: Axes = None,
    heads: Axes = None,
) -> jax.Array:
    """Tokens [B, n, ...] of x by their place in the sequence, index [B, n], on every device; else as above.

    Zeros where the index is not in the sequence.
    """
    if layout is None:
        return _take(x, index)
    pieces = layout.pieces
    first = layout.order.reshape(layout.devices, len(pieces), -1)[..., 0] * layout.block

    def local(x, index):
        here = jnp.asarray(first)[lax.axis_index(axis)]
        runs = enumerate(jnp.split(x, len(pieces), axis=1))
        return sum(_take(run, index - here[i]) for i, run in runs)[None]

    rest = (heads,) if x.ndim > 2 else ()
    cut = jax.shard_map(
        local, in_specs=(P(batch, axis, *rest), P(batch)),
        out_specs=P(axis, batch, None, *rest), check_vma=False,
    )  # fmt: skip
    # All but one are zeros. A sum outside leaves the gradient to the device that has the token.
    return jnp.sum(cut(x, index), axis=0, dtype=x.dtype)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    there = (index >= 0) & (index < x.shape[1])
    index, there = (jnp.expand_dims(a, range(2, x.ndim)) for a in (jnp.clip(index, 0, x.shape[1] - 1), there))
    return jnp.where(there, jnp.take_along_axis(x, index, axis=1), 0)
