"""Checks the kernels of this machine against the oracle, outputs and gradients.

Command: python -m blockjax.selfcheck

For each op and each backend of it that the machine runs, at many sizes: the error of each output and gradient
as a part of what is allowed, 1 being all of it. A second run must be equal bit for bit.
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
from blockjax.kernels.block_sparse_attention import check as attention
from blockjax.kernels.depth_mix import check as depth_mix
from blockjax.kernels.linear_attention import check as linear_attention

CHECKS = {"block_sparse_attention": attention, "depth_mix": depth_mix, "linear_attention": linear_attention}
NAMES = [*dict.fromkeys(name for check in CHECKS.values() for name in check.CHECKED)]
IMPLEMENTATION = flags.DEFINE_enum("implementation", None, NAMES, "check this one only")
QUICK = flags.DEFINE_bool("quick", False, "few sizes a backend")


def main() -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    say = lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)  # noqa: E731
    jobs = []
    for op, check in CHECKS.items():
        for name in check.CHECKED:
            if IMPLEMENTATION.value not in (None, name):
                continue
            cases = check.cases(name, QUICK.value)
            try:
                jax.eval_shape(check.call(cases[0], name), *check.make(cases[0]))
            except UsageError as error:
                if IMPLEMENTATION.value:
                    raise
                say(f"{op}: {name} is skipped: {str(error).partition(': ')[2] or error}")
            else:
                jobs += [(op, case) for case in cases]

    # Nearly all of the time goes to compiling, which threads share.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda job: CHECKS[job[0]].measure(job[1]), jobs)
        bar = track(found, "checking", len(jobs), console=Console(stderr=True), transient=True)
        results = dict(zip(jobs, bar, strict=True))
    for op in dict.fromkeys(op for op, _ in jobs):
        console.print(table(op, {case: result for (of, case), result in results.items() if of == op}))
    passed = sum(result.passed for result in results.values())
    device = jax.devices()[0].device_kind
    say(f"{device}, JAX {jax.__version__}: {passed} of {len(results)} checks passed.")
    if passed < len(results):
        sys.exit(1)


def table(op: str, results: dict) -> Table:
    """One line a case."""
    check = CHECKS[op]
    title = f"{op}: error of each output and gradient as a part of what is allowed"
    lines = Table(title=title, title_justify="left")
    for name in ("backend", *check.LABELS, *check.NAMES, "verdict"):
        lines.add_column(name, justify="right" if name in check.NAMES else "left")
    for case, result in results.items():
        parts = (f"{result.parts[name]:.2f}" if name in result.parts else "" for name in check.NAMES)
        faults = [f"wrong {', '.join(result.wrong)}"] if result.wrong else []
        faults += [] if result.repeats else ["two runs differ"]
        verdict = f"[red]{'; '.join(faults)}[/]" if faults else "[green]ok[/]"
        lines.add_row(case.implementation, *case.labels, *parts, verdict)
    return lines


if __name__ == "__main__":
    cli.run(main)
