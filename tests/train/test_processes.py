"""experiments/train.py as it is used: stopped by signals, and in several processes."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from blockjax.train import loop
from blockjax.train.endings import Hung, Preempted
from blockjax.train.lock import lock
from blockjax.train.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 300  # seconds that the processes of a run may take together

# experiments/train.py, with a signal in place of batch STOP_AT, once the file STOP_AFTER is there, in the
# process STOP_PROCESS (-1: in all), or a loader that hangs there for signal 0; and short samples.
# STOP_PROCESS never comes to the barrier STOP_BARRIER, where others wait for 5 s, not for 20 (code 1).
SCRIPT = """
import os, runpy, signal, threading, time

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C

def end_with(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)

threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()

import jax

from blockjax.analysis import report
from blockjax.data import Evaluation, Loader
from blockjax.train import hosts

report.SAMPLE_TOKENS = 4
iterate = Loader.__iter__

def interrupted(self):
    for k, batch in enumerate(iterate(self), self._start):
        if k == int(os.environ["STOP_AT"]) and not isinstance(self._order, Evaluation):
            while not os.path.exists(os.environ["STOP_AFTER"]):
                time.sleep(0.05)
            if int(os.environ["STOP_PROCESS"]) in (-1, jax.process_index()):
                number = int(os.environ["STOP_SIGNAL"])
                os.kill(os.getpid(), number) if number else time.sleep(1000)
        yield batch

Loader.__iter__ = interrupted
barrier = hosts.barrier

def end_in(seconds):
    time.sleep(seconds)
    os._exit(1)

def with_one_late(name, *limit):
    if name == os.environ["STOP_BARRIER"]:
        if int(os.environ["STOP_PROCESS"]) == jax.process_index():
            time.sleep(1000)
        threading.Thread(target=end_in, args=(20,), daemon=True).start()
        limit = 5.0,
    barrier(name, *limit)

def asked_late():
    time.sleep(jax.process_index())  # process 0, without which none gets an answer, is the first
    return hostnames()

hostnames = hosts.hostnames
hosts.barrier, hosts.hostnames = with_one_late, asked_late
runpy.run_path("experiments/train.py", run_name="__main__")
"""


def launch(
    config, run, processes=1, devices=1, stop_at=-1, signal=0, after=ROOT, process=-1, barrier=""
) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each process."""
    file = run.parent / f"{run.name}.py"
    values = json.dumps(config.to_json())
    file.write_text(
        f"import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config(): return ConfigDict(json.loads({values}))\n"
    )
    environment = os.environ | dict(
        STOP_AT=str(stop_at),
        STOP_SIGNAL=str(signal),
        STOP_PROCESS=str(process),
        STOP_AFTER=str(after),
        STOP_BARRIER=barrier,
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
    )
    command = [sys.executable, "-c", SCRIPT, f"--config={file}", f"--run={run}"]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            command += [f"--coordinator=localhost:{free.getsockname()[1]}", f"--processes={processes}"]
    files = [
        (run.parent / f"{run.name}.{i}.out", run.parent / f"{run.name}.{i}.err") for i in range(processes)
    ]
    started = []
    try:
        for i, (out, err) in enumerate(files):
            # Not pipes: whoever fills one of them waits until it is read.
            with out.open("w") as stdout, err.open("w") as stderr:
                given = [*command, f"--process={i}"] if processes > 1 else command
                started.append(
                    subprocess.Popen(given, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr)
                )
        end = time.monotonic() + LIMIT
        for process in started:
            process.wait(end - time.monotonic())
    except subprocess.TimeoutExpired:
        said = "\n".join(f"{file.name}: {file.read_text()[-2000:]}" for pair in files for file in pair)
        pytest.fail(f"still at work after {LIMIT} s:\n{said}")
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [
        (process.returncode, out.read_text(), err.read_text())
        for process, (out, err) in zip(started, files, strict=True)
    ]


def values(run, key="train/loss") -> dict[int, float]:
    lines = [line for line in read_metrics(run / "metrics.jsonl") if key in line]
    found = {line["step"]: line[key] for line in lines}
    assert len(found) == len(lines), "a step was written twice"
    return found


