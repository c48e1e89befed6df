"""One training process: its log, its share of the machine, its end."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence

from blockjax.errors import UsageError
from blockjax.train.lock import lock

TAIL_BYTES = 4000
GRACE_SECONDS = 15.0  # from an interrupt to a kill: a checkpoint may have to be written
STEP = re.compile(r"^step (\d+)/\d+  (.*?)(?:  [\d,]+ tok/s.*)?$", re.MULTILINE)


MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"


@dataclasses.dataclass(frozen=True)
class Share:
    """What one of several processes may use.

    Attributes:
      cores: CPU cores; all if empty.
      environment: variables to set.
    """

    cores: Sequence[int] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def shares(jobs: int) -> list[Share]:
    """Divides the CPU cores of this process, and the GPUs that `CUDA_VISIBLE_DEVICES` lists, by `jobs`.

    XLA starts a thread a core: without a division, every process would start one for every core. Without that
    list all processes use the same GPUs, and each gets a part of their memory, which JAX would otherwise
    reserve for the first.

    Raises:
      UsageError: the GPUs cannot be divided.
    """
    if jobs == 1:
        return [Share()]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    gpus = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if len(gpus) % jobs:
        raise UsageError(
            f"CUDA_VISIBLE_DEVICES lists {len(gpus)} GPUs, which do not divide over --jobs={jobs}; "
            "list a multiple of it."
        )

    def part(items: list, i: int) -> list:
        return items[i * len(items) // jobs : (i + 1) * len(items) // jobs]

    memory = {MEMORY: os.environ.get(MEMORY, f"{0.8 / jobs:.3f}")}
    return [
        Share(part(cores, i), {"CUDA_VISIBLE_DEVICES": ",".join(part(gpus, i))} if gpus else memory)
        for i in range(jobs)
    ]


class Process:
    """A command that runs, with what it prints at the end of a log file.

    It holds a lock on the log while it lives, also when the sweep that started it is killed.

    Args:
      command: its words.
      log: file; its folder is made.
      share: what it may use.

    Raises:
      BlockingIOError: another process holds the lock.
    """

    def __init__(self, command: Sequence[str], log: pathlib.Path, share: Share = Share()):
        self.share = share
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("a+b")
        try:
            lock(self._log)
        except BlockingIOError:
            self._log.close()
            raise
        self._log.write(f"--- {' '.join(command)}\n".encode())
        self._log.flush()
        self._begin = self._log.tell()
        self._popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | share.environment,
            start_new_session=True,  # else Ctrl-C reaches it twice
        )
        if share.cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self._popen.pid, share.cores)  # before it has other threads

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._popen.poll()

    def progress(self) -> tuple[int, str]:
        """The last step that the process reported and what it said of it; (0, "") before the first."""
        steps = STEP.findall(self._tail())
        return (int(steps[-1][0]), steps[-1][1]) if steps else (0, "")

    def last_lines(self, count: int = 3) -> list[str]:
        """How its output ends."""
        return [line for line in self._tail().splitlines() if line.strip()][-count:]

    def close(self) -> None:
        """Writes how it ended and gives the log free."""
        self._log.write(f"--- exit code {self._popen.returncode}\n".encode())
        self._log.close()

    def interrupt(self) -> None:
        """Does what Ctrl-C does."""
        # What a shell starts in the background ignores Ctrl-C and hands that down.
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        self._popen.send_signal(signal.SIGTERM if ignored else signal.SIGINT)

    def kill(self) -> None:
        """Ends it and what it started."""
        if self.poll() is None:
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        self._log.close()

    def _tail(self) -> str:
        begin = max(self._begin, os.fstat(self._log.fileno()).st_size - TAIL_BYTES)
        return os.pread(self._log.fileno(), TAIL_BYTES, begin).decode(errors="replace")


def stop(processes: Iterable[Process]) -> None:
    """Interrupts processes and kills those that live on."""
    processes = list(processes)
    try:
        for process in processes:
            process.interrupt()
        end = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < end and any(process.poll() is None for process in processes):
            time.sleep(0.05)
    finally:  # a second Ctrl-C comes here at once
        for process in processes:
            process.kill()
