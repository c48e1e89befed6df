"""Which key blocks each query block visits, and which tokens see each other inside a block."""

from blockjax.masks.block_mask import BlockMask, Lists, Ranges
from blockjax.masks.pick import lengthen, pick
from blockjax.masks.predicates import (
    EMPTY,
    FAR,
    FULL,
    FULL_TAG,
    PARTIAL,
    Between,
    Causal,
    Chunked,
    Everything,
    Function,
    Predicate,
    Window,
)

__all__ = [
    "EMPTY",
    "FAR",
    "FULL",
    "FULL_TAG",
    "PARTIAL",
    "Between",
    "BlockMask",
    "Causal",
    "Chunked",
    "Everything",
    "Function",
    "Lists",
    "Predicate",
    "Ranges",
    "Window",
    "lengthen",
    "pick",
]
