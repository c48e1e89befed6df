"""A sweep that cannot work is refused before anything starts."""

import shlex
import subprocess
import sys

import pytest

from blockjax.errors import UsageError
from blockjax.sweep.options import parse_options
from blockjax.sweep.plan import collect
from blockjax.train.config import flatten, load_config


def planned(spec, folder="runs/x", **overrides):
    config = load_config(spec)
    config.update_from_flattened_dict(overrides)
    return collect(spec, folder, config)


def test_settings_times_seeds(config_file):
    plan = planned(config_file())
    names = [run.name for run in plan.runs]
    assert names == ["full-seed0", "full-seed1", "window-8-seed0", "window-8-seed1"]
    assert plan.path(plan.runs[3]) == "runs/x/window-8-seed1"
    run = plan.runs[3]
    assert (run.setting, run.seed, run.steps) == ("window-8", 1, 12)
    assert run.config.seed == 1 and run.config.model.pattern == "8"
    # An integer stands for a float.
    assert type(run.overrides["optimizer.learning_rate"]) is float


def test_what_the_command_line_sets_holds_for_every_run(config_file):
    spec = config_file() + ":20"
    plan = planned(spec, **{"model.depth": 3, "model.tied": True, "optimizer.eps": 1e-9})
    assert plan.common == {"model.depth": 3, "model.tied": True, "optimizer.eps": 1e-9}
    for run in plan.runs:
        assert (run.config.model.depth, run.config.model.tied, run.steps) == (3, True, 20)
        words = plan.command(run, "train.py", python="python")
        assert words[:4] == ["python", "train.py", f"--config={spec}", f"--run={plan.path(run)}"]
        given = {"--config.model.depth=3", "--config.model.tied=True", "--config.optimizer.eps=1e-09"}
        assert given <= set(words) and f"--config.seed={run.seed}" in words
        assert "--distributed" not in words
    assert plan.command(run, "train.py", distributed=True)[-1] == "--distributed"


def test_a_command_makes_the_config_of_its_plan(config_file, tmp_path):
    """Parsed as experiments/train.py parses it, with values of every type."""
    spec = config_file("""
        def sweep(add, config):
            add("a", {"model.tied": True, "model.pattern": "4*2, full", "data.text_field": "it's \\"x\\" = 1",
                      "optimizer.learning_rate": 1 / 3, "model.depth": 5}, seeds=[7])
    """)
    (run,) = planned(spec).runs
    script = tmp_path / "script.py"
    script.write_text(
        "from absl import flags\nfrom ml_collections import config_flags\nfrom blockjax import cli\n"
        "from blockjax.train.config import flatten\n"
        "CONFIG, RUN = config_flags.DEFINE_config_file('config'), flags.DEFINE_string('run', None, '')\n"
        "cli.run(lambda: print(repr(flatten(CONFIG.value))))\n"
    )
    # Through a shell, as --dry_run prints it.
    words = planned(spec).command(run, str(script), python=sys.executable)
    done = subprocess.run(shlex.join(words), shell=True, capture_output=True, text=True)
    assert done.stdout.strip() == repr(flatten(run.config)), done.stderr


REFUSED = {
    "x = 1": ["no function sweep(add, config)", "experiments/train.py"],
    "def sweep(add, config): pass": ["adds no runs"],
    "def sweep(add, config): add('a', 1 / 0)": ["line 9", "ZeroDivisionError"],
    "def sweep(add, config): add('a', seed=0)": ["TypeError", "seed"],
    "def sweep(add, config): add('Window 8')": ["'Window 8'", "lower-case"],
    "def sweep(add, config): add('a_b')": ["'a_b'", "lower-case"],
    "def sweep(add, config): add('../a')": ["'../a'", "lower-case"],
    "def sweep(add, config): add('a-')": ["'a-'", "begins and ends"],
    "def sweep(add, config): add(8)": ["8", "lower-case"],
    "def sweep(add, config): add('a'); add('a')": ["'a'", "twice"],
    "def sweep(add, config): add('a', seeds=[])": ["seeds=[]", "range(3)"],
    "def sweep(add, config): add('a', seeds=[1, 1])": ["seeds=[1, 1]", "different"],
    "def sweep(add, config): add('a', seeds=[0.5])": ["seeds=[0.5]", "integers"],
    "def sweep(add, config): add('a'); add('b', against='c')": ["'b'", "against='c'"],
    "def sweep(add, config): add('a', seeds=[-1])": ["'a'", "seed=-1"],
    "def sweep(add, config): add('a', {'seed': 3})": ["seed=3", "seeds=[3]"],
    "def sweep(add, config): add('a', {'model.dept': 3})": ["'a'", "'model.dept'", "'model.depth'"],
    "def sweep(add, config): add('a', {'model': 3})": ["'model'", "section", "model."],
    "def sweep(add, config): add('a', {'model.depth': 'deep'})": ["model.depth='deep'", "int"],
    "def sweep(add, config): add('a', {'model.depth': 3.0})": ["model.depth=3.0", "int"],
    "def sweep(add, config): add('a', {'model.depth': True})": ["model.depth=True", "int"],
    "def sweep(add, config): add('a', {'model.tied': 1})": ["model.tied=1", "bool"],
    "def sweep(add, config): add('a', {'model.kv_heads': 3})": ["'a'", "kv_heads=3", "heads=2"],
    "def sweep(add, config): add('a', {'optimizer.learning_rate': 0})": [
        "'a'",
        "learning_rate=0.0",
        "above 0",
    ],
    "def sweep(add, config): add('a'); add('b', {'model.depth': 4})": ["'a'", "'b'", "same run at seed 0"],
}


@pytest.mark.parametrize(("text", "words"), REFUSED.items(), ids=lambda x: str(x)[:60])
def test_refused(config_file, text, words):
    with pytest.raises(UsageError) as error:
        planned(config_file(text))
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and message.endswith((".", "?"))


def test_the_command_line_does_not_set_what_the_sweep_sets(config_file):
    with pytest.raises(UsageError, match=r"--config\.model\.pattern .*'full'"):
        planned(config_file(), **{"model.pattern": "4"})
    with pytest.raises(UsageError, match=r"--config\.seed=3"):
        planned(config_file(), seed=3)


def test_a_folder_is_needed(config_file):
    for folder in ("", "/"):
        with pytest.raises(UsageError, match="--sweep=runs/NAME"):
            planned(config_file(), folder)


@pytest.mark.parametrize(
    ("pattern", "count"), [(None, 4), ("", 4), ("full", 2), ("seed1", 2), ("w*0", 1), ("full-seed?", 2)]
)
def test_selection(config_file, pattern, count):
    assert len(planned(config_file()).select(pattern)) == count


def test_a_selection_of_nothing_is_refused(config_file):
    with pytest.raises(UsageError, match=r"--only=windov.*'window-8-seed0'"):
        planned(config_file()).select("windov-8")


def test_options():
    known = dict(partition="gpu", timeout_min=60, spot=True, env=["A=1"])
    words = ["partition=a=b", "timeout_min=5", "spot", "env=A=1", "env=B=2"]
    assert parse_options("x", words, known) == dict(
        partition="a=b", timeout_min=5, spot=True, env=["A=1", "B=2"]
    )
    refused = {
        ("partitoin=a",): "'partitoin'.*'partition'",
        ("timeout_min=long",): "--x=timeout_min=long.*int",
        ("spot", "spot"): "--x=spot is given twice",
    }
    for words, message in refused.items():
        with pytest.raises(UsageError, match=message):
            parse_options("x", words, known)
