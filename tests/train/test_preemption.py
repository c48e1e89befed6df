"""Signals in a process of its own, without training."""

import os
import signal
import sys
import threading

import pytest

from blockjax.train import preemption
from blockjax.train.preemption import SIGNALS, Preemption


@pytest.fixture(autouse=True)
def handlers(monkeypatch):
    """Outside a notebook, whatever other tests imported; the handlers are left as they were."""
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.delattr(sys, "ps1", raising=False)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_the_second_ends(number):
    with Preemption() as leave:
        assert not leave.requested(1)
        os.kill(os.getpid(), number)
        assert leave.requested(2) and leave.name == signal.Signals(number).name
        # Whichever comes now is the kernel's matter.
        assert [signal.getsignal(n) for n in SIGNALS] == [signal.SIG_DFL] * 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_notebook_lives_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", None)
    with Preemption() as leave:
        os.kill(os.getpid(), signal.SIGINT)
        assert leave.requested(1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Preemption() as leave:
        os.kill(os.getpid(), signal.SIGINT)
        assert not leave.requested(1)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_another_thread_has_no_signals():
    seen = []

    def use():
        with Preemption() as leave:
            seen.append(leave.requested(1))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [False]


def test_several_processes_leave_sigterm_to_the_notifier(monkeypatch):
    """JAX's handler is none of Python's, and one of Python's in its place would stop its sync point."""
    reached = []
    monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        preemption.multihost_utils, "reached_preemption_sync_point", lambda step: bool(reached) and step >= 3
    )
    forwarded = []
    signal.signal(signal.SIGTERM, lambda *_: forwarded.append("to the notifier"))
    notifier = signal.getsignal(signal.SIGTERM)
    with Preemption() as leave:
        assert signal.getsignal(signal.SIGTERM) is notifier
        os.kill(os.getpid(), signal.SIGINT)
        assert forwarded == ["to the notifier"] and signal.getsignal(signal.SIGTERM) is notifier
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        reached.append(True)
        assert [leave.requested(step) for step in (1, 2)] == [False, False]
        assert signal.getsignal(signal.SIGTERM) is notifier
        assert leave.requested(3)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is notifier
