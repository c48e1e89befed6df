"""What every backend of `linear_attention` must do, by the kernels of a Hopper GPU."""

from typing import ClassVar

import jax.numpy as jnp
import pytest

from tests.kernels.linear_attention_suite import BY_NORM, LinearAttentionSuite, assert_close_by_norm


@pytest.mark.gpu
class TestHopper(LinearAttentionSuite):
    """Products of bfloat16 and outputs of that dtype; documents end within chunks of 64."""

    implementation = "hopper"
    dims: ClassVar = dict(Hk=64, Hv=128)
    dtype = "bfloat16"
    chunk, stretch, shortest = 64, 8, 64
    # Norm 80 of such an inverse of 64 tokens, and two chunks a document: beyond what bfloat16 serves well.
    growth = 100
    few = LinearAttentionSuite.forms

    def close(self, ours, theirs, times=1):
        assert_close_by_norm(ours, theirs, times)

    def rounding(self, terms):
        return BY_NORM["log_decay"] * jnp.linalg.norm(terms.astype("float32"), axis=(1, 3)).max()

    # Every test here is one of bfloat16. It multiplies no float64 and has one size of chunk; lengths are in
    # the files of its kernels.
    test_bfloat16 = test_float64 = test_finite_differences = None
    test_any_length_and_chunk = test_many_tokens = None
