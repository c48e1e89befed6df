"""Linear attention with decay and delta rules: a state per head that tokens write to and read from."""

from blockjax.kernels.linear_attention.api import linear_attention
from blockjax.kernels.linear_attention.passes import RESIDUAL
from blockjax.kernels.linear_attention.spec import Inputs, Options, Spec
from blockjax.kernels.linear_attention.xla import summary

__all__ = ["RESIDUAL", "Inputs", "Options", "Spec", "linear_attention", "summary"]
