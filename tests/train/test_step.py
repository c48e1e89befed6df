import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from blockjax.models import Transformer
from blockjax.train import step
from blockjax.train.state import init_state
from blockjax.train.step import make_eval_step, make_train_step
from tests.models.tiny import tiny_config

B, T, V = 8, 32, 40
Z_LOSS = 0.01
CONFIG = tiny_config(vocab_size=V, pattern="8,full")


@pytest.fixture(scope="module")
def model():
    return Transformer(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def batch():
    """Rows with 4, 8, .. 32 targets; what is left is padding."""
    draw = np.random.default_rng(0)
    length = 4 * np.arange(1, B + 1)[:, None]
    real = np.arange(T) < length
    whole = dict(
        tokens=draw.integers(0, V, (B, T)),
        targets=np.where(real, draw.integers(0, V, (B, T)), -1),
        segment_ids=np.where(real, 0, -1),
        positions=np.where(real, np.arange(T), 0),
    )
    return {key: jnp.asarray(value, jnp.int32) for key, value in whole.items()}


@pytest.fixture(scope="module")
def gradient_step(model):
    """`gradient_step(batch, accumulate)` gives gradients and metrics."""
    optimizer = optax.sgd(1.0)  # subtracts the gradient
    state = init_state(model, optimizer)

    @functools.cache
    def compiled(accumulate):
        options = dict(z_loss=Z_LOSS, accumulate=accumulate)
        return jax.jit(make_train_step(nnx.graphdef(model), optimizer, **options))

    def run(batch, accumulate=1):
        after, metrics = compiled(accumulate)(state, batch)
        assert int(after.step) == 1
        return jax.tree.map(jnp.subtract, state.params, after.params), metrics

    return run


@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.sample("2")
def test_microbatches_with_unequal_targets_equal_one_batch(gradient_step, batch, accumulate):
    grads, metrics = gradient_step(batch)
    parts, part_metrics = gradient_step(batch, accumulate)
    for key, value in metrics.items():
        np.testing.assert_allclose(part_metrics[key], value, rtol=1e-6, err_msg=key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), parts, grads)


def test_a_mean_of_means_would_differ(gradient_step, batch):
    _, whole = gradient_step(batch, 2)
    only = lambda rows: jnp.where(rows[:, None], batch["targets"], -1)  # noqa: E731
    even = jnp.arange(B) % 2 == 0
    halves = [gradient_step(batch | {"targets": only(rows)})[1]["loss"] for rows in (even, ~even)]
    assert abs(np.mean(halves) - whole["loss"]) > 1e-4


def test_the_loss_is_a_mean_over_targets(model, gradient_step, batch):
    logits = np.float64(
        model(batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
    )
    lse = np.log(np.exp(logits).sum(-1))
    targets = np.asarray(batch["targets"])
    nats = lse - np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
    _, metrics = gradient_step(batch)
    np.testing.assert_allclose(metrics["loss"], nats[targets >= 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["z_loss"], Z_LOSS * (lse[targets >= 0] ** 2).mean(), rtol=1e-5)
    assert metrics["target_tokens"] == 4 * 36


def test_a_batch_of_padding_changes_nothing(gradient_step, batch):
    padding = jnp.full((B, T), -1, jnp.int32)
    nothing = batch | {"targets": padding, "segment_ids": padding}
    grads, metrics = gradient_step(nothing)
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


def evaluate(graph, params, batch):
    more = {"target_bytes": jnp.arange(8.0), "offsets": batch["positions"]}
    return jax.jit(make_eval_step(graph, longest=T))(params, 0, batch | more, None)


def test_evaluation_with_uniform_logits(model, batch):
    graph, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    params["head"] = jnp.zeros_like(params["head"])
    sums, _ = evaluate(graph, params, batch)
    np.testing.assert_allclose(sums["nats"], 144 * np.log(V), rtol=1e-6)
    assert (sums["tokens"], sums["bytes"]) == (144, 28)


def test_evaluation_by_position(model, batch, monkeypatch):
    """Groups 0..7, 8..15, 16..31; a row has as many targets as its length."""
    monkeypatch.setattr(step, "FIRST_EDGE", 8)
    graph, params = nnx.split(model)
    sums, _ = evaluate(graph, params, batch)
    lengths = 4 * np.arange(1, B + 1)
    expected = [np.clip(lengths - a, 0, b - a).sum() for a, b in ((0, 8), (8, 16), (16, 32))]
    np.testing.assert_array_equal(sums["tokens"], expected)
    targets, logits = np.asarray(batch["targets"]), np.float64(model(batch["tokens"]))
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None] % V, -1)[..., 0]
    for got, (a, b) in zip(sums["nats"], ((0, 8), (8, 16), (16, 32)), strict=True):
        inside = (targets >= 0) & (np.arange(T) >= a) & (np.arange(T) < b)
        np.testing.assert_allclose(got, nats[inside].sum(), rtol=1e-5)
