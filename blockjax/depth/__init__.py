"""Depth attention: what a layer reads of what earlier layers wrote."""

from blockjax.depth.residual import Residual
from blockjax.depth.stream import DepthQueries, Stream

__all__ = ["DepthQueries", "Residual", "Stream"]
