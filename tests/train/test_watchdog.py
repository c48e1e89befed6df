"""What hangs is named, with the stacks of all threads; clocks are set by hand."""

import threading
import time
import types

import pytest

from blockjax.train import hosts, watchdog
from blockjax.train.endings import Hung
from blockjax.train.watchdog import Watchdog


@pytest.fixture
def clock():
    return [0.0]


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_innermost_place_that_is_late(clock, tmp_path):
    dog = Watchdog(10.0, tmp_path, clock=lambda: clock[0])
    assert dog.late() is None
    with dog("outer"):
        clock[0] = 5.0
        with dog("inner"):
            clock[0] = 9.0
            assert dog.late() is None
            clock[0] = 10.0
            assert dog.late() == "outer"
            clock[0] = 15.0
            assert dog.late() == "inner"
        assert dog.late() == "outer"
    assert dog.late() is None


def test_an_error_ends_the_watch(clock, tmp_path):
    dog = Watchdog(1.0, tmp_path, clock=lambda: clock[0])
    with pytest.raises(ZeroDivisionError), dog("division"):
        raise ZeroDivisionError
    clock[0] = 5.0
    assert dog.late() is None


def test_the_process_ends_with_stacks_and_the_place(tmp_path, capfd):
    left = []
    stuck = threading.Event()

    def in_a_thread_of_its_own():
        stuck.wait(30)

    thread = threading.Thread(target=in_a_thread_of_its_own)
    thread.start()
    with Watchdog(0.1, tmp_path, leave=left.append) as dog, dog("the loader, batch 12"):
        wait_for(lambda: left)
    stuck.set()
    thread.join()
    assert left == [Hung.exit_code]
    for text in (capfd.readouterr().err, (tmp_path / "hang-process-0.txt").read_text()):
        assert "hangs: the loader, batch 12 took more than 0.1 s" in text
        assert "in_a_thread_of_its_own" in text
        assert "test_the_process_ends_with_stacks_and_the_place" in text


def test_without_a_limit_nothing_is_watched(clock, tmp_path):
    with Watchdog(0.0, tmp_path, clock=lambda: clock[0], leave=lambda _: pytest.fail()) as dog, dog("x"):
        clock[0] = 1e9
        assert not [t for t in threading.enumerate() if t.name == "watchdog"]


def test_it_ends_with_its_run(tmp_path):
    with Watchdog(5.0, tmp_path):
        assert [t for t in threading.enumerate() if t.name == "watchdog"]
    assert not [t for t in threading.enumerate() if t.name == "watchdog"]


class Client:
    """JAX's coordination service, of which the second of two processes never comes."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]

    def wait_at_barrier(self, key, milliseconds):
        import jax

        assert milliseconds == 5000
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: ...")


@pytest.fixture
def two(monkeypatch):
    client = Client()
    monkeypatch.setattr(hosts, "_client", lambda: client)
    two = types.SimpleNamespace(process_count=lambda: 2, process_index=lambda: 0, errors=hosts.jax.errors)
    monkeypatch.setattr(hosts, "jax", two)
    monkeypatch.setattr(watchdog, "jax", two)
    monkeypatch.setattr(hosts, "GATHER_SECONDS", 0.0)
    client.key_value_set("blockjax/host/1", "slow-host")
    return client


def test_a_barrier_names_who_did_not_come(two):
    with pytest.raises(Hung) as error:
        hosts.barrier("the data are prepared", 5.0)
    assert "'the data are prepared'" in str(error.value)
    assert "process 1 (slow-host) did not come within 5 s" in str(error.value)
    assert "process 0" not in str(error.value)


def test_where_the_others_hang_is_named(two, tmp_path, capfd):
    two.key_value_set("blockjax/place/1", "the loader, batch 12")
    left = []
    with Watchdog(0.1, tmp_path, leave=left.append) as dog, dog("step 12"):
        wait_for(lambda: left)
    assert "Process 1 (slow-host): the loader, batch 12" in capfd.readouterr().err
    assert two.values["blockjax/place/0"] == "step 12"
