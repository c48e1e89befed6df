"""`block_sparse_attention` on a mesh whose devices share out batch and heads.

Left to the compiler, an op with kernels or loops inside is either gathered onto every device or communicates
in each iteration. Here every device calls it on its own part, and only gradients of what all share meet.
"""

import math
from dataclasses import replace

import jax
from blockjax.kernels.block_sparse_attention.api import DistanceBias, block_sparse_attention
from blockjax.kernels.platforms import Axes, axis_names
from jax.sharding import PartitionSpec as P

from blockjax.errors import UsageError
from blockjax.masks import BlockMask, Ranges

PER_TOKEN = ("q_segment_ids", "kv_segment_ids", "q_positions", "kv_positions")


def sharded_block_sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: BlockMask,
    *,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
    batch: Axes = None,
    heads: Axes = None,
    **options,
):
    """As `block_sparse_attention`, on a mesh; in the same program without one.

    Args:
        q, k, v, mask, options: as there; tokens are whole on every device.
        mesh: default the one in use.
        batch: mesh axes over which B is cut, None for none.
        heads: mesh axes over which query and key heads are cut, and with them lists, slopes and sinks that
            differ between heads.

    Raises:
        UsageError: B or the key heads do not divide by the devices along their axes.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if mesh.empty or not (batch or heads):
        return block_sparse_attention(q, k, v, mask, **options)
    for what, n, axes in (("batch entries", q.shape[0], batch), ("key heads", k.shape[2], heads)):
        devices = math.prod(mesh.shape[axis] for axis in axis_names(axes))
        if n % devices:
            raise UsageError(
                f"{n} {what} do not divide over {'*'.join(axis_names(axes))}={devices}; "
                "cut them over fewer devices, or over other axes."
            )
    rows, heads = (axis_names(axes) or None for axes in (batch, heads))
    arrays = {
        name: x for name, x in options.items() if name in (*PER_TOKEN, "bias", "sinks") and x is not None
    }
    rest = {name: x for name, x in options.items() if name not in arrays}
    specs = {
        name: P(heads) if name in ("bias", "sinks") else P(rows if x.ndim == 2 and x.shape[0] > 1 else None)
        for name, x in arrays.items()
    }
    if "bias" in arrays:
        specs["bias"] = DistanceBias(specs["bias"])
    qkv = P(rows, None, heads, None)
    out = (qkv, P(rows, heads, None)) if rest.get("return_lse") else qkv
    # A mask that all devices share stays known to the compiler where it is.
    shared = mask.lists_shape == (1, 1)

    def call(q, k, v, lists, arrays):
        return block_sparse_attention(q, k, v, mask if shared else lists, **arrays, **rest)

    in_specs = qkv, qkv, qkv, None if shared else _list_specs(mask, rows, heads), specs
    call = jax.shard_map(call, mesh=mesh, in_specs=in_specs, out_specs=out)
    return call(q, k, v, None if shared else mask, arrays)


def _list_specs(mask: BlockMask, rows, heads) -> BlockMask:
    """The mask with the partition of each leaf in its place."""
    assert not isinstance(mask, Ranges)
    specs = jax.tree.map(lambda _: P(), mask)
    b, h = mask.lists_shape
    lists = P(rows if b > 1 else None, heads if h > 1 else None)
    return replace(specs, index=lists, tag=lists, counts=lists)
