"""Ends a process that hangs, and says where it hung."""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax

from blockjax.train import hosts
from blockjax.train.endings import Hung

POLLS = 20  # looks at the clock within a limit
MAX_POLL_SECONDS = 1.0  # less than others are waited for: those that hang together are all to say so


class Watchdog:
    """Watches over what may hang: `with watchdog("batch 12"): ...` must end within the limit.

    A thread of its own looks at the clock. When something is late it writes the stacks of all threads, with
    host, process and place, to stderr and to `hang-process-N.txt`, tells the other processes of the run,
    names where each of them is, and ends the process with `Hung.exit_code`. As long as a library keeps
    Python's lock it cannot run.

    Args:
      limit: seconds; 0: nothing is watched.
      folder: where the file is written.
      clock: seconds, rising.
      leave: ends the process, given the exit code.
    """

    def __init__(
        self,
        limit: float,
        folder: pathlib.Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        leave: Callable[[int], None] = os._exit,
    ):
        self._limit, self._folder, self._clock, self._leave = limit, folder, clock, leave
        self._numbers = itertools.count()
        self._watched: dict[int, tuple[float, str]] = {}
        self._closed = threading.Event()
        self._thread = None

    @contextlib.contextmanager
    def __call__(self, place: str) -> Iterator[None]:
        number = next(self._numbers)
        self._watched[number] = self._clock() + self._limit, place
        try:
            yield
        finally:
            del self._watched[number]

    def __enter__(self) -> Watchdog:
        if self._limit:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._closed.set()
        if self._thread:
            self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(min(self._limit / POLLS, MAX_POLL_SECONDS)):
            if place := self.late():
                self._end(place)
                return

    def late(self) -> str | None:
        """The place that is late, if one is; the innermost of those entered one within the other."""
        now = self._clock()
        late = [place for _, (end, place) in sorted(self._watched.copy().items()) if end <= now]
        return late[-1] if late else None

    def _end(self, place: str) -> None:
        index = jax.process_index()
        words = f"Process {index} on {socket.gethostname()} hangs: {place} took more than {self._limit:g} s."
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"hang-process-{index}.txt").open("w") as file:
                file.write(words + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                # Before others are asked, which may hang as well.
                print(words, file=sys.stderr)
                with contextlib.suppress(ValueError, OSError):  # stderr that is no file, as in a notebook
                    faulthandler.dump_traceback(sys.stderr, all_threads=True)
                for line in self._others(place):
                    print(line, file=file)
                    print(line, file=sys.stderr, flush=True)
        finally:
            self._leave(Hung.exit_code)

    def _others(self, place: str) -> list[str]:
        if jax.process_count() == 1:
            return []
        try:
            hosts.publish_place(place)
            # The service that holds the places ends with process 0.
            time.sleep(hosts.GATHER_SECONDS * (3 if jax.process_index() == 0 else 1))
            names, places = hosts.hostnames(), hosts.places()
        except Exception as error:  # the process that gathers them may be gone
            return [f"Where the others are is not known ({type(error).__name__})."]
        return [
            f"Process {i} ({names.get(i, 'unknown host')}): {places.get(i, 'does not say that it hangs')}"
            for i in range(jax.process_count())
        ]
