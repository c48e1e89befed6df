"""Decoders with every kind of mixer, and a hybrid, learn from the embedded corpus."""

import jax
import numpy as np
import pytest
from flax import nnx

from blockjax.parallel.mesh import make_mesh
from blockjax.train import loop
from blockjax.train.metrics import read_metrics

PATTERNS = {
    "lightning": "lightning",
    "ssd": "ssd:state=8",
    "gdn": "gdn",
    "kda": "kda",
    "brt": "brt:window=16/states=4",
    "hybrid": "lightning,16",
}


@pytest.fixture
def oracles(dense_attention, monkeypatch):
    """Compile in a third of the time."""
    from blockjax.kernels.linear_attention import api, reference

    monkeypatch.setattr(api, "BACKENDS", {"reference": reference})


def entropy(tokens: np.ndarray) -> float:
    """Nats a token of the best model without context: one that knows how frequent each token is here."""
    p = np.bincount(tokens) / tokens.size
    return float(-np.sum(p[p > 0] * np.log(p[p > 0])))


@pytest.mark.usefixtures("oracles")
@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.sample("hybrid")
def test_it_learns_the_standard_library(kind, tiny, one_device, tmp_path, monkeypatch):
    """From no better than chance to clearly better than any model without context, mixers included."""
    config = tiny(
        data__source="stdlib", model__pattern=PATTERNS[kind], run__steps=60, run__eval_sequences=128
    )
    config.model.update(width=32, depth=2 if "," in PATTERNS[kind] else 1)
    config.optimizer.weight_decay = 0.0  # which would move parameters without a gradient
    seen, opened = {}, loop.open_state

    def open_state(*args):
        state, start = opened(*args)
        seen["before"] = jax.device_get(state.params)  # the first step overwrites it
        return state, start

    monkeypatch.setattr(loop, "open_state", open_state)
    with one_device():
        run = loop.train(config, str(tmp_path), quiet=True)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[0]["train/loss"] > np.log(run.model.config.vocab_size)
    evaluation = loop.open_data(config, quiet=True)[3]
    targets = np.concatenate([evaluation.batch(k)["targets"].ravel() for k in range(len(evaluation))])
    assert lines[-1]["val/loss"] < entropy(targets[targets >= 0]) - 0.2

    after = nnx.to_pure_dict(nnx.state(run.model, nnx.Param))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), jax.device_get(after), seen["before"])
    mixers = [
        (path, x) for path, x in jax.tree_util.tree_leaves_with_path(moved) if "recurrence" in str(path)
    ]
    assert len(mixers) > 5
    for path, distance in mixers:
        assert distance > 1e-3, path


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_training_with_rows_cut_over_devices(layout, tiny, tmp_path, monkeypatch):
    """From checks to metrics, along streams: losses and evaluations by position are those of one device."""
    config = tiny(model__pattern="gdn,8", data__order="stream", data__carry=True, run__layout=layout)
    config.run.update(steps=4, log_every=1, eval_every=2, inspect=True)

    def lines(name, **sizes):
        devices = jax.devices()[: int(np.prod(list(sizes.values())))]
        monkeypatch.setattr(loop, "make_mesh", lambda _: make_mesh(sizes, devices))
        loop.train(config, str(tmp_path / name), quiet=True)
        return read_metrics(tmp_path / name / "metrics.jsonl")

    found, expected = lines("cut", data=2, seq=2), lines("whole", data=1)
    compared = 0
    for line, other in zip(found, expected, strict=True):
        assert line.keys() == other.keys()
        for key in line:
            if key.startswith(("val/", "attention/", "train/loss", "train/grad_norm")):
                assert line[key] == pytest.approx(other[key], rel=1e-3), key
                compared += 1
    assert compared > 20
