"""Config files with a sweep, and a training script that takes a moment."""

import io
import json
import textwrap

import pytest
from etils import epath
from rich.console import Console

from blockjax.sweep.launch import launch
from blockjax.sweep.plan import collect
from blockjax.train import manifest
from blockjax.train.config import load_config

GET_CONFIG = """
from blockjax.train.config import base_config

def get_config(arg=None):
    config = base_config()
    config.optimizer.warmup_steps = 2
    config.run.update(steps=int(arg or 12))
    return config
"""

SWEEP = """
def sweep(add, config):
    add("full", {"model.pattern": "full"}, seeds=range(2))
    add("window-8", {"model.pattern": "8", "optimizer.learning_rate": 1}, seeds=range(2))
"""

# Does what training leaves behind, in a moment. data.text_field says what goes wrong.
TRAIN = """
import json, os, pathlib, sys, time
given = dict(word[2:].partition("=")[::2] for word in sys.argv[1:])
run, fault = pathlib.Path(given["run"]), given.get("config.data.text_field", "")
time.sleep(float(fault.removeprefix("sleep")) if fault.startswith("sleep") else 0)
print("began", run.name, os.environ.get("CUDA_VISIBLE_DEVICES"), len(os.sched_getaffinity(0)))
if f"fail in {run.name}" in fault:
    print("step 2/12  loss 5.000  9 tok/s  0:00:01 left")
    raise SystemExit("ValueError: this run cannot be made")
(run / "metrics.jsonl").write_text(json.dumps({"step": 12, "val/bits_per_byte": 2.0}) + chr(10))
if fault != "no checkpoint":
    (run / "checkpoints" / "12").mkdir(parents=True)
    manifest = dict(format=1, step=12, time=0, files={}, leaves={})
    (run / "checkpoints" / "12" / "manifest.json").write_text(json.dumps(manifest))
print("step 12/12  loss 4.000  val 2.000  9 tok/s  0:00:00 left")
"""


@pytest.fixture
def config_file(tmp_path):
    """`config_file(text)` is the path of a config file that ends in `text`."""

    def write(text: str = SWEEP) -> str:
        (tmp_path / "config.py").write_text(GET_CONFIG + textwrap.dedent(text))
        return str(tmp_path / "config.py")

    return write


@pytest.fixture
def plan(config_file, tmp_path):
    """The sweep of two settings and two seeds, not started."""
    spec = config_file()
    return collect(spec, str(tmp_path / "sweep"), load_config(spec))


@pytest.fixture
def sweep(config_file, tmp_path):
    """`sweep(launcher="none")` launches it; returns the exit code and what was printed."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN)

    def run(text=SWEEP, folder=str(tmp_path / "sweep"), fault="", spec=None, **options):
        spec = spec or config_file(text)
        config = load_config(spec)
        config.data.text_field = fault or config.data.text_field
        console = Console(file=io.StringIO(), width=80)
        options = dict(script=str(script), console=console) | options
        return launch(spec, config, folder, **options), console.file.getvalue()

    return run


@pytest.fixture
def make_run(plan):
    """`make_run(name, {step: bits})` writes what a run leaves behind, with a checkpoint of its last step."""

    def make(name: str, bits: dict[int, float], speed=100.0, checkpoint=True, folder=plan.folder) -> None:
        path = epath.Path(folder) / name
        path.mkdir(parents=True)
        lines = [{"step": step, "train/tokens_per_second": speed} for step in bits]
        lines += [{"step": step, "val/bits_per_byte": value} for step, value in bits.items()]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if checkpoint:
            saved = path / "checkpoints" / str(max(bits))
            saved.mkdir(parents=True)
            manifest.write(saved, max(bits), {}, 0.0)

    return make
