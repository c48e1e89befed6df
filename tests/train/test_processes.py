"""experiments/train.py as it is used: stopped by signals, and in several processes."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import numpy as np
import pytest

from blockjax.train import loop
from blockjax.train.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]

# experiments/train.py, with a signal in place of batch STOP_AT, once the file STOP_AFTER is there,
# and short samples.
SCRIPT = """
import os, runpy, signal, time

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C

from blockjax.analysis import report
from blockjax.data import Evaluation, Loader

report.SAMPLE_TOKENS = 4
iterate = Loader.__iter__

def interrupted(self):
    for k, batch in enumerate(iterate(self), self._start):
        if k == int(os.environ["STOP_AT"]) and not isinstance(self._order, Evaluation):
            while not os.path.exists(os.environ["STOP_AFTER"]):
                time.sleep(0.05)
            os.kill(os.getpid(), int(os.environ["STOP_SIGNAL"]))
        yield batch

Loader.__iter__ = interrupted
runpy.run_path("experiments/train.py", run_name="__main__")
"""


def launch(
    config, run, processes=1, devices=1, stop_at=-1, signal=0, after=ROOT
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
        STOP_AFTER=str(after),
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
    )
    command = [sys.executable, "-c", SCRIPT, f"--config={file}", f"--run={run}"]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            command += [f"--coordinator=localhost:{free.getsockname()[1]}", f"--processes={processes}"]
    started = [
        subprocess.Popen(
            [*command, f"--process={i}"] if processes > 1 else command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=200) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


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
    assert code == 130 and "Traceback" not in error and error.count("\n") == 1
    assert "Interrupted." in error and "starts" in out
    assert list(values(run)) == [1, 2]

    ((code, _, _),) = launch(config, run, stop_at=5, signal=9, after=run / "checkpoints" / "3")
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
    """One after the other: they share a machine, and the second reads what the first prepared."""
    config = config.copy_and_resolve_references()
    config.mesh.update(data=4, fsdp=2)
    loop.train(config, str(tmp_path / "eight"), quiet=True)

    config.run.data_dir = str(tmp_path / "data")  # prepared by both at once
    whole = tmp_path / "whole"
    outputs = launch(config, whole, processes=2, devices=4)
    assert [code for code, _, _ in outputs] == [0, 0], outputs
    # Gloo prints lines of its own.
    assert ["Report: " in out for _, out, _ in outputs] == [True, False]
    assert ["step 7/7" in out for _, out, _ in outputs] == [True, False]
    assert {p.name for p in whole.iterdir()} == {"run.json", "metrics.jsonl", "checkpoints", "report"}
    assert len(values(whole)) == 7
    for other in (tmp_path / "eight", alone):
        for key in ("train/loss", "train/grad_norm", "val/loss"):
            np.testing.assert_allclose(
                list(values(whole, key).values()), list(values(other, key).values()), rtol=1e-5
            )
        assert values(whole, "train/visible_pairs") == values(other, "train/visible_pairs")

    # Killed and continued, it is the same run bit for bit.
    config.run.report = False
    again = tmp_path / "again"
    saved = again / "checkpoints" / "3"
    outputs = launch(config, again, processes=2, devices=4, stop_at=5, signal=9, after=saved)
    assert [code for code, _, _ in outputs] == [-9, -9], outputs
    outputs = launch(config, again, processes=2, devices=4)
    assert [code for code, _, _ in outputs] == [0, 0], outputs
    assert "continues after step 3" in outputs[0][1]
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        assert values(again, key) == values(whole, key)
