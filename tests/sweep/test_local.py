"""Runs as processes: what is started, at a time, again, and what a failure or a signal does."""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from blockjax.errors import UsageError
from blockjax.sweep import local
from blockjax.sweep.process import MEMORY, Process, Share, shares
from blockjax.train.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
NAMES = ["full-seed0", "full-seed1", "window-8-seed0", "window-8-seed1"]

# experiments/train.py without its report, which stops before step 7 until the file GO is there.
TRAIN = f"""
import os, runpy, time
from blockjax.analysis import report
from blockjax.data import Evaluation, Loader

report.write = lambda run: None
iterate = Loader.__iter__

def interrupted(self):
    for k, batch in enumerate(iterate(self), self._start):
        while k == 6 and not isinstance(self._order, Evaluation) and not os.path.exists(os.environ["GO"]):
            time.sleep(0.05)
        yield batch

Loader.__iter__ = interrupted
runpy.run_path({str(ROOT / "experiments" / "train.py")!r}, run_name="__main__")
"""

CONFIG = """
from blockjax.train.config import base_config

def get_config(arg=None):
    config = base_config()
    config.model.update(depth=1, width=16, heads=2, kv_heads=2, head_dim=8, ffn=32)
    config.model.update(pattern="8", attention_block=16, dtype="float32")
    config.data.update(source="documents.jsonl", seq_len=32, batch_size=8)
    config.optimizer.update(warmup_steps=2, learning_rate=0.02)
    config.run.update(steps=8, log_every=2, eval_every=4, eval_sequences=8, checkpoint_every=4)
    config.run.update(tensorboard=False, inspect=False)
    return config

def sweep(add, config):
    add("full", {"model.pattern": "full"}, seeds=range(2))
    add("window-8", {"model.pattern": "8"}, seeds=range(2))
"""


def stop_and_continue(root: pathlib.Path) -> list[tuple]:
    """A sweep of real runs, ended by SIGTERM at step 6 of the first two, and again to its end.

    Returns stdout, stderr, exit code and metrics by run of both.
    """
    (root / "experiments").mkdir()
    shutil.copy(ROOT / "experiments" / "sweep.py", root / "experiments")
    (root / "experiments" / "train.py").write_text(TRAIN)
    (root / "config.py").write_text(CONFIG)
    draw = random.Random(0)
    texts = [
        " ".join(draw.choices(["block", "time", "depth", "ü"], k=draw.randint(3, 90))) for _ in range(60)
    ]
    (root / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "XLA_FLAGS": "",
        "GO": str(root / "go"),
    }
    command = [sys.executable, "experiments/sweep.py", "--config=config.py", "--sweep=out", "--jobs=2"]
    outputs = []
    for attempt in range(2):
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if attempt == 0:
            waited = [root / "out" / name / "checkpoints" / "4" for name in NAMES[:2]]
            while process.poll() is None and not all(path.exists() for path in waited):
                time.sleep(0.1)
            time.sleep(0.5)
            process.terminate()
        try:
            outputs.append((*process.communicate(timeout=300), process.returncode))
        finally:
            process.kill()
        metrics = {name: read_metrics(root / "out" / name / "metrics.jsonl") for name in NAMES}
        outputs[-1] = (*outputs[-1], metrics)
        (root / "go").touch()
    return outputs


