"""The terminal: a progress bar, plain lines, and the libraries' chatter kept away."""

from __future__ import annotations

import logging
import os
import time
import warnings

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


def quiet() -> None:
    """Silences orbax, TFDS, absl and TensorFlow below errors. Call before they are imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.ERROR)
    absl_logging.set_stderrthreshold("error")
    for name in ("orbax", "tensorflow_datasets", "etils", "jax._src.xla_bridge", "grain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="orbax")


class Display:
    """A progress bar on a terminal, plain lines elsewhere, nothing on other processes.

    Use as a context manager; `say` prints a sentence above the bar.
    """

    def __init__(self, total: int, console: Console | None = None, quiet: bool = False):
        self.console = console or Console(quiet=quiet)
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self.console.is_terminal,
            expand=True,
        )
        self._task = self._bar.add_task("", total=total)
        self._total = total
        self._first: tuple[float, int] | None = None

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Prints one sentence."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def update(self, step: int, text: str) -> None:
        """Shows that `step` steps are done, with `text` beside it."""
        self._bar.update(self._task, completed=step, description=text)
        if self.console.is_terminal:
            return
        now = time.monotonic()
        left = ""
        if self._first:
            pace = (now - self._first[0]) / (step - self._first[1])
            left = f"  {pace * (self._total - step):.0f} s left"
        self._first = self._first or (now, step)
        self.say(f"step {step}/{self._total}  {text}{left}")
