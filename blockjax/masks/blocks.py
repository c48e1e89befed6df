"""Numbers of blocks in a sequence: which ones a mask's rows and columns are, or which ones a device holds.

None stands for consecutive ones, from the first.
"""

import numpy as np

from blockjax.masks.predicates import array_module


def number(blocks, i):
    """Of the i-th."""
    return i if blocks is None else array_module(blocks, i).take(blocks, i, mode="clip")


def split(blocks, parts: int):
    """Of all parts of these [..., n] blocks, [..., n * parts]."""
    if blocks is None:
        return None
    numbers = blocks[..., None] * parts + np.arange(parts, dtype=np.int32)
    return numbers.reshape(*blocks.shape[:-1], -1)


def count_before(ascending, x, side: str = "left"):
    """How many of these ascending numbers come before each of x, int32; with `side="right"` or equal it."""
    xp = array_module(ascending, x)
    # On an accelerator one fused comparison of all is faster than a search in steps.
    method = {} if xp is np else dict(method="compare_all")
    return xp.searchsorted(ascending, x, side=side, **method).astype(np.int32)
