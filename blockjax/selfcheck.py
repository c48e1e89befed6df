"""Checks the attention kernels of this machine against the oracle, outputs and gradients.

Command: python -m blockjax.selfcheck

For each backend that the machine runs, at every head dim and in every family of tiles: the error of each
output and gradient as a part of what is allowed, 1 being all of it. A second run must be equal bit for bit.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
from absl import flags
from rich.console import Console
from rich.progress import track
from rich.table import Table

from blockjax import cli
from blockjax.errors import UsageError
from blockjax.kernels.block_sparse_attention import check

IMPLEMENTATION = flags.DEFINE_enum("implementation", None, [*check.CHECKED], "check this one only")
QUICK = flags.DEFINE_bool("quick", False, "one pair of head dims a backend")


def main() -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    say = lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)  # noqa: E731
    cases = []
    for name in [IMPLEMENTATION.value] if IMPLEMENTATION.value else check.CHECKED:
        candidates = check.cases(name, QUICK.value)
        try:
            jax.eval_shape(check.call(candidates[0], name), *check.make(candidates[0]))
        except UsageError as error:
            if IMPLEMENTATION.value:
                raise
            say(f"{name} is skipped: {str(error).partition(': ')[2] or error}")
        else:
            cases += candidates

    # Nearly all of the time goes to compiling, which threads share.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(check.measure, cases)
        bar = track(found, "checking", len(cases), console=Console(stderr=True), transient=True)
        results = dict(zip(cases, bar, strict=True))
    console.print(table(results))
    passed = sum(result.passed for result in results.values())
    device = jax.devices()[0].device_kind
    say(f"{device}, JAX {jax.__version__}: {passed} of {len(results)} checks passed.")
    if passed < len(results):
        sys.exit(1)


def table(results: dict[check.Case, check.Result]) -> Table:
    """One line a case."""
    lines = Table(
        title="Error of each output and gradient as a part of what is allowed", title_justify="left"
    )
    for name in ("backend", "head dims", "blocks", *check.NAMES, "verdict"):
        lines.add_column(name, justify="right" if name in check.NAMES else "left")
    for case, result in results.items():
        parts = (f"{result.parts[name]:.2f}" if name in result.parts else "" for name in check.NAMES)
        faults = [f"wrong {', '.join(result.wrong)}"] if result.wrong else []
        faults += [] if result.repeats else ["two runs differ"]
        verdict = f"[red]{'; '.join(faults)}[/]" if faults else "[green]ok[/]"
        dims = f"{case.H}" if case.Hv == case.H else f"{case.H}, {case.Hv}"
        lines.add_row(case.implementation, dims, str(case.family), *parts, verdict)
    return lines


if __name__ == "__main__":
    cli.run(main)
