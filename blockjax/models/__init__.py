"""Flax NNX modules: one decoder, its layer table and its sizes."""

from blockjax.models.config import PRESETS, TransformerConfig, preset
from blockjax.models.layer_spec import LayerSpec
from blockjax.models.transformer import Transformer, logical_axes

__all__ = ["PRESETS", "LayerSpec", "Transformer", "TransformerConfig", "logical_axes", "preset"]
