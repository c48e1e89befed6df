"""The device mesh, and which logical axis lives on which mesh axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from blockjax.errors import UsageError, nearest
from blockjax.kernels.platforms import axis_names

MESH_AXES = ("data", "fsdp", "seq", "tensor")

# Logical axis -> mesh axes. The first row that names an axis decides.
# Parameters are cut along "model" by fsdp; activations keep their features whole.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("batch", ("data", "fsdp")),
    ("time", ("seq",)),
    ("vocab", ("tensor",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("ffn", ("tensor",)),
    ("model", ("fsdp",)),
    ("layers", ()),
    ("reader", ()),
    ("rank", ()),
    ("state", ()),
    ("head_dim", ()),
    ("gain", ()),
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data, fsdp, seq, tensor`.

    Args:
      sizes: devices along each axis; at most one may be -1 and takes what is left.
      devices: defaults to all devices of all processes.

    Raises:
      UsageError: an axis is unknown, or the sizes do not multiply to the number of devices.
    """
    for axis in sizes:
        if axis not in MESH_AXES:
            raise UsageError(f"Unknown mesh axis {axis!r}.{nearest(axis, MESH_AXES)}")
    devices = jax.devices() if devices is None else devices
    shape = [int(sizes.get(axis, 1)) for axis in MESH_AXES]
    text = " x ".join(f"{axis}={n}" for axis, n in zip(MESH_AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
        raise UsageError(f"mesh {text}: every axis is at least 1, and at most one may be -1 (what is left).")
    known = math.prod(n for n in shape if n != -1)
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        raise UsageError(
            f"mesh {text} needs {'a multiple of ' if -1 in shape else ''}{known} devices, "
            f"but there are {len(devices)}. Set one axis to -1 to take what is left."
        )
    # `jax.make_mesh` refuses 8 x 16 x 4 on a torus of 8 x 8 x 8: 16 needs an axis and a part of another.
    placed = create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def compiler_options(mesh: Mesh) -> dict[str, bool | int]:
    """Options of XLA, other than its defaults, with which transfers along `seq` hide behind kernels."""
    if mesh.devices.flat[0].platform != "gpu" or mesh.shape["seq"] == 1:
        return {}
    return {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # Keys and values of a hop are two transfers: of one at a time the first would hide behind nothing.
        "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
    }


def partition_spec(names: Sequence[str | None]) -> P:
    """The partition of an array whose dimensions carry these logical names."""
    rules = dict(reversed(RULES))
    entries = []
    for name in names:
        if name is not None and name not in rules:
            raise KeyError(f"no rule in RULES matches the logical axis {name!r}")
        axes = rules[name] if name else ()
        entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return P(*entries)


def shardings(mesh: Mesh, shapes, axes):
    """`NamedSharding` per leaf, from the logical names of its dimensions.

    Args:
      mesh: from `make_mesh`.
      shapes: tree of arrays or `ShapeDtypeStruct`.
      axes: the same tree with a tuple of logical names in place of each array.

    Raises:
      UsageError: a dimension does not divide by the mesh axes it is cut over.
    """

    def leaf(path, shape, names):
        spec = partition_spec(names)
        for name, size, entry in zip(names, shape.shape, spec, strict=True):
            if size % _parts(mesh, entry):
                raise UsageError(
                    f"{jax.tree_util.keystr(path)} has {size} along {name!r}, which does not divide by "
                    f"{'*'.join(axis_names(entry))}={_parts(mesh, entry)} of the mesh; "
                    "change the size or the mesh."
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(leaf, shapes, axes)


def parts(name: str) -> int:
    """Into how many parts the mesh in use cuts a logical axis; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _parts(mesh, partition_spec((name,))[0])


def mesh_axis(name: str) -> str | None:
    """The one axis of the mesh in use along which a logical axis lies; None without a mesh."""
    (axis,) = dict(RULES)[name]
    return None if jax.sharding.get_abstract_mesh().empty else axis


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Pins an activation to its place on the mesh in use; nothing without one."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(names))


def cut(name: str, size: int) -> tuple[str, ...] | None:
    """The mesh axes over which a dimension of this logical name is cut; None if it does not divide."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    return None if size % parts(name) else axis_names(partition_spec((name,))[0])


def _parts(mesh, entry) -> int:
    """Into how many parts an entry of a `PartitionSpec` cuts a dimension."""
    return math.prod(mesh.shape[axis] for axis in axis_names(entry))
