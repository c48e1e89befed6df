"""Attention over listed blocks of keys: one op, one file a backend."""

from blockjax.kernels.block_sparse_attention.api import DistanceBias, Spec, block_sparse_attention
from blockjax.kernels.block_sparse_attention.sharded import sharded_block_sparse_attention
from blockjax.kernels.block_sparse_attention.spec import RESIDUAL, Tiles

__all__ = [
    "RESIDUAL",
    "DistanceBias",
    "Spec",
    "Tiles",
    "block_sparse_attention",
    "sharded_block_sparse_attention",
]