@pytest.mark.slow
@pytest.mark.reliability
def test_a_signal_stops_all_and_the_same_command_goes_on(sweep, tmp_path):
    folder, ((out, error, code, metrics), again) = tmp_path / "out", stop_and_continue(tmp_path)
    assert code == 130 and "Traceback" not in error and error.count("\n") == 1 and "goes on" in error
    assert [bool(metrics[name]) for name in NAMES] == [True, True, False, False]
    assert all(line["step"] <= 6 for lines in metrics.values() for line in lines)
    assert f"{NAMES[2]} starts" not in out and "Summary" not in out

    out, error, code, metrics = again
    assert (code, error) == (0, ""), out
    for name, pattern in zip(NAMES, ["full", "full", "8", "8"], strict=True):
        log = (folder / name / "log.txt").read_text()
        assert ("continues after step 4" in log) == (name in NAMES[:2]), log
        assert log.endswith("--- exit code 0\n")
        steps = [line["step"] for line in metrics[name] if "train/loss" in line]
        assert steps == list(range(1, 9)), "a step is missing or written twice"
        assert f"{name} finished after" in out
        config = json.loads((folder / name / "run.json").read_text())["config"]
        assert (config["model"]["pattern"], config["seed"]) == (pattern, int(name[-1]))
    assert "4 runs of 2 settings, 0 finished, 4 to do" in out and "4 of 4 ended" in out
    rows = [line.split()[:2] for line in out.splitlines() if line.startswith(("full ", "window-8 "))]
    assert rows == [["full", "2/2"], ["window-8", "2/2"]]
    assert {file.name for file in folder.glob("sweep.*")} == {"sweep.md", "sweep.json", "sweep.png"}

    # Another sweep of the same names.
    with pytest.raises(UsageError, match=r"full-seed0 belongs to another run: .*model\.width was 16, is 128"):
        sweep(folder=str(folder), script="nothing.py")


def test_what_is_finished_is_not_started(sweep, tmp_path):
    code, out = sweep()
    assert code == 0 and out.count(" finished after ") == 4
    code, out = sweep(script="nothing.py")
    assert code == 0 and "4 finished, 0 to do" in out and "starts" not in out
    shutil.rmtree(tmp_path / "sweep" / "full-seed1" / "checkpoints" / "12")
    code, out = sweep()
    assert code == 0 and re.findall(r"(\S+) starts", out) == ["full-seed1"]


def test_more_steps_are_more_to_do(sweep, tmp_path):
    sweep(only="full-seed0")
    more = "def sweep(add, config): add('full', {'run.steps': 13})"
    assert "1 to do" in sweep(more, dry_run=True)[1]


def test_a_failure_is_reported_and_stops_nothing(sweep, tmp_path):
    code, out = sweep(fault="fail in full-seed1")
    assert code == 1
    assert "full-seed1 failed with exit code 1 after" in out and out.count(" finished after ") == 3
    end = out[out.index("full-seed1 failed with exit code 1; ") :]
    assert f"{tmp_path}/sweep/full-seed1/log.txt ends:" in end
    assert "    ValueError: this run cannot be made\n" in end and "--- exit" not in end
    assert "Not finished: full-seed1, failed with exit code 1 (not started)" in out
    # The same command starts it alone, and its success is seen.
    code, out = sweep()
    assert code == 0 and re.findall(r"(\S+) starts", out) == ["full-seed1"] and "Not finished" not in out


def test_a_run_that_ends_too_early_has_failed(sweep):
    code, out = sweep(fault="no checkpoint", only="full-seed0")
    assert code == 1 and "full-seed0 ended before step 12" in out


def test_only_some(sweep):
    code, out = sweep(only="*-seed1")
    assert code == 0 and re.findall(r"(\S+) starts", out) == ["full-seed1", "window-8-seed1"]
    assert "Not finished: full-seed0, not started" in out  # the table is about all


def test_a_dry_run_starts_and_writes_nothing(sweep, tmp_path):
    code, out = sweep(dry_run=True, only="full")
    lines = out.splitlines()[1:]
    assert code == 0 and len(lines) == 2 and not (tmp_path / "sweep").exists()
    assert "--config.seed=1" in lines[1] and f"--run={tmp_path}/sweep/full-seed1" in lines[1]


def test_jobs_at_a_time(sweep, monkeypatch, tmp_path):
    alive, most = set(), []

    class Counted(Process):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            alive.add(self)

        def poll(self):
            most.append(sum(process._popen.poll() is None for process in alive))
            return super().poll()

    monkeypatch.setattr(local, "Process", Counted)
    sweep(jobs=2, fault="sleep0.5")
    assert max(most) == 2 and len(alive) == 4


