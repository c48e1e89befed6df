"""The ring of one TPU kernel with remote copies: interpreted with race detection, and compiled for chips.

The interpreter runs a device a thread, knows which accesses nothing orders, fills memory with NaN, and carries
a copy out at once (`eager`) or when it is waited for (`on_wait`). Gradients of shards are dense here.
"""

import functools
import itertools
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blockjax.kernels.block_sparse_attention import api, block_sparse_attention, reference, tpu
from blockjax.kernels.block_sparse_attention.spec import Tiles
from blockjax.kernels.block_sparse_attention.tpu import layout, ring, walk
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from blockjax.errors import UsageError
from blockjax.masks import BlockMask, Causal
from blockjax.parallel.attention import attention
from blockjax.parallel.layouts import LAYOUTS
from experiments import tpu_schedule
from tests.kernels.block_sparse_attention_suite import random_blocks
from tests.parallel.test_attention import compare, dense_backward, make, mesh_of

EXHAUSTIVE = pytest.mark.exhaustive
MODES = "eager", "on_wait"
BLOCK = 64
BLOCKS = dict(bq=BLOCK, bk=BLOCK)


@pytest.fixture
def interpreted(monkeypatch, capfd):
    """`interpreted(mode)`: from then on kernels are; a semaphore left above zero fails the test."""
    dense = types.SimpleNamespace(**vars(reference) | dict(backward_pass=dense_backward))
    monkeypatch.setattr(api, "BACKENDS", {"dense": dense, "tpu": tpu, "reference": reference})
    monkeypatch.setattr(layout, "TILES", dict.fromkeys(layout.TILES, Tiles(*[(128, 256)] * 3)))
    monkeypatch.setattr(walk, "UNROLLED", 1)

    def start(mode="on_wait", **params):
        params = pltpu.InterpretParams(
            detect_races=True, uninitialized_memory="nan", dma_execution_mode=mode, **params
        )
        monkeypatch.setattr(tpu, "INTERPRET", params)

    yield start
    assert "non-zero count" not in capfd.readouterr().out
    pltpu.reset_tpu_interpret_mode_state()


def lists(T, heads=2):
    blocks = random_blocks(0, heads, T // BLOCK, T // BLOCK)
    return BlockMask.from_block_bool(blocks, **BLOCKS, predicate=Causal())


MASKS = {
    "causal": lambda T: BlockMask.causal(T, **BLOCKS),
    "window": lambda T: BlockMask.window(T, left=100, **BLOCKS),
    "window of both sides": lambda T: BlockMask.window(T, left=50, right=70, **BLOCKS),
    "full": lambda T: BlockMask.full(T, **BLOCKS),
    "lists": lists,
    "or": lambda T: BlockMask.window(T, left=70, **BLOCKS) | lists(T),
}
CASES = [
    ("causal", "contiguous", 2, "on_wait"),
    ("window of both sides", "contiguous", 3, "eager"),
    ("or", "zigzag", 4, "eager"),
    ("full", "contiguous", 8, "on_wait"),
]
ALL = [(*case, MODES[i % 2]) for i, case in enumerate(itertools.product(MASKS, LAYOUTS, (2, 3, 4, 8)))]


@pytest.mark.parametrize(
    ("mask", "layout", "P", "mode"), [*CASES, *(pytest.param(*x, marks=EXHAUSTIVE) for x in ALL)]
)
def test_equals_dense(mask, layout, P, mode, interpreted):
    interpreted(mode)
    T = BLOCK * P * (1 + (layout == "zigzag"))
    compare(P, MASKS[mask](T), 2, 1, B=1, schedule="ring_dma", layout=layout)
