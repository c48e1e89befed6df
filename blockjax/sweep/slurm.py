"""Sweeps on a Slurm cluster: one array job, through submitit."""

from __future__ import annotations

import json
import pathlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import submitit
from submitit.core.utils import FailedJobError
from submitit.helpers import CommandFunction, DelayedSubmission

from blockjax.errors import UsageError

if TYPE_CHECKING:  # every task imports this file to find `Train`; it does not need JAX
    from blockjax.sweep.plan import Plan, PlannedRun

# What --slurm= takes, each with an example: parameters of submitit.AutoExecutor, then those of sbatch.
SHARED = dict(
    name="blockjax", timeout_min=600, mem_gb=64.0, nodes=1, tasks_per_node=8, cpus_per_task=8, gpus_per_node=8
)
SBATCH = dict(
    partition="gpu",
    account="name",
    qos="name",
    constraint="h100",
    exclude="node1",
    nodelist="node1",
    gres="gpu:8",
    exclusive=True,
    comment="words",
    dependency="afterok:1",
    mail_type="END",
    mail_user="address",
    mem_per_gpu="64GB",
    mem_per_cpu="4GB",
    signal_delay_s=90,
    setup=["module load cuda"],  # lines before each run; repeat the option for several
)
OPTIONS = SHARED | SBATCH


class Train(CommandFunction):
    """A training command. After a timeout or preemption Slurm requeues it, and it goes on."""

    def checkpoint(self) -> DelayedSubmission:
        """What submitit is to start again: the same command."""
        return DelayedSubmission(self)


def check(options: Mapping, folder: str) -> int:
    """Checks options from `parse_options`.

    Returns:
      Processes of each run.

    Raises:
      UsageError: no time limit, tasks that JAX cannot give GPUs to, or a folder in a bucket.
    """
    if "timeout_min" not in options:
        raise UsageError("Slurm needs a time limit for each run: --slurm=timeout_min=MINUTES.")
    if "://" in folder:
        raise UsageError(f"--sweep={folder}: with Slurm, name a folder on a disk that all nodes share.")
    per_node, gpus = options.get("tasks_per_node", 1), options.get("gpus_per_node")
    tasks = options.get("nodes", 1) * per_node
    if tasks > 1 and gpus is not None and per_node != gpus:
        raise UsageError(
            f"tasks_per_node={per_node}, gpus_per_node={gpus}: under Slurm, JAX gives each of several "
            f"processes one GPU; add --slurm=tasks_per_node={gpus}."
        )
    return tasks


def describe(options: Mapping, commands: Mapping[str, Sequence[str]], jobs: int | None) -> list[str]:
    """What `submit` would submit, in lines: the parameters and a command for each array index."""
    values = options | {"array_parallelism": jobs or len(commands)}
    lines = [f"Array job of {len(commands)}: {_words(values)}"]
    return lines + [f"{i}  {shlex.join(words)}" for i, words in enumerate(commands.values())]


def submit(
    plan: Plan,
    runs: Sequence[PlannedRun],
    options: Mapping,
    *,
    script: str,
    jobs: int | None,
    say: Callable[[str], None],
    dry_run: bool = False,
    cluster: str = "slurm",
) -> list[submitit.Job]:
    """Submits runs as one array job; those that an earlier call submitted and that have not ended stay.

    Logs lie in `slurm/` of the sweep folder.

    Args:
      plan: the sweep.
      runs: those to train.
      options: from `parse_options`.
      script: path of `experiments/train.py`.
      jobs: runs at a time; None for all.
      say: prints a line.
      dry_run: only print.
      cluster: another executor of submitit, for tests.

    Raises:
      UsageError: options that do not fit, no Slurm here, or it refuses the job.
    """
    distributed = check(options, plan.folder) > 1
    folder = pathlib.Path(plan.folder).absolute() / "slurm"
    queued = _queued(folder, cluster, [run.name for run in runs])
    runs = [run for run in runs if run.name not in queued]
    commands = {run.name: plan.command(run, script, distributed=distributed) for run in runs}
    if queued:
        say(
            f"Queued or running already: {', '.join(f'{name} (job {job})' for name, job in queued.items())}. "
            f"If one is not, take it out of {folder / 'jobs.json'}."
        )
    if not runs:
        return []
    if dry_run:
        for line in describe(options, commands, jobs):
            say(line)
        return []
    executor = _executor(folder, options, jobs or len(runs), cluster)
    try:
        submitted = executor.submit_array([Train(words) for words in commands.values()])
    except FailedJobError as error:
        raise UsageError(f"Slurm takes no job with {_words(options)}: {error}") from error
    _write(folder, _read(folder) | {run.name: job.job_id for run, job in zip(runs, submitted, strict=True)})
    for run, job in zip(runs, submitted, strict=True):
        say(f"{run.name}: job {job.job_id}, {job.paths.stdout}")
    return submitted


def _words(options: Mapping) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())


def _executor(folder: pathlib.Path, options: Mapping, at_once: int, cluster: str) -> submitit.AutoExecutor:
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster)
    except RuntimeError as error:
        raise UsageError(f"There is no Slurm here ({error}); start the sweep on a login node.") from error
    parameters = {key if key in SHARED else f"slurm_{key}": value for key, value in options.items()}
    executor.update_parameters(**parameters, slurm_array_parallelism=at_once)
    return executor


def _queued(folder: pathlib.Path, cluster: str, names: Sequence[str]) -> dict[str, str]:
    job = {"slurm": submitit.SlurmJob, "local": submitit.LocalJob}[cluster]
    known = {name: number for name, number in _read(folder).items() if name in names}
    return {name: number for name, number in known.items() if not job(folder, number).done()}


def _read(folder: pathlib.Path) -> dict[str, str]:
    file = folder / "jobs.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _write(folder: pathlib.Path, jobs: dict[str, str]) -> None:
    (folder / "jobs.json").write_text(json.dumps(jobs, indent=2))
