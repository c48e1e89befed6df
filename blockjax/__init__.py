"""blockjax: attention, recurrence and depth in blocks, for JAX on TPU and GPU.

The names below are imported when they are first used, so `import blockjax`
itself loads nothing heavy.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockjax.kernels.block_sparse_attention import DistanceBias, block_sparse_attention
    from blockjax.kernels.depth_mix import depth_mix
    from blockjax.kernels.linear_attention import linear_attention
    from blockjax.masks import BlockMask, Causal, Chunked, Everything, Window
    from blockjax.models import LayerSpec, Transformer, TransformerConfig, preset

_HOME = {
    "BlockMask": "blockjax.masks",
    "Causal": "blockjax.masks",
    "Chunked": "blockjax.masks",
    "DistanceBias": "blockjax.kernels.block_sparse_attention",
    "Everything": "blockjax.masks",
    "LayerSpec": "blockjax.models",
    "Transformer": "blockjax.models",
    "TransformerConfig": "blockjax.models",
    "Window": "blockjax.masks",
    "block_sparse_attention": "blockjax.kernels.block_sparse_attention",
    "depth_mix": "blockjax.kernels.depth_mix",
    "linear_attention": "blockjax.kernels.linear_attention",
    "preset": "blockjax.models",
}

__all__ = [
    "BlockMask",
    "Causal",
    "Chunked",
    "DistanceBias",
    "Everything",
    "LayerSpec",
    "Transformer",
    "TransformerConfig",
    "Window",
    "block_sparse_attention",
    "depth_mix",
    "linear_attention",
    "preset",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'blockjax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
