"""What every backend of `linear_attention` must do, by the kernels of a Hopper GPU."""

from typing import ClassVar

import pytest

from tests.kernels.linear_attention_suite import LinearAttentionSuite


@pytest.mark.gpu
class TestHopper(LinearAttentionSuite):
    """Products of bfloat16 and outputs of that dtype; documents end within chunks of 64."""

    implementation = "hopper"
    dims: ClassVar = dict(Hk=64, Hv=128)
    dtype = "bfloat16"
    tolerance = 3e-2
    chunk, stretch, shortest = 64, 8, 64
    few = LinearAttentionSuite.forms

    # It multiplies no float64 and has one size of chunk; lengths are in the files of its kernels.
    test_float64 = test_finite_differences = None
    test_any_length_and_chunk = test_many_tokens = None
