"""Flax NNX modules: one decoder, its layer table and its sizes."""

from blockjax.models.config import PRESETS, LayerSpec, TransformerConfig, preset
from blockjax.models.transformer import Transformer, logical_axes

__all__ = ["PRESETS", "LayerSpec", "Transformer", "TransformerConfig", "logical_axes", "preset"]
