"""Devices: the mesh and the rules that place arrays on it."""

from blockjax.parallel.mesh import (
    MESH_AXES,
    RULES,
    constrain,
    cut,
    make_mesh,
    partition_spec,
    shardings,
)

__all__ = ["MESH_AXES", "RULES", "constrain", "cut", "make_mesh", "partition_spec", "shardings"]
