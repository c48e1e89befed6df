"""Devices: the mesh, the rules that place arrays on it, and attention over sequences cut across it."""

from blockjax.parallel.attention import attention
from blockjax.parallel.layouts import LAYOUTS, Layout
from blockjax.parallel.mesh import (
    MESH_AXES,
    RULES,
    constrain,
    cut,
    make_mesh,
    partition_spec,
    shardings,
)
from blockjax.parallel.schedules import SCHEDULES

__all__ = [
    "LAYOUTS",
    "MESH_AXES",
    "RULES",
    "SCHEDULES",
    "Layout",
    "attention",
    "constrain",
    "cut",
    "make_mesh",
    "partition_spec",
    "shardings",
]
