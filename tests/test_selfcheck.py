"""`python -m blockjax.selfcheck` passes here, and says what is wrong where something is."""

import itertools
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blockjax.kernels import checking
from blockjax.kernels.block_sparse_attention import check, xla
from blockjax.kernels.depth_mix import check as depth_check
from blockjax.kernels.depth_mix import xla as depth_xla
from blockjax.kernels.linear_attention import check as recurrence_check
from blockjax.kernels.linear_attention import xla as recurrence_xla
from jax.experimental import io_callback

from blockjax import selfcheck


@pytest.fixture
def run(monkeypatch, capsys):
    """Checks XLA's attention in two families; returns the exit status and what was printed."""
    families = check.Family(16, 32, None, "bias"), check.Family(64, 16, 4, "segments")
    monkeypatch.setattr(check, "FAMILIES", families)
    monkeypatch.setattr(depth_check, "SIZES", (depth_check.Size(3, 2, 24, 2),))
    monkeypatch.setattr(selfcheck, "CHECKS", {"block_sparse_attention": check})
    monkeypatch.setattr(selfcheck, "IMPLEMENTATION", types.SimpleNamespace(value=None))
    monkeypatch.setattr(selfcheck, "QUICK", types.SimpleNamespace(value=True))

    def run():
        status = 0
        try:
            selfcheck.main()
        except SystemExit as stop:
            status = stop.code
        return status, capsys.readouterr().out

    return run


def test_passes_and_says_what_is_skipped(run):
    status, said = run()
    assert status == 0, said
    assert "hopper is skipped: it runs on NVIDIA Hopper GPUs (H100, H200), not on cpu\n" in said
    assert "tpu is skipped: it runs on TPUs, not on cpu\n" in said
    assert "16 x 32, window, bias" in said and "64 x 16, lists a head, segments" in said
    assert said.count("ok") == 2
    assert f"cpu, JAX {jax.__version__}: 2 of 2 checks passed.\n" in said


def test_a_wrong_gradient_is_reported(run, monkeypatch):
    backward_pass = xla.backward_pass

    def wrong(*args):
        gradients = backward_pass(*args)
        return gradients._replace(k=1.001 * gradients.k)

    monkeypatch.setattr(xla, "backward_pass", wrong)
    status, said = run()
    assert status == 1 and said.count("wrong dk ") == 2 and "0 of 2 checks passed" in said


def test_a_run_that_differs_from_the_last_is_reported(run, monkeypatch):
    forward_pass, calls = xla.forward_pass, itertools.count()

    def drifting(*args):
        o, lse = forward_pass(*args)
        call = io_callback(lambda: np.float32(next(calls)), jax.ShapeDtypeStruct((), "float32"))
        return o, lse + jnp.float32(1e-7) * jax.lax.stop_gradient(call)

    monkeypatch.setattr(xla, "forward_pass", drifting)
    status, said = run()
    assert status == 1 and said.count("two runs differ") == 2 and "wrong" not in said


def test_a_wrong_gradient_of_the_depth_mix_is_reported(run, monkeypatch):
    monkeypatch.setattr(selfcheck, "CHECKS", {"depth_mix": depth_check})
    status, said = run()
    assert status == 0 and "1 of 1 checks passed" in said, said
    assert "depth_mix: tpu is skipped: it runs on TPUs, not on cpu\n" in said
    join_backward = depth_xla.join_backward

    def wrong(*args):
        gradients = join_backward(*args)
        return gradients._replace(query=1.001 * gradients.query)

    monkeypatch.setattr(depth_xla, "join_backward", wrong)
    status, said = run()
    assert status == 1 and said.count("wrong dq ") == 1 and "0 of 1 checks passed" in said


def test_a_wrong_gradient_of_linear_attention_is_reported(run, monkeypatch):
    monkeypatch.setattr(selfcheck, "CHECKS", {"linear_attention": recurrence_check})
    monkeypatch.setattr(recurrence_check, "SIZES", (recurrence_check.Size("decay", "token", 20, 2, 1, 8, 4),))
    status, said = run()
    assert status == 0 and "1 of 1 checks passed" in said, said
    assert "linear_attention: tpu is skipped: it runs on TPUs, not on cpu\n" in said
    backward_pass = recurrence_xla.backward_pass

    def wrong(*args):
        gradients = backward_pass(*args)
        return gradients._replace(log_decay=1.001 * gradients.log_decay)

    monkeypatch.setattr(recurrence_xla, "backward_pass", wrong)
    status, said = run()
    assert status == 1 and said.count("wrong dg ") == 1 and "0 of 1 checks passed" in said


@pytest.mark.parametrize(
    ("x", "error"),
    [([3, 4, -np.inf], 0), ([3, 5, -np.inf], 0.2), ([3, 4, 5], np.inf), ([3, np.nan, -np.inf], np.inf)],
)
def test_infinities_and_nan_are_no_small_errors(x, error):
    assert checking.relative_error(np.array(x), np.array([3, 4, -np.inf])) == error


def test_a_backend_named_for_another_machine_is_refused():
    command = [sys.executable, "-m", "blockjax.selfcheck", "--implementation=hopper"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "it runs on NVIDIA Hopper GPUs" in done.stderr, done.stderr
