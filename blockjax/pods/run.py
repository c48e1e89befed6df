"""One call for `experiments/compile_pod.py`: compiles a config's step for a pod and says what it takes."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from blockjax.errors import UsageError
from blockjax.pods import report
from blockjax.pods.collectives import collectives
from blockjax.pods.compile import Job, Outcome, compile_job, plan_job
from blockjax.pods.program import Program
from blockjax.pods.roofline import Estimate, estimate
from blockjax.pods.topology import open_topology, parse_mesh
from blockjax.train.config import ConfigDict


def compile_pod(
    config: ConfigDict,
    topology: str | None,
    mesh: str | None = None,
    *,
    vocab_size: int | None = None,
    out: str | None = None,
    console: Console | None = None,
) -> int:
    """Compiles the training step of a config for a pod, and prints what it takes.

    Args:
      config: of the run.
      topology: such as `v5p:8x8x8`.
      mesh: such as `data:8,fsdp:64`; default: the config's.
      vocab_size: rows of the embedding; default: those for the config's tokenizer.
      out: folder for the compiled program.
      console: where to print.

    Returns:
      The exit code: 1 if the step does not fit.

    Raises:
      UsageError: anything about the input that cannot work, before compilation.
    """
    console = console or Console()
    if not topology:
        raise UsageError("No pod: name one with --topology=v5p:8x8x8, v5e:16x16, v6e:16x16 or another shape.")
    pod = open_topology(topology)
    job = plan_job(config, pod, parse_mesh(mesh) if mesh else config.mesh, vocab_size)
    report.show_job(console, job)
    outcome, judged = compile_and_judge(console, job)
    report.show_outcome(console, job, outcome)
    if judged is None:
        return 1
    found, uncounted, bounds = judged
    report.show_collectives(console, job, found, uncounted)
    report.show_estimate(console, job, bounds)
    return 0 if outcome.memory.fits else 1


def compile_and_judge(console: Console, job: Job) -> tuple[Outcome, tuple[list, int, Estimate] | None]:
    """Compiles with a clock on the screen; the outcome, its collectives, uncounted loops, roofline."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(f"compiling for {job.topology.name}, mesh {job.axes}", total=None)
        outcome = compile_job(job)
    if outcome.executable is None:
        return outcome, None
    program = Program(outcome.executable.as_text())
    found = collectives(program, job.mesh)
    return outcome, (found, program.uncounted, estimate(job, program, found))
