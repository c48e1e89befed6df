"""Job files and the commands of docs/pods.md, with stand-ins for the programs of clusters."""

import json
import os
import pathlib
import re
import shlex
import socket
import stat
import subprocess
import sys

import pytest

from blockjax.sweep import slurm, xpk
from blockjax.train.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
JOBS, DOCS = ROOT / "experiments" / "jobs", (ROOT / "docs" / "pods.md").read_text()
KEYS = ["--config.mesh.fsdp=4", "--config.data.source=a b/*.jsonl"]
PRINT = "#!/bin/sh\nprintf '%s\\0' \"$@\"\n"
# What Slurm tells a process: two of them, one on each of two nodes.
SRUN = """#!/bin/sh
SLURM_JOB_ID=$JOB SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=2 SLURM_LOCALID=0
export SLURM_JOB_ID SLURM_NTASKS SLURM_STEP_NODELIST SLURM_STEP_NUM_NODES SLURM_LOCALID
SLURM_PROCID=0 "$@" &
SLURM_PROCID=1 "$@" && wait $!
"""
# A Python that joins the other processes, and says what it would train, in one write: it stays whole in the
# pipe that both share, where print may write the end of the line apart.
JOIN = """
import os, runpy, sys
sys.argv = sys.argv[1:]
import jax
from blockjax.train import loop
def train(config, run, profile):
    found = f"process {jax.process_index()} of {jax.process_count()} sees {jax.device_count()} devices"
    os.write(1, f"{found}, trains {config.run.steps} steps in {run}\\n".encode())
    sys.exit()
loop.train = train
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def shell(tmp_path):
    """`shell(*words, programs=dict(name=text), NAME=text)` is bash, with programs of a cluster in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def run(*words: str, programs: dict[str, str], **variables: str) -> subprocess.CompletedProcess:
        for name, text in programs.items():
            (folder / name).write_text(text)
            (folder / name).chmod(stat.S_IRWXU)
        environment = os.environ | variables | dict(PATH=f"{folder}{os.pathsep}{os.environ['PATH']}")
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        return subprocess.run(
            ["bash", *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )

    return run


@pytest.fixture
def config_file(tiny, tmp_path):
    config = tiny(run__steps=3, run__report=False, data__batch_size=4)
    config.model.update(depth=1, pattern="8")
    file = tmp_path / "config.py"
    values = json.dumps(config.to_json())
    file.write_text(
        f"import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config(): return ConfigDict(json.loads({values}))\n"
    )
    return file


def assert_trained(run: pathlib.Path, done: subprocess.CompletedProcess):
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line] == [1, 2, 3]
    assert "on 4 x cpu" in done.stdout, done.stdout  # both processes together
    assert done.stdout.count(f"Run {run} starts.") == 1  # one of them speaks


@pytest.mark.slow
@pytest.mark.reliability
def test_the_documented_commands_for_two_processes(shell, config_file, tmp_path):
    (block,) = (b for b in re.findall(r"```sh\n(.*?)```", DOCS, re.DOTALL) if "--process=1" in b)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for documented, here in (
        (".venv/bin/python", sys.executable),
        ("configs/quickstart.py:runlocal", str(config_file)),
        ("runs/two", str(tmp_path / "run")),
        ("localhost:9876", f"localhost:{port}"),
    ):
        assert block.count(documented) == 2, documented
        block = block.replace(documented, here)
    assert_trained(tmp_path / "run", shell("-ec", block, programs={}))


@pytest.mark.slow
def test_the_slurm_job(shell, config_file, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{JOIN}' \"$@\"\n")
    python.chmod(stat.S_IRWXU)
    done = shell(
        JOBS / "slurm.sh",
        programs={"srun": SRUN},
        JOB=str(os.getpid()),  # of which JAX makes the port
        PYTHON=str(python),
        CONFIG=str(config_file),
        RUN="runs/lm",
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("process")]
    assert sorted(lines) == [f"process {i} of 2 sees 4 devices, trains 3 steps in runs/lm" for i in (0, 1)]


def test_what_slurm_is_asked_for():
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", (JOBS / "slurm.sh").read_text(), re.MULTILINE)
    asked = {name.replace("-", "_"): value for name, value in lines}
    names = dict(nodes="nodes", ntasks_per_node="tasks_per_node", gpus_per_node="gpus_per_node")
    options = {ours: int(asked[name]) for name, ours in names.items()} | dict(timeout_min=int(asked["time"]))
    assert slurm.check(options, "runs/lm") == 16
    assert "requeue" in asked


def test_the_tpu_pod_job(shell):
    done = shell(
        JOBS / "tpu_pod.sh", *KEYS, programs={"gcloud": PRINT}, TPU="mine", ZONE="z", RUN="gs://bucket/lm"
    )
    words = done.stdout.strip("\0").split("\0")
    assert done.returncode == 0 and words[:5] == ["compute", "tpus", "tpu-vm", "ssh", "mine"]
    assert words[5:7] == ["--zone=z", "--worker=all"]
    flag, _, command = words[7].partition("=")
    enter, install, train = command.split(" && ")
    assert (flag, enter, install) == ("--command", "cd blockjax", "./venv.sh .venv -e '.[tpu,gcs]'")
    assert shlex.split(train) == [
        ".venv/bin/python", "experiments/train.py", "--config=configs/lm.py:1.3b", "--run=gs://bucket/lm",
        "--distributed", *KEYS,
    ]  # fmt: skip


def test_the_xpk_job(shell):
    done = shell(
        JOBS / "gke_xpk.sh",
        *KEYS,
        programs={"xpk": PRINT},
        CLUSTER="mine",
        TPU_TYPE="v5p-1024",
        IMAGE="gcr.io/p/i:1",
        RUN="gs://bucket/lm",
        CONFIG="configs/lm.py:7b",
    )
    words = done.stdout.strip("\0").split("\0")
    assert done.returncode == 0 and words[:2] == ["workload", "create"]
    given = dict(word[2:].split("=", 1) for word in words[2:])
    assert set(xpk.REQUIRED) < given.keys() <= {*xpk.OPTIONS, "workload", "command"}
    assert xpk.workload(given["workload"]) == given["workload"]
    assert shlex.split(given["command"]) == [
        xpk.PYTHON, xpk.TRAIN, "--config=configs/lm.py:7b", "--run=gs://bucket/lm", "--distributed", *KEYS
    ]  # fmt: skip


@pytest.mark.parametrize("job", sorted(path.name for path in JOBS.iterdir()))
def test_every_job_is_documented_and_says_what_it_lacks(job, shell):
    assert f"](../experiments/jobs/{job})" in DOCS
    done = shell(
        JOBS / job, programs=dict.fromkeys(("srun", "xpk", "gcloud"), "#!/bin/sh\nexit 0\n"), PYTHON=""
    )
    assert done.returncode and "unbound variable" in done.stderr
