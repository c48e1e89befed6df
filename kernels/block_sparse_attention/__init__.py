"""Attention over listed blocks of keys: one op, one file a backend."""

from blockjax.kernels.block_sparse_attention.api import DistanceBias, Spec, block_sparse_attention

__all__ = ["DistanceBias", "Spec", "block_sparse_attention"]
