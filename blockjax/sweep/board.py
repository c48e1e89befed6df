"""What a local sweep shows: a bar for each run under way and one for all, or plain lines."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LINE_SECONDS = 60.0  # between two lines about one run, where there is no terminal


class Board:
    """Progress of runs: bars on a terminal, plain lines elsewhere. A context manager.

    Args:
      console: where to print.
      steps: how many every run is to make, by name.
      before: how many each has made already.
    """

    def __init__(self, console: Console, steps: Mapping[str, int], before: Mapping[str, int]):
        self._console, self._steps, self._before = console, steps, before
        self._at = dict(before)
        self._started: dict[str, float] = {}
        self._said: dict[str, float] = {}
        self._ended: set[str] = set()
        self._begin = time.monotonic()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
            expand=True,
        )
        self._all = self._bars.add_task("all runs", total=sum(steps.values()), text="")
        self._tasks = {}

    def __enter__(self) -> Board:
        self._bars.start()
        return self

    def __exit__(self, *error) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """Prints a line, above the bars if there are any."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, name: str) -> None:
        """A run starts."""
        self._started[name] = self._said[name] = time.monotonic()
        self._tasks[name] = self._bars.add_task(name, total=self._steps[name], text="starts")
        if not self._console.is_terminal:
            self.say(f"{name} starts, {len(self._started)} of {len(self._steps)}.")

    def update(self, name: str, step: int, text: str) -> None:
        """A run has made `step` steps in all; `text` is what it says of itself."""
        now, self._at[name] = time.monotonic(), step
        line = f"{step}/{self._steps[name]}  {text}"
        took = clock(now - self._started[name])
        self._bars.update(self._tasks[name], completed=step, text=f"{line}  {took}")
        self._update_all()
        if not self._console.is_terminal and now - self._said[name] >= LINE_SECONDS:
            self._said[name] = now
            self.say(f"{name} {line}  {took}; all runs: {self._left()}.")

    def end(self, name: str, words: str) -> None:
        """A run has ended; `words` say how, such as `finished`."""
        self._ended.add(name)
        if words == "finished":
            self._at[name] = self._steps[name]
        self._bars.remove_task(self._tasks[name])
        self._update_all()
        took = clock(time.monotonic() - self._started[name])
        ended = f"{len(self._ended)} of {len(self._steps)} ended"
        self.say(f"{name} {words} after {took}; {ended}, {self._left()}.")

    def _update_all(self) -> None:
        done = sum(self._steps.values()) - self._to_do()
        self._bars.update(self._all, completed=done, text=self._left())

    def _to_do(self) -> int:
        return sum(max(n - self._at[name], 0) for name, n in self._steps.items() if name not in self._ended)

    def _left(self) -> str:
        # A run that goes on repeats the steps since its last checkpoint, which are not counted again.
        made = sum(max(step - self._before[name], 0) for name, step in self._at.items())
        elapsed = time.monotonic() - self._begin
        if not self._to_do():
            return f"{clock(elapsed)} in all"
        left = f"about {clock(elapsed / made * self._to_do())}" if made else "unknown time"
        return f"{clock(elapsed)} so far, {left} left"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
