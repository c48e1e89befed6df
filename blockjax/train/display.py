"""The terminal: a progress bar, plain lines, and the libraries' chatter kept away."""

from __future__ import annotations

import logging
import os
import time
import warnings

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


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

    `say` prints a sentence, above the bar if it is shown.
    """

    def __init__(self, total: int, console: Console | None = None, quiet: bool = False):
        self.console = console or Console(quiet=quiet)
        self._bar = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            console=self.console,
            disable=not self.console.is_terminal,
            expand=True,
        )
        self._task = self._bar.add_task("", total=total)
        self._total = total

    def start(self, step: int) -> None:
        """Starts the clock and the bar, with `step` steps done already."""
        self._begin = time.monotonic(), step
        self._bar.update(self._task, completed=step)
        self._bar.start()

    def stop(self) -> None:
        """Leaves the bar as it is; what is said from now on stands below."""
        self._bar.stop()

    def say(self, text: str) -> None:
        """Prints one sentence."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def update(self, step: int, text: str) -> None:
        """Shows that `step` steps are done, with `text` beside it."""
        seconds, done = time.monotonic() - self._begin[0], step - self._begin[1]
        minutes, seconds = divmod(round(seconds / max(done, 1) * (self._total - step)), 60)
        text += f"  {minutes // 60}:{minutes % 60:02}:{seconds:02}"
        if self.console.is_terminal:
            self._bar.update(self._task, completed=step, description=text)
        else:
            self.say(f"step {step}/{self._total}  {text} left")