@pytest.fixture(scope="module")
def config(tiny):
    # Two processes on one machine take a tenth of a second for each collective: one layer, few steps.
    config = tiny(run__steps=7, run__checkpoint_every=3, run__log_every=2, run__eval_sequences=8)
    config.model.update(depth=1, pattern="8")
    return config


@pytest.fixture(scope="module")
def alone(config, one_device, tmp_path_factory):
    """Folder of a run on one device that nothing stopped."""
    folder = tmp_path_factory.mktemp("alone")
    with one_device():
        loop.train(config, str(folder), quiet=True)
    return folder


@pytest.mark.slow
def test_ctrl_c_and_kill(config, alone, tmp_path):
    run = tmp_path / "run"
    ((code, out, error),) = launch(config, run, stop_at=2, signal=2)
    assert code == Preempted.exit_code and "Traceback" not in error and error.count("\n") == 1
    assert "Stopped by SIGINT after step 3, which is saved." in error and "starts" in out
    assert list(values(run)) == [1, 2, 3]

    ((code, _, _),) = launch(config, run, stop_at=5, signal=9)
    assert code == -9
    assert list(values(run)) == [1, 2, 3, 4]  # 5 waits for the next line

    ((code, out, error),) = launch(config, run)
    assert code == 0, error
    assert "continues after step 3" in out and f"Report: {run}/report/report.md" in out
    assert re.search(r"^step 7/7  loss \d\.\d{3}  val \d\.\d{3}  ", out, re.MULTILINE)
    assert values(run) == values(alone)
    assert values(run, "val/bits_per_byte") == values(alone, "val/bits_per_byte")


@pytest.mark.slow
def test_two_processes(config, alone, tmp_path):
    """They share a machine, prepare data at once, and train as one process does."""
    config = config.copy_and_resolve_references()
    config.mesh.update(data=4, fsdp=2)
    config.run.data_dir = str(tmp_path / "data")
    whole = tmp_path / "whole"
    outputs = launch(config, whole, processes=2, devices=4)
    assert [code for code, _, _ in outputs] == [0, 0], outputs
    # Gloo prints lines of its own.
    assert ["Report: " in out for _, out, _ in outputs] == [True, False]
    assert ["step 7/7" in out for _, out, _ in outputs] == [True, False]
    files = {"run.json", "metrics.jsonl", "checkpoints", "checkpoints.json", "report", ".lock"}
    assert {p.name for p in whole.iterdir()} == files
    assert len(values(whole)) == 7
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        np.testing.assert_allclose(
            list(values(whole, key).values()), list(values(alone, key).values()), rtol=1e-5
        )
    assert values(whole, "train/visible_pairs") == values(alone, "train/visible_pairs")


@pytest.mark.reliability
def test_two_processes_that_are_killed(config, tmp_path):
    """Continued, it is the same run bit for bit."""
    config = config.copy_and_resolve_references()
    config.mesh.update(data=4, fsdp=2)
    config.run.report = False
    whole, again = tmp_path / "whole", tmp_path / "again"
    outputs = launch(config, whole, processes=2, devices=4)
    assert [code for code, _, _ in outputs] == [0, 0], outputs
    saved = again / "checkpoints" / "3" / "manifest.json"
    outputs = launch(config, again, processes=2, devices=4, stop_at=5, signal=9, after=saved)
    assert [code for code, _, _ in outputs] == [-9, -9], outputs
    outputs = launch(config, again, processes=2, devices=4)
    assert [code for code, _, _ in outputs] == [0, 0], outputs
    assert "continues after step 3" in outputs[0][1]
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        assert values(again, key) == values(whole, key)


@pytest.fixture(scope="module")
def small(config):
    """For meshes of four devices; nothing but training."""
    config = config.copy_and_resolve_references()
    config.run.update(report=False, eval_sequences=8, keep_checkpoints=9)
    config.mesh.update(data=2, fsdp=2)
    return config


@pytest.fixture(scope="module")
def four(small, tmp_path_factory):
    """Folder of a run in one process on four devices that nothing stopped."""
    run = tmp_path_factory.mktemp("four") / "run"
    ((code, _, error),) = launch(small, run, devices=4)
    assert code == 0, error
    return run


