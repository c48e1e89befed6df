"""One call for `experiments/compile_pod.py`: compiles a config's step for a pod and says what it takes."""

from __future__ import annotations

import dataclasses

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from blockjax.errors import UsageError
from blockjax.pods import report, saved
from blockjax.pods.collectives import Collective, collectives
from blockjax.pods.compile import Job, Outcome, compile_job, plan_job
from blockjax.pods.program import Program
from blockjax.pods.roofline import Estimate, estimate
from blockjax.pods.search import Guess, search
from blockjax.pods.topology import open_topology, parse_mesh
from blockjax.train.config import ConfigDict


def compile_pod(
    config: ConfigDict,
    topology: str | None,
    mesh: str | None = None,
    *,
    best_of: int = 0,
    vocab_size: int | None = None,
    out: str | None = None,
    console: Console | None = None,
) -> int:
    """Compiles the training step of a config for a pod, and prints what it takes.

    Args:
      config: of the run.
      topology: such as `v5p:8x8x8`.
      mesh: such as `data:8,fsdp:64`; default: the config's.
      best_of: look for the best mesh instead, and compile this many; see `search`.
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
    if best_of and mesh:
        raise UsageError(f"--mesh={mesh} and --search exclude each other: name a mesh, or look for one.")
    folder = saved.prepare(out) if out else None
    pod = open_topology(topology)
    if best_of:
        tried = compile_best(console, search(config, pod, vocab_size)[:best_of])
    else:
        job = plan_job(config, pod, parse_mesh(mesh) if mesh else config.mesh, vocab_size)
        report.show_job(console, job)
        tried = [compile_and_judge(console, job)]
    best = tried[0]
    report.show_outcome(console, best.job, best.outcome)
    if best.estimate:
        report.show_collectives(console, best.job, best.collectives, best.uncounted)
        report.show_estimate(console, best.job, best.estimate)
        if folder:
            saved.write(folder, best.job, best.outcome)
            report.say(console, f"Written to {folder}.")
    return 0 if best.outcome.memory.fits else 1


@dataclasses.dataclass(frozen=True)
class Judged:
    """A job, compiled; without collectives and estimate if it does not fit."""

    job: Job
    outcome: Outcome
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    uncounted: int = 0
    estimate: Estimate | None = None


def compile_best(console: Console, guesses: list[Guess]) -> list[Judged]:
    """Compiles what was guessed to be best; the fastest that fits first."""
    report.show_job(console, guesses[0].job, mesh="best of all meshes")
    tried = [compile_and_judge(console, guess.job) for guess in guesses]
    report.show_search(console, guesses, [(x.outcome.memory, x.estimate) for x in tried])
    return sorted(
        tried, key=lambda x: (x.outcome.memory.total, 0) if x.estimate is None else (0, x.estimate.serial)
    )


def compile_and_judge(console: Console, job: Job) -> Judged:
    """Compiles with a clock on the screen, and reads what was made."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    doing, terminal = f"Compiling for {job.topology.name}, mesh {job.axes}", console.is_terminal
    if not terminal:
        report.say(console, f"{doing}.")
    with Progress(*columns, console=console, transient=True, disable=not terminal) as progress:
        progress.add_task(doing, total=None)
        outcome = compile_job(job)
    if outcome.executable is None:
        return Judged(job, outcome)
    program = Program(outcome.executable.as_text())
    found = collectives(program, job.mesh)
    return Judged(job, outcome, found, program.uncounted, estimate(job, program, found))
