"""One array job, seen through stand-ins for sbatch, srun and sacct; and run by submitit's local executor."""

import json
import os
import re
import stat

import pytest
import submitit

from blockjax.errors import UsageError
from blockjax.sweep import slurm

TIME = "timeout_min=30"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Programs of Slurm: `sbatch` keeps the file that it is given, `sacct` says that job 12_0 runs."""
    states = [f"12_{i}|{state}|n1" for i, state in enumerate(["RUNNING", "FAILED", "CANCELLED", "TIMEOUT"])]
    programs = {
        "srun": "exit 1",
        "sbatch": f'cp "$1" {tmp_path}/submitted.sh\necho "Submitted batch job 12"',
        "sacct": "\n".join(["cat <<END", "JobID|State|NodeList", *states, "END"]),
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "submitted.sh"


def test_what_is_submitted(sweep, cluster, tmp_path):
    options = [TIME, "partition=gpu", "gpus_per_node=8", "mem_gb=64", "setup=module load cuda", "setup=date"]
    code, out = sweep(launcher="slurm", slurm=options, jobs=3)
    text = cluster.read_text()
    assert code == 0
    for line in (
        "#SBATCH --array=0-3%3",
        "#SBATCH --partition=gpu",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --time=30",
        "#SBATCH --mem=64GB",
        "module load cuda\ndate",
    ):
        assert line in text, text
    jobs = json.loads((tmp_path / "sweep" / "slurm" / "jobs.json").read_text())
    assert jobs == {f"{s}-seed{i % 2}": f"12_{i}" for i, s in enumerate(["full"] * 2 + ["window-8"] * 2)}
    assert "full-seed1: job 12_1" in out
    for name, job in jobs.items():
        file = tmp_path / "sweep" / "slurm" / f"{job}_submitted.pkl"
        train = submitit.core.utils.DelayedSubmission.load(file).function
        assert f"--run={tmp_path}/sweep/{name}" in train.command and "--distributed" not in train.command
        # What a timeout submits again is the same command.
        assert train.checkpoint().function is train


def test_all_at_a_time_unless_told(sweep, cluster):
    sweep(launcher="slurm", slurm=[TIME])
    assert "#SBATCH --array=0-3%4" in cluster.read_text()


def test_what_is_finished_or_queued_is_not_submitted(sweep, cluster, tmp_path, make_run):
    sweep(launcher="slurm", slurm=[TIME])
    make_run("window-8-seed1", {12: 2.0})
    code, out = sweep(launcher="slurm", slurm=[TIME])
    assert code == 0 and "Queued or running already: full-seed0 (job 12_0)" in out
    assert "#SBATCH --array=0-1%2" in cluster.read_text()
    jobs = json.loads((tmp_path / "sweep" / "slurm" / "jobs.json").read_text())
    assert jobs["full-seed0"] == "12_0" and jobs["full-seed1"] == "12_0" and jobs["window-8-seed0"] == "12_1"


def test_dry_run(sweep, tmp_path, make_run):
    make_run("full-seed0", {12: 2.0})
    code, out = sweep(launcher="slurm", slurm=[TIME, "partition=gpu"], jobs=2, dry_run=True)
    lines = out.splitlines()[1:]
    assert code == 0 and not (tmp_path / "sweep" / "slurm").exists()
    assert lines[0] == "Array job of 3: timeout_min=30, partition=gpu, array_parallelism=2"
    assert [re.match(r"(\d)  .* --run=\S*/(\S+)", line).groups() for line in lines[1:]] == [
        ("0", "full-seed1"),
        ("1", "window-8-seed0"),
        ("2", "window-8-seed1"),
    ]


def test_several_processes_of_a_run_join(sweep):
    options = [TIME, "nodes=2", "tasks_per_node=8", "gpus_per_node=8"]
    _, out = sweep(launcher="slurm", slurm=options, dry_run=True)
    assert all(line.endswith(" --distributed") for line in out.splitlines()[2:])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["timeout_min=MINUTES"]),
        (["timeout_min=1:00"], ["timeout_min=1:00", "int"]),
        ([TIME, "partitoin=a"], ["'partitoin'", "'partition'"]),
        ([TIME, "nodes=2", "gpus_per_node=8"], ["tasks_per_node=1", "gpus_per_node=8", "tasks_per_node=8"]),
    ],
)
def test_refused(sweep, options, words):
    with pytest.raises(UsageError) as error:
        sweep(launcher="slurm", slurm=options, dry_run=True)
    assert all(word in str(error.value) for word in words), error.value


def test_no_slurm_and_no_bucket(sweep, plan):
    with pytest.raises(UsageError, match="There is no Slurm here"):
        sweep(launcher="slurm", slurm=[TIME])
    with pytest.raises(UsageError, match="all nodes share"):
        slurm.check(dict(timeout_min=5), "gs://bucket/sweep")


def test_what_slurm_refuses(sweep, cluster, tmp_path):
    (tmp_path / "bin" / "sbatch").write_text(
        "#!/bin/sh\necho 'invalid partition specified: gqu' >&2\nexit 1\n"
    )
    with pytest.raises(UsageError, match=r"partition=gqu: .*invalid partition specified: gqu"):
        sweep(launcher="slurm", slurm=[TIME, "partition=gqu"])
    assert not (tmp_path / "sweep" / "slurm" / "jobs.json").exists()


def test_jobs_run(plan, tmp_path):
    """With submitit's local executor in place of Slurm: it takes the same pickles."""
    (tmp_path / "train.py").write_text("import sys; print(sys.argv[2]); sys.exit('seed1' in sys.argv[2])")
    said = []
    jobs = slurm.submit(
        plan,
        plan.runs[:2],
        dict(timeout_min=1, partition="gpu"),
        script=str(tmp_path / "train.py"),
        jobs=None,
        say=said.append,
        cluster="local",
    )
    assert jobs[0].result() == f"--run={tmp_path}/sweep/full-seed0"
    assert "exit status 1" in str(jobs[1].exception()) and len(said) == 2


def test_every_option_is_known_to_submitit():
    assert slurm.SBATCH.keys() <= submitit.SlurmExecutor._valid_parameters()
    assert slurm.SHARED.keys() == submitit.AutoExecutor._typed_parameters().keys() - {"stderr_to_stdout"}
