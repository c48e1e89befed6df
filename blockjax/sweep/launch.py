"""One call for `experiments/sweep.py`: plans a sweep, sees what is done, and hands on the rest."""

from __future__ import annotations

import pathlib
import shlex
from collections.abc import Sequence

from rich.console import Console

from blockjax.errors import UsageError
from blockjax.sweep import local, summary
from blockjax.sweep import xpk as workloads
from blockjax.sweep.options import parse_options
from blockjax.sweep.plan import Plan, PlannedRun, collect
from blockjax.sweep.state import LOG, RunState, read_states
from blockjax.train.config import ConfigDict

LAUNCHERS = ("local", "slurm", "xpk", "none")


def launch(
    spec: str,
    config: ConfigDict,
    folder: str | None,
    *,
    script: str,
    launcher: str = "local",
    jobs: int | None = None,
    only: str | None = None,
    slurm: Sequence[str] | None = None,
    xpk: Sequence[str] | None = None,
    dry_run: bool = False,
    console: Console | None = None,
) -> int:
    """Trains, submits or only summarises the runs of a sweep that are not finished.

    Args:
      spec: config file, with an optional argument after `:`; with `sweep(add, config)`, see `sweep.plan`.
      config: what it makes, with the overrides of the command line.
      folder: of the sweep.
      script: path of `experiments/train.py`.
      launcher: one of `LAUNCHERS`; `none` summarises what is there.
      jobs: runs at a time; locally 1 by default, under Slurm all.
      only: part of the names of the runs to start, or a glob.
      slurm, xpk: `key=value` words for the launcher of that name.
      dry_run: say what would be started, and start and write nothing.
      console: where to print.

    Returns:
      The exit code: 1 if a run failed.

    Raises:
      UsageError: anything about the input that cannot work, before a run starts.
    """
    console = console or Console()
    for flag, words in (("slurm", slurm), ("xpk", xpk)):
        if words and launcher != flag:
            raise UsageError(f"--{flag}={words[0]} needs --launcher={flag}, not {launcher}.")
    if jobs and launcher == "xpk":
        raise UsageError(f"--jobs={jobs}: the cluster's queue decides how many workloads run at a time.")
    plan = collect(spec, folder or "", config)
    chosen = plan.select(only)
    options = workloads.check(xpk or (), plan) if launcher == "xpk" else {}
    states = read_states(plan)
    runs = [run for run in chosen if not states[run.name].finished]

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    say(overview(plan, states, runs))
    if launcher == "xpk":
        _write_scripts(plan, runs, options, say, dry_run)
        return 0
    if launcher == "slurm":
        _submit(plan, runs, slurm or (), say, script=script, jobs=jobs, dry_run=dry_run)
        return 0
    if launcher == "none" and all(state == RunState([]) for state in states.values()):
        raise UsageError(f"There is no run of this sweep in {plan.folder}.")
    if dry_run:
        for run in runs if launcher == "local" else ():
            say(shlex.join(plan.command(run, script)))
        return 0
    failures = {}
    if launcher == "local" and runs:
        failures = local.train(plan, runs, states, script=script, jobs=jobs or 1, console=console)
        states = read_states(plan)
    path = summary.write(plan, states, console)
    for name, (words, *lines) in failures.items():
        say(f"{name} {words}; {plan.folder}/{name}/{LOG}{' ends:' if lines else ''}")
        for line in lines:
            say(f"    {line}")
    say(f"Summary: {path}")
    return 1 if failures else 0


def overview(plan: Plan, states: dict[str, RunState], runs: Sequence[PlannedRun]) -> str:
    """What the sweep consists of and what is left to do."""
    finished = sum(state.finished for state in states.values())
    return (
        f"Sweep {plan.folder}: {len(plan.runs)} runs of {len(plan.settings)} settings, {finished} finished, "
        f"{len(runs)} to do."
    )


def _submit(plan, runs, words, say, **options) -> None:
    try:
        from blockjax.sweep import slurm
    except ImportError as error:
        raise UsageError(f"--launcher=slurm: {error}. Install blockjax[slurm].") from error
    slurm.submit(plan, runs, parse_options("slurm", words, slurm.OPTIONS), say=say, **options)


def _write_scripts(plan, runs, options, say, dry_run: bool) -> None:
    files = workloads.scripts(plan, runs, options)
    if dry_run:
        for name, text in files.items():
            say(f"# {name}\n{text}")
        return
    # The bucket holds the runs; what submits them is run on this machine.
    folder = pathlib.Path("runs") / plan.folder.rpartition("/")[2] / "xpk"
    workloads.write(files, folder)
    say(f"Submit all with: bash {shlex.quote(str(folder / 'all.sh'))}")
