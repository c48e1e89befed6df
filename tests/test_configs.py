"""Every config trains for a minute's worth of steps and writes a report."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from blockjax.analysis import report
from blockjax.train import loop
from blockjax.train.config import load_config
from blockjax.train.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("dense_attention")

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
# Arguments that change what is trained.
ARGUMENTS = {
    "lm": ["", "350m,muon"],
    "windowed": ["window=64"],
    "locality": ["mode=segment"],
    "depth": ["blocks=2"],
    "recurrence": ["kind=brt", "kind=hybrid"],
}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Workers share it: preparing data holds a lock."""
    shared = tmp_path_factory.getbasetemp()
    return (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "prepared"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arg"),
    [(name, arg) for name in CONFIGS for arg in ARGUMENTS.get(name, [""])],
    ids=str,
)
@pytest.mark.exhaustive
def test_a_config_trains_and_reports(name, arg, data_dir, tmp_path):
    config = load_config(f"{ROOT}/configs/{name}.py:{','.join(filter(None, [arg, 'runlocal']))}")
    config.run.data_dir = str(data_dir)
    config.run.inspect = name in ("locality", "depth")
    path = report.write(loop.train(config, str(tmp_path / name), quiet=True))

    folder = tmp_path / name
    assert str(path) == str(folder / "report" / "report.md")
    losses = [line["train/loss"] for line in read_metrics(folder / "metrics.jsonl") if "train/loss" in line]
    assert len(losses) == config.run.steps and losses[-1] < losses[0]
    assert list((folder / "checkpoints").glob(f"{config.run.steps}/*"))

    text = path.read_text()
    linked = set(re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text))
    assert linked == {file.name for file in folder.joinpath("report").glob("*.png")}
    assert {"loss.png", "learning_rate.png"} < linked
    for picture in linked:
        with Image.open(folder / "report" / picture) as image:
            assert min(image.size) > 300 and np.asarray(image.convert("L")).std() > 5, picture
    assert re.search(r"\*\*\d+\.\d{4} bits per byte\*\*", text) and "stdlib" in text
    assert text.count("Prompt: ") == text.count("````text") == 4
    model = loop.TransformerConfig(vocab_size=8, context=config.data.seq_len, **config.model)
    assert all(f"{spec}: layer" in text for spec in model.layers())


@pytest.mark.exhaustive  # tests/sweep has a sweep of small runs
@pytest.mark.parametrize(
    ("name", "only", "smaller"),
    [("locality", "beta-5*-seed0", ["model.depth=3"]), ("depth", "4-*lock*-seed0", [])],
)
def test_a_sweep_runs_at_smoke_size(name, only, smaller, data_dir, tmp_path):
    """Three settings of one seed, two steps each; the plan checks all others."""
    quick = ["run.steps=2", "run.eval_every=0", "run.inspect=False", "run.report=False", *smaller]
    # Muon takes the longest to compile.
    quick += ["optimizer.name=adamw", "optimizer.warmup_steps=1", "data.seq_len=64"]
    quick += [f"run.data_dir={data_dir}", "run.tensorboard=False"]
    command = ["experiments/sweep.py", f"--config=configs/{name}.py:small,runlocal", f"--sweep={tmp_path}"]
    done = subprocess.run(
        [sys.executable, *command, f"--only={only}", *(f"--config.{value}" for value in quick)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "sweep.md").read_text()
    runs = [path.parent for path in tmp_path.glob("*/metrics.jsonl")]
    assert len(runs) == 3
    for run in runs:
        values = read_metrics(run / "metrics.jsonl")[-1]
        assert values["step"] == 2 and 0 < values["val/bits_per_byte"] < 12
        assert f"| {run.name.removesuffix('-seed0')} | 1/3 |" in table
