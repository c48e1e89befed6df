"""What a run measures of its layers, and a locality that rises."""

import json

import jax
import numpy as np
import pytest

from blockjax.analysis import report
from blockjax.errors import UsageError
from blockjax.models import TransformerConfig
from blockjax.train import loop
from blockjax.train.config import check
from blockjax.train.metrics import read_metrics
from blockjax.train.step import make_dial
from tests.models.tiny import tiny_config

STEPS, WARMUP, T = 6, 4, 32


@pytest.fixture(scope="module")
def run(tiny, one_device, tmp_path_factory):
    """A run whose second half sees windows that narrow with depth."""
    config = tiny(run__steps=STEPS, run__inspect=True, run__eval_every=3, optimizer__locality_warmup=WARMUP)
    config.model.update(
        depth=3, pattern="full", locality="beta:1,smallest=4", residual="block_attn_res:size=4,heads=2"
    )
    with one_device():
        return loop.train(config, str(tmp_path_factory.mktemp("inspected") / "run"), quiet=True)


def lines(run, key):
    return [line for line in read_metrics(run.folder.local / "metrics.jsonl") if key in line]


def test_metrics_of_every_layer(run):
    early, last = lines(run, "attention/fidelity/layer_00")
    for line in (early, last):
        for layer in range(3):
            fidelity, bits, relative = (
                line[f"attention/{name}/layer_{layer:02}"]
                for name in ("fidelity", "entropy", "relative_entropy")
            )
            assert 0 < fidelity <= 1 and 0 < relative <= 1 and 0 < bits < 5
    # The last layer ends at a window of 4 tokens, which is the local set.
    assert last["attention/fidelity/layer_02"] == 1 > early["attention/fidelity/layer_02"]
    assert last["attention/entropy/layer_02"] <= 2 < last["attention/entropy/layer_00"]
    for s in range(6):
        assert 0 < last[f"depth/embedding_weight/sublayer_{s:03}"] <= 1
    assert last["depth/newest_weight/sublayer_000"] == 1 > last["depth/newest_weight/head"] > 0
    assert last["depth/entropy/sublayer_000"] == 0 < last["depth/entropy/head"] < np.log2(3)


def test_locality_rises_with_the_steps(run):
    pairs = [line["train/visible_pairs"] for line in lines(run, "train/visible_pairs")]
    assert pairs[0] > 1.2 * max(pairs[WARMUP:])
    executed = [line["train/mfu_executed"] / line["train/mfu_useful"] for line in lines(run, "train/loss")]
    assert min(executed) >= 1

    model = TransformerConfig(**run.config.model, vocab_size=8, context=T)
    dial = make_dial(model, WARMUP)
    np.testing.assert_array_equal(dial(0), np.zeros(3))
    np.testing.assert_allclose(jax.jit(dial)(1), [0, 0.125, 0.25])
    np.testing.assert_array_equal(dial(WARMUP + 5), [0, 0.5, 1])
    assert make_dial(model, 0)(3) is None and make_dial(tiny_config(), WARMUP)(3) is None


@pytest.mark.exhaustive
def test_the_report_shows_them(run):
    text = report.write(run).read_text()
    for name in ("locality.png", "depth_weights.png", "token_weights.png"):
        assert f"]({name})" in text and (run.folder.local / "report" / name).stat().st_size > 5000
    assert "Local keys: window 4." in text and "beta:1,smallest=4, block_attn_res:size=4,heads=2" in text


def test_a_warm_up_needs_a_locality(tiny):
    with pytest.raises(UsageError, match=r"locality_warmup=3 moves model.locality=''"):
        check(tiny(optimizer__locality_warmup=3))


def test_weights_add_to_one(run):
    found, tokens = report.look(run)
    np.testing.assert_allclose(np.nansum(found.depth_weights, axis=2), 1, rtol=1e-5)
    np.testing.assert_allclose(found.token_weights.sum(1), 1, rtol=1e-5)
    assert found.depth_weights.shape == (7, 2, 3) and found.token_weights.shape == (T, 3) and len(tokens) == T
    assert all(np.shape(x) == (3, 2) for x in found.attention)
    assert json.loads((run.folder.local / "run.json").read_text())["config"]["model"]["residual"]