@pytest.mark.reliability
@pytest.mark.parametrize(("number", "process"), [(15, 0), (15, 1), (2, 0), (2, 1)])
def test_a_signal_to_one_of_two_processes(small, tmp_path, number, process):
    """Both save the same step, which JAX's sync point finds, and go on as if nothing had been."""
    small = small.copy_and_resolve_references()
    small.run.steps = 12
    run, whole = tmp_path / "run", tmp_path / "whole"
    outputs = launch(small, run, processes=2, devices=2, stop_at=3, signal=number, process=process)
    assert [code for code, _, _ in outputs] == [Preempted.exit_code] * 2, outputs
    said = [re.search(r"Stopped by .* after step (\d+), which is saved", error) for _, _, error in outputs]
    assert said[0][1] == said[1][1] and 3 < int(said[0][1]) < 12
    assert (run / "checkpoints" / said[0][1] / "manifest.json").exists()
    outputs = launch(small, run, processes=2, devices=2)
    assert [code for code, _, _ in outputs] == [0, 0], outputs
    assert f"continues after step {said[0][1]}" in outputs[0][1]
    assert [code for code, _, _ in launch(small, whole, processes=2, devices=2)] == [0, 0]
    assert values(run) == values(whole)


@pytest.mark.reliability
def test_one_process_goes_on_as_two_and_back(small, four, tmp_path):
    for processes, devices in ((2, 2), (1, 4), (1, 1)):
        run = tmp_path / f"run{processes}{devices}"
        shutil.copytree(four, run)
        shutil.rmtree(run / "checkpoints" / "7")
        shutil.rmtree(run / "checkpoints" / "6")
        (run / "checkpoints.json").unlink()
        config = small.copy_and_resolve_references()
        if devices == 1:
            config.mesh.update(data=1, fsdp=1)
        outputs = launch(config, run, processes=processes, devices=devices)
        assert all(code == 0 for code, _, _ in outputs), outputs
        assert "continues after step 3" in outputs[0][1]
        for key in ("train/loss", "train/grad_norm"):
            ours, theirs = (list(values(folder, key).values()) for folder in (run, four))
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        if processes == 2:  # and back
            shutil.rmtree(run / "checkpoints" / "7")
            (run / "checkpoints.json").unlink()
            ((code, out, error),) = launch(small, run, devices=4)
            assert code == 0 and "continues after step 6" in out, error
            np.testing.assert_allclose(list(values(run).values()), list(values(four).values()), rtol=1e-5)


@pytest.mark.reliability
def test_a_loader_that_hangs_in_one_of_two_processes(small, tmp_path):
    config = small.copy_and_resolve_references()
    config.run.hang_seconds = 25.0
    run = tmp_path / "run"
    outputs = launch(config, run, processes=2, devices=2, stop_at=4, signal=0, process=1)
    assert [code for code, _, _ in outputs] == [Hung.exit_code] * 2, outputs
    assert "hangs: the loader, batch 4 took more than 25 s" in outputs[1][2]
    # The other one waits for it, and names it.
    assert re.search(r"Process 1 \(.*\): the loader, batch 4", outputs[0][2]), outputs[0][2]
    assert (run / "hang-process-1.txt").exists()


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("processes", "slow", "name"),
    [
        (2, 1, "the run folder is locked"),
        (2, 1, "run.json is written"),
        (3, 2, "the folder of checkpoints is there"),
        (2, 0, "the training step is compiled"),
    ],
)
def test_a_process_that_does_not_come_to_a_barrier(small, tmp_path, processes, slow, name):
    config = small.copy_and_resolve_references()
    config.mesh.update(data=processes, fsdp=1)
    config.data.batch_size = 4 * processes
    outputs = launch(config, tmp_path / "run", processes=processes, process=slow, barrier=name)
    host = socket.gethostname()
    words = f"At the barrier '{name}', process {slow} ({host}) did not come within 5 s"
    for index, (code, _, error) in enumerate(outputs):
        if index == slow:  # ended by JAX, whose service ended or no longer hears of the other
            assert code == -signal.SIGABRT, error
        else:
            assert code == Hung.exit_code and "Traceback" not in error, error
            assert words in error, error


@pytest.mark.reliability
def test_a_second_job_is_refused_in_all_processes(small, four):
    with (four / ".lock").open("a+") as file:
        lock(file)
        outputs = launch(small, four, processes=2, devices=2)
    assert [code for code, _, _ in outputs] == [2, 2], outputs
    assert all("Another job trains" in error for _, _, error in outputs)