def test_a_run_that_another_process_trains_is_left_alone(sweep, tmp_path):
    log = tmp_path / "sweep" / "full-seed0" / "log.txt"
    other = Process([sys.executable, "-c", "import time; time.sleep(60)"], log)
    try:
        other._log.close()  # as if the sweep that started it had been killed: the process holds the lock
        code, out = sweep()
    finally:
        other._popen.kill()
        other._popen.wait()
    assert code == 1 and "full-seed0 is left alone: another process trains it" in out
    assert out.count(" finished after ") == 3
    assert sweep()[0] == 0


@pytest.mark.parametrize(
    ("number", "background"), [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGTERM, True)]
)
def test_signals_end_the_runs(sweep, monkeypatch, number, background):
    """Also where Ctrl-C is ignored: a shell does that to what it starts in the background."""
    started = []
    monkeypatch.setattr(local, "Process", lambda *a: started.append(Process(*a)) or started[-1])
    wanted = signal.SIG_IGN if background else signal.default_int_handler
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, wanted),
        signal.SIGTERM: signal.getsignal(signal.SIGTERM),
    }
    begin = time.monotonic()
    threading.Timer(2.0, lambda: os.kill(os.getpid(), number)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            sweep(fault="sleep60", jobs=2)
        assert signal.getsignal(signal.SIGTERM) is before[signal.SIGTERM]
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    assert time.monotonic() - begin < 14
    assert len(started) == 2 and all(process._popen.returncode for process in started)


def test_processes_share_the_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert shares(1) == [Share()]
    assert [list(share.cores) for share in shares(3)] == [[0, 1], [2, 3, 4], [5, 6, 7]]
    assert shares(9)[0].cores == []
    monkeypatch.delenv(MEMORY, raising=False)
    assert all(share.environment == {MEMORY: "0.100"} for share in shares(8))
    monkeypatch.setenv(MEMORY, "0.05")
    assert shares(8)[7].environment == {MEMORY: "0.05"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert [share.environment["CUDA_VISIBLE_DEVICES"] for share in shares(2)] == ["4,5", "6,7"]
    with pytest.raises(UsageError, match=r"4 GPUs.*--jobs=3"):
        shares(3)


def test_a_share_reaches_its_process(sweep, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    sweep(jobs=2, fault="sleep0.5", only="full")
    logs = [(tmp_path / "sweep" / name / "log.txt").read_text() for name in NAMES[:2]]
    seen = [re.search(r"^began \S+ (\d+) (\d+)$", log, re.MULTILINE).groups() for log in logs]
    assert seen == [(gpu, str(len(share.cores))) for gpu, share in zip("01", shares(2), strict=True)]


def test_folders_that_cannot_be_used(sweep, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        sweep(folder=str(tmp_path / "file"))
    with pytest.raises(UsageError, match="cannot be used"):
        sweep(folder="/proc/sweep")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(slurm=["nodes=1"]), "--slurm=nodes=1 needs --launcher=slurm, not local"),
        (dict(xpk=["spot"]), "--xpk=spot needs --launcher=xpk"),
        (dict(launcher="xpk", jobs=2), "--jobs=2"),
        (dict(launcher="none"), "There is no run of this sweep"),
    ],
)
def test_flags_that_do_not_fit(sweep, options, message):
    with pytest.raises(UsageError, match=message):
        sweep(**options)


def test_the_entry_point_says_what_is_wrong_in_a_sentence(tmp_path):
    command = [
        sys.executable,
        "experiments/sweep.py",
        "--config=configs/quickstart.py",
        f"--sweep={tmp_path}/x",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "x").exists()
    assert done.stderr.startswith("error: configs/quickstart.py has no function sweep(add, config)")
