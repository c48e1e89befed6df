"""Sweeps on this machine: runs as processes, some at a time."""

from __future__ import annotations

import collections
import contextlib
import pathlib
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from etils import epath
from rich.console import Console

from blockjax.errors import UsageError
from blockjax.sweep.board import Board
from blockjax.sweep.plan import Plan, PlannedRun
from blockjax.sweep.process import Process, shares, stop
from blockjax.sweep.state import LOG, RunState, read_state

POLL_SECONDS = 0.2


def train(
    plan: Plan,
    runs: Sequence[PlannedRun],
    states: Mapping[str, RunState],
    *,
    script: str,
    jobs: int = 1,
    console: Console,
) -> dict[str, list[str]]:
    """Trains runs as processes, `jobs` at a time; one that fails does not stop the others.

    Each prints to `log.txt` in its run folder. Several at a time divide the machine as
    `process.shares` says. Ctrl-C, SIGTERM and SIGHUP stop all.

    Args:
      plan: the sweep.
      runs: those to train, in this order.
      states: how far they are, by name.
      script: path of `experiments/train.py`.
      jobs: at a time.
      console: where progress is shown.

    Returns:
      Of every run that failed, in words and by name: how, and the end of its log.

    Raises:
      UsageError: the GPUs cannot be divided, or the folder cannot be written.
      KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP.
    """
    free, waiting = collections.deque(shares(jobs)), collections.deque(runs)
    active: dict[PlannedRun, Process] = {}
    failures: dict[str, list[str]] = {}
    steps, before = {r.name: r.steps for r in runs}, {r.name: states[r.name].step for r in runs}
    with _logs(plan) as logs, _stopped_by_signals(), Board(console, steps, before) as board:

        def end(run: PlannedRun, words: str, lines: Sequence[str] = ()) -> None:
            board.end(run.name, words)
            if words != "finished":
                failures[run.name] = [words, *lines]

        try:
            while waiting or active:
                while waiting and free:
                    run = waiting.popleft()
                    board.start(run.name)
                    try:
                        active[run] = Process(plan.command(run, script), logs / run.name / LOG, free[0])
                        free.popleft()
                    except BlockingIOError:
                        end(run, "is left alone: another process trains it")
                time.sleep(POLL_SECONDS)
                for run, process in list(active.items()):
                    code = process.poll()
                    if (progress := process.progress())[0]:
                        board.update(run.name, *progress)
                    if code is not None:
                        del active[run]
                        free.append(process.share)
                        lines = process.last_lines()
                        process.close()
                        _publish(plan, run, logs)
                        end(run, _outcome(plan, run, code), lines)
        finally:
            stop(active.values())
            for run in active:
                _publish(plan, run, logs)
    return failures


def _outcome(plan: Plan, run: PlannedRun, code: int) -> str:
    if code:
        return f"failed with exit code {code}"
    return "finished" if read_state(plan, run).finished else f"ended before step {run.steps}"


@contextlib.contextmanager
def _logs(plan: Plan) -> Iterator[pathlib.Path]:
    """Where logs are written: the folder of the sweep, or a local one for a bucket's."""
    if "://" in plan.folder:
        with tempfile.TemporaryDirectory(prefix="blockjax-sweep-") as folder:
            yield pathlib.Path(folder)
        return
    folder = pathlib.Path(plan.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--sweep={folder} cannot be used: {error}.") from error
    yield folder


def _publish(plan: Plan, run: PlannedRun, logs: pathlib.Path) -> None:
    """Copies the log to a bucket, where files cannot be appended to."""
    if "://" in plan.folder:
        target = epath.Path(plan.path(run)) / LOG
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((logs / run.name / LOG).read_bytes())


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP do what Ctrl-C does."""

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
