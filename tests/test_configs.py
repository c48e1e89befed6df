"""Every config trains for a minute's worth of steps and writes a report."""

import os
import pathlib
import re

import jax
import numpy as np
import pytest
from PIL import Image

from blockjax.analysis import report
from blockjax.train import loop
from blockjax.train.config import load_config
from blockjax.train.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
# Arguments that change what is trained.
ARGUMENTS = {"lm": ["", "350m,muon"], "windowed": ["window=64"]}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Workers share it: preparing data holds a lock."""
    shared = tmp_path_factory.getbasetemp()
    return (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "prepared"


@pytest.fixture(autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arg"), [(name, arg) for name in CONFIGS for arg in ARGUMENTS.get(name, [""])], ids=str
)
def test_a_config_trains_and_reports(name, arg, data_dir, tmp_path):
    config = load_config(f"{ROOT}/configs/{name}.py:{','.join(filter(None, [arg, 'runlocal']))}")
    config.run.data_dir = str(data_dir)
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
    windows = {str(spec) for spec in loop.TransformerConfig(vocab_size=8, **config.model).layers()}
    assert all(f"{window}: layer" in text for window in windows)
