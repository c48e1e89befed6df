"""Signals that ask a job to leave: it saves and goes; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preemption:
    """While it is entered, SIGTERM and SIGINT make `requested` true after the step that runs.

    In a single process the handlers are its own. With several, JAX's notifier owns SIGTERM and finds a step
    that all of them can reach; SIGINT is passed on to it. A Python handler for SIGTERM would take the signal
    from the notifier, so what makes a second one end the process is installed when the first was seen.

    Signals can be handled in the main thread only: elsewhere nothing changes. Those that are ignored, as
    `nohup` and a shell's background jobs do, stay ignored.
    """

    def __init__(self):
        self._several = jax.process_count() > 1
        self._before = {}
        self._seen: int | None = None

    @property
    def name(self) -> str:
        """What asked the job to leave, for people."""
        return signal.Signals(self._seen).name if self._seen else "a preemption notice"

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT,) if self._several else SIGNALS:
                before = signal.getsignal(number)
                if before is not signal.SIG_IGN and before is not None:
                    self._before[number] = before
                    signal.signal(number, self._take)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Whether to save and leave after this step; with several processes, the same in all of them."""
        if not self._several:
            return self._seen is not None
        # Called by every process after every step, as it asks for.
        if not multihost_utils.reached_preemption_sync_point(step):
            return False
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before.setdefault(number, signal.getsignal(number) or signal.SIG_DFL)
                signal.signal(number, _at_once(number, self._before[number]))
        return True

    def _take(self, number: int, _frame) -> None:
        self._seen = number
        for taken, before in self._before.items():
            signal.signal(taken, _at_once(taken, before))
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)


def _at_once(number: int, before):
    """What a second signal does. The kernel's own way works even where Python hangs, but ends a notebook."""
    interactive = hasattr(sys, "ps1") or "ipykernel" in sys.modules
    return before if interactive and number == signal.SIGINT else signal.SIG_DFL
