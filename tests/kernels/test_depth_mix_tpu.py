"""The TPU backend of `depth_mix`: the suite interpreted on CPU, uninitialized memory, compiled for chips."""

import pytest
from blockjax.kernels.depth_mix import tpu

from tests.kernels.depth_mix_suite import DepthMixSuite


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels in plain interpretation and in tiles of few tokens: several tiles even at tiny shapes."""
    monkeypatch.setattr(tpu, "INTERPRET", True)
    monkeypatch.setattr(tpu, "TILES", (64, 16))


@pytest.mark.usefixtures("interpreted")
class TestTpu(DepthMixSuite):
    implementation = "tpu"
    # No TPU multiplies float64.
    test_float64 = test_finite_differences = None
