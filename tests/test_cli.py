"""Mistakes of the user end in one sentence and exit code 2, before anything is compiled."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from absl import flags
from ml_collections import ConfigDict

from blockjax import cli
from blockjax.errors import UsageError
from blockjax.generate import Sampling
from blockjax.train import config as configs
from blockjax.train import loop
from blockjax.train.folder import RunFolder
from blockjax.train.run import open_run

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = "--config=configs/quickstart.py:runlocal"


@pytest.fixture(scope="session")
def script():
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "experiments" / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_script"] = module  # absl asks here whose flags they are
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def train(script, monkeypatch, tmp_path, capfd):
    """Runs experiments/train.py in this process with `arguments`; returns its exit code and stderr."""
    compiled = []
    listener = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(loop, "compile_step", lambda *_: pytest.fail("the training step was compiled"))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_script", *arguments])
        jax.monitoring.register_event_duration_secs_listener(listener)
        try:
            with pytest.raises(SystemExit) as stop:
                cli.run(script.main)
        finally:
            jax.monitoring.unregister_event_duration_listener(listener)
            for name in [name for name in flags.FLAGS if name.startswith("config.")]:
                delattr(flags.FLAGS, name)  # ml_collections defines them while it parses
            flags.FLAGS.unparse_flags()
            for flag in flags.FLAGS.get_key_flags_for_module("train_script"):
                flag.unparse()
        assert not compiled
        return stop.value.code, capfd.readouterr().err

    return run


def assert_refused(outcome, words):
    code, error = outcome
    assert code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    assert all(word in error for word in words), error


FLAGS = [
    ([], ["--config=configs/"]),
    (["--run=runs/x"], ["--config=configs/"]),
    (["--config.seed=1"], ["--config=configs/"]),
    (["--confg=configs/quickstart.py"], ["--confg", "'config'"]),
    (["--config=configs/quickstrat.py"], ["'configs/quickstrat.py'", "'configs/quickstart.py'"]),
    (["--config=quickstart"], ["'quickstart'", "'configs/quickstart.py'"]),
    (["--config=no/where.py"], ["'no/where.py'", "configs/"]),
    (["--config=Makefile"], ["'Makefile'", ".py"]),
    (["--config=configs"], ["'configs'"]),
    (["--config="], ["no config file"]),
    (["--config=configs/quickstart.py:300m"], ["'300m'", "'30m'"]),
    (["--config=configs/quickstart.py:runlocl=1"], ["'runlocl'", "'runlocal'"]),
    (["--config=configs/quickstart.py:runlocal=3"], ["runlocal=3", "bool"]),
    ([CONFIG, "--config.model.dept=3"], ["'model.dept'", "'model.depth'"]),
    ([CONFIG, "--config.modl.depth=3"], ["'modl.depth'", "'model.depth'"]),
    ([CONFIG, "--config.seed.x=1"], ["'seed.x'", "'seed'"]),
    ([CONFIG, "--config.model=3"], ["'model'", "section", "--config.model."]),
    ([CONFIG, "--config.model.depth=abc"], ["model.depth=abc", "int"]),
    ([CONFIG, "--config.model.depth", "abc"], ["model.depth=abc", "int"]),
    (["-config=configs/quickstart.py", "-config.model.depth=4.5"], ["model.depth=4.5", "int"]),
    ([CONFIG, "--config.optimizer.learning_rate=fast"], ["learning_rate=fast", "float"]),
    ([CONFIG, "--config.model.tied=perhaps"], ["model.tied=perhaps"]),
    ([CONFIG, "--noconfig.model.tid"], ["'model.tid'", "'model.tied'"]),
    ([CONFIG, "--run"], ["--run", "--help"]),
    ([CONFIG, "--rn=x"], ["--rn", "'run'"]),
    ([CONFIG, "x"], ["'x'", "--NAME=VALUE"]),
    ([CONFIG], ["--run=runs/NAME"]),
    ([CONFIG, "--process=0"], ["--process", "--coordinator"]),
    ([CONFIG, "--processes=two"], ["--processes=two"]),
    ([CONFIG, "--coordinator=localhost:1"], ["come together"]),
]


@pytest.mark.parametrize(("arguments", "words"), FLAGS, ids=lambda x: " ".join(x))
def test_flags_refused(train, arguments, words):
    assert_refused(train(*arguments), words)


VALUES = [
    (["--profile=3"], ["--profile=3", "10,12"]),
    (["--profile=a,b"], ["--profile=a,b", "10,12"]),
    (["--profile=19,21"], ["--profile=19,21", "run.steps=20"]),
    (["--profile=0,2"], ["--profile=0,2", "from 1"]),
    (["--config.run.steps=0"], ["run.steps=0", "at least 1"]),
    (["--config.run.steps=-5"], ["run.steps=-5", "at least 1"]),
    (["--config.run.checkpoint_every=-1"], ["run.checkpoint_every=-1"]),
    (["--config.optimizer.learning_rate=0"], ["learning_rate=0.0", "above 0"]),
    (["--config.optimizer.warmup_steps=20"], ["warmup_steps=20", "run.steps=20"]),
    (["--config.optimizer.name=mun"], ["'mun'", "'muon'"]),
    (["--config.optimizer.schedule=linear"], ["'linear'", "cosine", "stable_decay"]),
    (["--config.run.remat=all"], ["'all'", "dots", "full", "none"]),
    (["--config.data.order=steam"], ["'steam'", "'stream'"]),
    (["--config.data.batch_size=4"], ["4 sequences", "data*fsdp=8"]),
    (["--config.run.accumulate=3"], ["batch_size=8", "accumulate=3"]),
    (["--config.run.accumulate=2"], ["4 sequences", "data*fsdp=8"]),
    (["--config.model.kv_heads=3"], ["heads=4", "kv_heads=3"]),
    (["--config.model.head_dim=15"], ["head_dim=15", "even"]),
    (["--config.model.pattern=512*0"], ["'512*0'", "512*3,full"]),
    (["--config.mesh.data=3"], ["data=3", "8"]),
    (["--config.mesh.tensor=3"], ["tensor=3", "8"]),
    (["--config.mesh.data=0"], ["data=0", "at least 1"]),
    (["--config.mesh.seq=-1"], ["data=-1", "seq=-1", "at most one"]),
    (["--config.mesh.tensor=4"], ["kv_heads=2", "tensor=4"]),
    (["--config.mesh.seq=8", "--config.data.seq_len=100"], ["seq_len=100", "seq=8"]),
    (["--run=Makefile"], ["Makefile", "is a file"]),
    (["--run=Makefile/run"], ["Makefile/run", "cannot be used"]),
    (["--run=/proc/run"], ["/proc/run", "cannot be used"]),
]


@pytest.mark.parametrize(("arguments", "words"), VALUES, ids=lambda x: " ".join(x))
def test_values_refused_before_data_is_prepared(train, tmp_path, arguments, words):
    data = tmp_path / "data"
    outcome = train(CONFIG, f"--run={tmp_path / 'run'}", f"--config.run.data_dir={data}", *arguments)
    assert_refused(outcome, words)
    assert not data.exists()


CORPORA = [
    (["--config.data.source=no/where.txt"], ["no/where.txt"]),
    (["--config.data.source={tmp}/empty.txt"], ["empty.txt"]),
    (["--config.data.source={tmp}/nothing"], ["nothing"]),
    (["--config.data.source={tmp}/lines.jsonl", "--config.data.text_field=body"], ["'body'"]),
    (["--config.data.tokenizer=word"], ["'word'", "bytes", ".json", ".model"]),
    (["--config.data.tokenizer=no/where.json"], ["no/where.json"]),
    (["--config.data.tokenizer={tmp}/broken.json"], ["broken.json"]),
]


@pytest.mark.parametrize(("arguments", "words"), CORPORA, ids=lambda x: " ".join(x))
def test_corpora_and_tokenizers_refused(train, tmp_path, arguments, words):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "text.txt").write_text("A short text.\n" * 50)
    (tmp_path / "lines.jsonl").write_text(json.dumps({"text": "A short text."}) + "\n")
    outcome = train(
        CONFIG,
        f"--run={tmp_path / 'run'}",
        f"--config.run.data_dir={tmp_path / 'data'}",
        f"--config.data.source={tmp_path / 'text.txt'}",
        *(argument.format(tmp=tmp_path) for argument in arguments),
    )
    code, error = outcome
    # Preparing a corpus may say so before the tokenizer is found wanting.
    assert_refused((code, error[error.index("error: ") :]), words)


BROKEN = {
    "x = (": ["config.py", "line 1"],
    "\n1 / 0": ["config.py", "line 2", "ZeroDivisionError"],
    "import nothing_of_that_name": ["line 1", "nothing_of_that_name"],
    "x = 1": ["config.py", "no function get_config"],
    "def get_config(): return 3": ["returns a int", "ConfigDict"],
    "def get_config():\n    return {}['key']": ["line 2", "KeyError", "key"],
    "def get_config():\n    raise SystemExit(0)": ["line 2", "SystemExit"],
    "from blockjax.train.config import base_config\n"
    "def get_config():\n    c = base_config()\n    c.model.depth = 'deep'\n    return c": ["line 4", "depth"],
    "from blockjax.train.config import base_config\n"
    "def get_config():\n    c = base_config()\n    c.model.dept = 3\n    return c": [
        "'model.dept'",
        "'model.depth'",
    ],
    "from blockjax.train.config import base_config\ndef get_config():\n    return base_config('10n')": [
        "'10n'",
        "'10m'",
    ],
}


@pytest.mark.parametrize(("text", "words"), BROKEN.items(), ids=str)
def test_broken_config_files_refused(train, tmp_path, text, words):
    (tmp_path / "config.py").write_text(text)
    assert_refused(train(f"--config={tmp_path / 'config.py'}", f"--run={tmp_path / 'run'}"), words)


def test_what_is_not_a_run_is_not_opened(tmp_path):
    config = configs.runlocal(configs.base_config())
    tokenizer = {"name": "bytes", "vocab_size": 300, "digest": "of another"}
    record = dict(config=config.to_dict(), tokenizer=tokenizer, corpus=dict(name="x"))

    def refusal() -> str:
        with pytest.raises(UsageError) as error:
            open_run(str(tmp_path / "run"))
        return str(error.value)

    assert "There is no run folder" in refusal()
    assert not (tmp_path / "run").exists()
    folder = RunFolder(str(tmp_path / "run"))
    assert "run.json is missing" in refusal()
    (tmp_path / "run" / "run.json").write_text('{"config":')
    assert "is damaged" in refusal()
    folder.write_record({"config": {}})
    assert "lacks 'tokenizer'" in refusal()
    folder.write_record(record)
    assert (
        "another tokenizer" in refusal() and "vocab_size 300" in refusal() and "vocab_size 257" in refusal()
    )


@pytest.mark.parametrize("values", [dict(temperature=-1.0), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.5)])
def test_sampling_refused(values):
    (name,) = values
    with pytest.raises(UsageError, match=name):
        Sampling(**values)


def real(script: str, *arguments: str) -> subprocess.CompletedProcess:
    # One device, as most users have.
    environment = os.environ | {"XLA_FLAGS": ""}
    command = [sys.executable, f"experiments/{script}.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("train", [CONFIG, "--run=x", "--config.mesh.tensor=2"], ["tensor=2", "there are 1"]),
        ("generate", ["--run=no/where"], ["no/where"]),
        ("convert", [CONFIG, "--run=x"], ["--from_run=runs/NAME"]),
        ("generate", ["--tokens=many"], ["--tokens=many"]),
    ],
)
def test_as_a_process(script, arguments, words):
    done = real(script, *arguments)
    assert_refused((done.returncode, done.stderr), words)
    assert not done.stdout


def test_help_as_a_process():
    done = real("train", "--help", CONFIG)
    assert done.returncode == 0 and not done.stderr
    for words in ("Trains a decoder", "--profile", "--config.model.depth=4"):
        assert words in done.stdout


def test_a_config_is_passed_on_as_it_was_given(train, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "train", lambda *args, **kwargs: seen.append((args, kwargs)) or sys.exit(0))
    arguments = [
        "--config.model.depth=3",
        "--config.model.tied",
        "--config.data.source",
        "a b",
        "--profile=2,3",
    ]
    code, error = train(CONFIG, "--run=x", *arguments)
    assert (code, error) == (0, "")
    ((config, run), options) = seen[0]
    assert isinstance(config, ConfigDict) and (config.model.depth, config.model.tied) == (3, True)
    assert (config.data.source, run, options) == ("a b", "x", dict(profile=(2, 3)))
