"""Devices: the mesh and the rules that place arrays on it."""

from blockjax.parallel.mesh import (
    MESH_AXES,
    RULES,
    constrain,
    make_mesh,
    partition_spec,
    per_device,
    shardings,
)

__all__ = ["MESH_AXES", "RULES", "constrain", "make_mesh", "partition_spec", "per_device", "shardings"]
