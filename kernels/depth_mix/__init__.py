"""Depth attention: what a sublayer reads of earlier outputs. Two primitives, one file a backend."""

from blockjax.kernels.depth_mix.api import depth_join, depth_mix, depth_read
from blockjax.kernels.depth_mix.passes import RESIDUAL
from blockjax.kernels.depth_mix.sharded import sharded_depth_join, sharded_depth_read
from blockjax.kernels.depth_mix.spec import Join, Read, Spec, floor_bytes

__all__ = [
    "RESIDUAL",
    "Join",
    "Read",
    "Spec",
    "depth_join",
    "depth_mix",
    "depth_read",
    "floor_bytes",
    "sharded_depth_join",
    "sharded_depth_read",
]
