"""A pre-norm run becomes the start of one with depth attention."""

import pathlib

import jax
import numpy as np
import pytest

from blockjax.errors import UsageError
from blockjax.parallel.mesh import make_mesh
from blockjax.train import convert as conversion
from blockjax.train import loop
from blockjax.train.convert import convert
from blockjax.train.metrics import read_metrics
from blockjax.train.run import open_run

pytestmark = pytest.mark.usefixtures("dense_attention")


@pytest.fixture(scope="module")
def base(tiny, one_device, tmp_path_factory):
    """Folder of a finished pre-norm run."""
    folder = str(tmp_path_factory.mktemp("base") / "run")
    with one_device():
        loop.train(tiny(run__steps=4), folder, quiet=True)
    return folder


@pytest.fixture
def alone(one_device, monkeypatch):
    monkeypatch.setattr(conversion, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    with one_device():
        yield


@pytest.mark.parametrize(
    ("residual", "least"), [("block_attn_res:size=3,heads=2", 1e-5), ("delta_block:size=2", 0)]
)
@pytest.mark.sample("block_attn_res*")
def test_the_same_logits_and_on_from_there(tiny, base, alone, tmp_path, residual, least):
    config = tiny(run__steps=3, model__residual=residual)
    done = convert(config, base, str(tmp_path / "new"), quiet=True)
    assert done.step == 4 and done.difference <= least < 0.1 < done.largest

    tokens = np.arange(64).reshape(2, 32) % 200
    before, start = open_run(base).model, open_run(str(tmp_path / "new"))
    assert start.step == 0
    logits = [jax.jit(lambda m: m(tokens))(model) for model in (before, start.model)]
    np.testing.assert_allclose(*logits, rtol=0, atol=least)

    run = loop.train(config, str(tmp_path / "new"), quiet=True)
    first, again = (
        next(line["train/loss"] for line in read_metrics(pathlib.Path(folder, "metrics.jsonl")))
        for folder in (base, tmp_path / "new")
    )
    assert again < first - 0.3, "the first batch was seen"
    assert run.step == 3 and np.any(run.model.depth.query[...])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(), ["'prenorm' adds nothing"]),
        (dict(model__residual="delta", model__depth=3), ["model.depth is 2 there, 3 here"]),
    ],
)
def test_refused(tiny, base, alone, tmp_path, values, words):
    with pytest.raises(UsageError) as error:
        convert(tiny(**values), base, str(tmp_path / "new"), quiet=True)
    assert all(word in str(error.value) for word in words), error.value
    with pytest.raises(UsageError, match="holds a run already"):
        convert(tiny(model__residual="delta"), base, base, quiet=True)
