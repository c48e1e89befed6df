"""Small jobs, and processes that compile for TPUs."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest
from blockjax.kernels.block_sparse_attention import api, reference

from blockjax.pods.chips import CHIPS
from blockjax.pods.topology import Topology
from blockjax.train.config import base_config
from tests.compiling import need_libtpu

ROOT = pathlib.Path(__file__).parents[2]


class Pod(Topology):
    """CPU devices have no place in a torus."""

    def links(self, group):
        return 1


@pytest.fixture(scope="module")
def attention_by_reference():
    """Programs compile for seconds and run for milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "BACKENDS", {"reference": reference})
        yield


@pytest.fixture
def tiny():
    """A config that compiles in seconds."""
    return small_config()


def small_config():
    """Of two layers, sixteen rows of 64 tokens."""
    config = base_config()
    config.model.update(depth=2, width=64, heads=4, kv_heads=4, head_dim=16, ffn=64, attention_block=64)
    config.model.dtype = "float32"
    config.data.update(seq_len=64, batch_size=16)
    config.run.update(remat="full", steps=200)
    return config


@pytest.fixture(scope="module")
def pod():
    """Eight CPU devices that pass for a v5e of 2 x 4."""
    return Pod(CHIPS["v5e"], (2, 4), jax.devices())


@pytest.fixture(scope="session")
def python():
    """`python(*arguments)` runs Python in a process that finds libtpu, on one CPU device."""
    need_libtpu()

    def run(*arguments: str) -> subprocess.CompletedProcess:
        environment = os.environ | dict(XLA_FLAGS="", JAX_ENABLE_COMPILATION_CACHE="false", COLUMNS="140")
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "false"
        return subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
        )

    return run
