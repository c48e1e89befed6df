"""Compiling for TPUs that are not there, in a process of its own: libtpu is loaded once, for one chip."""

import subprocess
import sys
from collections.abc import Iterable

import pytest

from blockjax.pods import libtpu
from experiments import tpu_schedule


def need_libtpu() -> None:
    """Skips the test where libtpu is missing."""
    if libtpu.find() is None:
        pytest.skip("needs libtpu, the TPU compiler: make test installs it")


def compile_elsewhere(module: str, chip: str, cases: Iterable[int]) -> None:
    """Calls `compile_for(chip, cases)` of a module of tests; skips the test where libtpu is missing."""
    need_libtpu()
    done = subprocess.run(
        [sys.executable, "-c", f"from {module} import compile_for; compile_for({chip!r}, {cases!r})"],
        env=tpu_schedule.compiler_environment(chip),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
