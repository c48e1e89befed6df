"""Scripts that a shell reads back as what was meant; xpk itself is a stand-in that prints its words."""

import pathlib
import shlex
import stat
import subprocess

import pytest

from blockjax.errors import UsageError
from blockjax.sweep import xpk
from blockjax.sweep.plan import collect
from blockjax.train.config import load_config

OPTIONS = {"cluster": "mine", "tpu-type": "v5litepod-16", "docker-image": "gcr.io/p/i:1"}
TEXT = """
def sweep(add, config):
    add("full", {"model.pattern": "full"}, seeds=range(2))
    add("words", {"data.text_field": "it's $HOME `x` \\"y\\""})
"""


@pytest.fixture
def plan(config_file, monkeypatch, tmp_path):
    config_file(TEXT)
    monkeypatch.chdir(tmp_path)
    return collect("config.py", "gs://bucket/a/My_sweep/", load_config("config.py"))


@pytest.fixture
def submitted(tmp_path, monkeypatch):
    """`submitted(script)` runs it and returns the words of each call of xpk."""
    program = tmp_path / "bin" / "xpk"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\n[ -e $STOP ] || printf \'%s\\0\' "$@" "|"\n')
    program.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setenv("STOP", str(tmp_path / "nowhere"))

    def run(script: pathlib.Path) -> list[list[str]]:
        for file in script.parent.glob("*.sh"):
            subprocess.run(["bash", "-n", file], check=True)
        out = subprocess.run(["bash", script], check=True, capture_output=True, text=True).stdout
        return [call.strip("\0").split("\0") for call in out.split("|")[:-1]]

    return run


def test_scripts(plan, submitted, tmp_path):
    options = OPTIONS | {"num-slices": 2, "spot": True, "env": ["A=1", "B=x y"]}
    folder = tmp_path / "a folder"
    xpk.write({"old.sh": ""}, folder)
    xpk.write(xpk.scripts(plan, plan.runs, options), folder)
    assert {file.name for file in folder.iterdir()} == {
        "all.sh",
        "full-seed0.sh",
        "full-seed1.sh",
        "words-seed0.sh",
    }
    calls = submitted(folder / "all.sh")
    assert [call[:3] for call in calls] == [["workload", "create", call[2]] for call in calls]
    assert len({call[2] for call in calls}) == 3 and calls == [
        submitted(folder / f"{run.name}.sh")[0] for run in plan.runs
    ]
    assert calls[0][3:-1] == [
        "--cluster=mine",
        "--tpu-type=v5litepod-16",
        "--docker-image=gcr.io/p/i:1",
        "--num-slices=2",
        "--spot",
        "--env=A=1",
        "--env=B=x y",
    ]
    for call, run in zip(calls, plan.runs, strict=True):
        flag, _, command = call[-1].partition("=")
        assert flag == "--command"
        words = shlex.split(command)  # as bash in the container
        assert words[:3] == ["python", "experiments/train.py", "--config=config.py"]
        assert words[3] == f"--run=gs://bucket/a/My_sweep/{run.name}" and words[-1] == "--distributed"
    assert '--config.data.text_field=it\'s $HOME `x` "y"' in words


def test_one_that_cannot_be_submitted_does_not_hold_up_the_rest(plan, submitted, tmp_path):
    xpk.write(xpk.scripts(plan, plan.runs, OPTIONS), tmp_path / "x")
    (tmp_path / "x" / "full-seed0.sh").write_text("exit 3")
    done = subprocess.run(["bash", tmp_path / "x" / "all.sh"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.count("--command=") == 2


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "sweep-full-seed0",
        "Sweep_full",
        "a.b",
        "8-layers",
        "-",
        "x" * 60,
        "x" * 40,
        "a" * 30 + "-" * 5 + "b" * 9,
    ],
)
def test_names_of_workloads(text):
    name = xpk.workload(text)
    assert xpk.NAME.fullmatch(name) and len(name) <= 40
    assert (name == text) == (text in ("a", "sweep-full-seed0", "x" * 40))


def test_names_of_workloads_differ():
    texts = ["a.b", "a-b", "a_b", "A-b", "y" * 50, "y" * 51, "8", "s-8"]
    assert len({xpk.workload(text) for text in texts}) == len(texts)


def test_dry_run_and_a_bucket(sweep, tmp_path, monkeypatch, bucket, make_run):
    """Finished runs in the bucket are left out; scripts are written on this machine."""
    monkeypatch.chdir(tmp_path)
    options = [f"{key}={value}" for key, value in OPTIONS.items()]
    arguments = dict(spec="config.py", folder="gs://bucket/runs/x", launcher="xpk", xpk=options)
    make_run("full-seed0", {12: 2.0}, folder="gs://bucket/runs/x")
    code, out = sweep(dry_run=True, **arguments)
    assert code == 0 and "1 finished, 2 to do" in out and not (tmp_path / "runs").exists()
    assert out.count("--cluster=mine") == 2 and "full-seed0.sh" not in out
    code, out = sweep(**arguments)
    assert code == 0 and "bash runs/x/xpk/all.sh" in out
    assert len(list((tmp_path / "runs" / "x" / "xpk").glob("*.sh"))) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cluster": "x"}, ["--xpk=tpu-type=", "--xpk=docker-image="]),
        ({"clustr": "x"}, ["'clustr'", "'cluster'"]),
        (OPTIONS | {"num-slices": "two"}, ["num-slices=two", "int"]),
    ],
)
def test_options_refused(sweep, options, words):
    with pytest.raises(UsageError) as error:
        sweep(
            launcher="xpk",
            xpk=[f"{key}={value}" for key, value in options.items()],
            folder="gs://b/x",
        )
    assert all(word in str(error.value) for word in words), error.value


def test_what_the_image_does_not_reach_is_refused(sweep, config_file):
    options = [f"{key}={value}" for key, value in OPTIONS.items()]
    with pytest.raises(UsageError, match=r"all hosts must reach it; .*gs://"):
        sweep(launcher="xpk", xpk=options)
    with pytest.raises(UsageError, match="the image has files of the repository only"):
        sweep(launcher="xpk", xpk=options, folder="gs://b/x")
