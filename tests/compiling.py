"""Compiling for TPUs that are not there, in a process of its own: libtpu is loaded once, for one chip."""

import subprocess
import sys
from collections.abc import Callable, Iterable

import jax
import pytest

from blockjax.pods import libtpu
from experiments import tpu_schedule

CHIPS = [*tpu_schedule.TOPOLOGIES]


def on_each_chip(compiled: int, few: dict[str, list[int]] | None = None):
    """Parametrizes `chip` and `cases`, indices of what a module compiles.

    For each chip those of `few`, by default everything once over the chips; in `make test-all` all of them.
    """
    few = few or {chip: [*range(i, compiled, len(CHIPS))] for i, chip in enumerate(CHIPS)}
    every = [pytest.param(chip, [*range(compiled)], marks=pytest.mark.exhaustive) for chip in CHIPS]
    return pytest.mark.parametrize(
        ("chip", "cases"), [*few.items(), *every], ids=[*few, *(f"{chip}-all" for chip in CHIPS)]
    )


def compile_each(chip: str, cases: Iterable[tuple], compile_one: Callable) -> None:
    """Calls `compile_one(*case, sharding=...)`, for arrays on one chip, in a process that compiles for it."""
    mesh = tpu_schedule.one_chip(chip)
    with jax.sharding.set_mesh(mesh):
        for case in cases:
            compile_one(*case, sharding=jax.sharding.NamedSharding(mesh, jax.P()))


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
