"""One job in a run folder."""

import os
import signal
import subprocess
import sys

import pytest

from blockjax.errors import UsageError
from blockjax.train import loop
from blockjax.train.folder import RunFolder
from blockjax.train.lock import NAME, held

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("a job of another process")
file.flush()
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_job_is_refused_and_harms_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "open_data", lambda *_: pytest.fail("data were prepared"))
    folder = RunFolder(str(tmp_path))
    with held(folder):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(UsageError, match=rf"Another job trains in .*{os.getpid()}.*--run"):
            loop.train(tiny(), str(tmp_path), quiet=True)
        assert sorted(tmp_path.iterdir()) == before
    with held(folder):
        pass


def test_a_killed_job_leaves_the_folder_free(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / NAME)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    folder = RunFolder(str(tmp_path))
    with pytest.raises(UsageError, match="a job of another process"), held(folder):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with held(folder):
        assert str(os.getpid()) in (tmp_path / NAME).read_text()


def test_an_error_frees_the_folder(tmp_path):
    folder = RunFolder(str(tmp_path))
    with pytest.raises(ZeroDivisionError), held(folder):
        raise ZeroDivisionError
    with held(folder):
        pass


def test_a_lock_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / NAME).mkdir()
    with pytest.raises(UsageError, match=r"\.lock"), held(RunFolder(str(tmp_path))):
        pass


def test_folders_in_buckets_are_not_locked(bucket):
    folder = RunFolder("gs://bucket/runs/a")
    with held(folder), held(folder):
        pass
