"""Devices: the mesh, the rules that place arrays on it; attention and recurrence of sequences cut over it."""

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
from blockjax.parallel.recurrence import linear_attention
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
    "linear_attention",
    "make_mesh",
    "partition_spec",
    "shardings",
]
