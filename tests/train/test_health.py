"""Steps that are not finite are skipped on the device, and the run stops after so many in a row."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from blockjax.models import Transformer
from blockjax.train import loop, step
from blockjax.train.checkpoint import complete_steps
from blockjax.train.endings import Diverged
from blockjax.train.folder import RunFolder
from blockjax.train.health import FIRST, healthy, observe
from blockjax.train.log import updates
from blockjax.train.metrics import read_metrics
from blockjax.train.state import init_state
from blockjax.train.step import make_train_step
from tests.models.tiny import tiny_config

B, T, V = 2, 8, 24
POISON = 1  # the first token of a batch that is not finite


def poisoned(loss, where: str):
    """`carried_loss` whose loss, or only its gradient, is not finite for batches that begin with POISON."""

    def wrapped(graph, params, batch, *args, **kwargs):
        value, (sums, memory) = loss(graph, params, batch, *args, **kwargs)
        bad = batch["tokens"][0, 0] == POISON
        if where == "loss":
            value = value + jnp.where(bad, jnp.inf, 0.0)
            return value, (sums._replace(nats=sums.nats + jnp.where(bad, jnp.inf, 0.0)), memory)
        # sqrt has a value at 0, and no slope.
        first = jax.tree.leaves(params)[0]
        return value + jnp.sqrt(jnp.where(bad, 0 * first.ravel()[0], 1.0)), (sums, memory)

    return wrapped


@pytest.fixture(scope="module", params=["loss", "gradient"])
def run_step(request):
    """A compiled step of a tiny model, and its first state."""
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    patch.setattr(step, "carried_loss", poisoned(step.carried_loss, request.param))
    model = Transformer(tiny_config(vocab_size=V, pattern="full"), rngs=nnx.Rngs(0))
    optimizer = optax.adam(0.01)
    return jax.jit(make_train_step(nnx.graphdef(model), optimizer)), init_state(model, optimizer)


def batch(first: int) -> dict:
    draw = np.random.default_rng(first)
    tokens = draw.integers(2, V, (B, T + 1)).astype(np.int32)
    tokens[0, 0] = first
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    return dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], positions=positions, segment_ids=0 * positions)


def test_the_state_after_is_the_state_before(run_step):
    compiled, state = run_step
    good, _ = compiled(state, batch(2))
    bad, metrics = compiled(good, batch(POISON))
    again, metrics_again = compiled(bad, batch(POISON))
    for after in (bad, again):
        for a, b in zip(*(jax.tree.leaves((s.params, s.opt_state)) for s in (good, after)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert [int(s.step) for s in (good, bad, again)] == [1, 2, 3]
    assert [int(m["skipped_steps"]) for m in (metrics, metrics_again)] == [1, 2]
    assert [int(m["skipped_in_a_row"]) for m in (metrics, metrics_again)] == [1, 2]
    assert not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]))
    well, metrics = compiled(again, batch(3))
    assert (int(metrics["skipped_steps"]), int(metrics["skipped_in_a_row"])) == (2, 0)
    # As if the bad batches had not been there.
    straight, _ = compiled(good, batch(3))
    for a, b in zip(*(jax.tree.leaves((s.params, s.opt_state)) for s in (well, straight)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(well))


def test_nothing_is_decided_on_the_host(run_step):
    compiled, state = run_step
    with jax.transfer_guard_device_to_host("disallow"):
        compiled(state, batch(POISON))
    text = compiled.lower(state, batch(POISON)).as_text()
    assert not any(word in text for word in ("outfeed", "callback", "SendToHost"))


def test_spikes():
    health, seen = healthy(), []
    draw = np.random.default_rng(0)
    losses = 3 + 0.1 * draw.normal(size=60)
    losses[30], losses[40] = 6.0, np.nan
    for loss in losses:
        _, health, metrics = jax.jit(observe)(health, jnp.float32(loss), jnp.float32(1.0))
        seen.append(float(metrics["loss_spike"]))
    assert seen[:FIRST] == [0.0] * FIRST
    assert seen[30] > 15 and np.isnan(seen[40])
    rest = np.delete(seen, [*range(FIRST), 30, 40])
    assert np.abs(rest).max() < 5
    assert int(health["losses"]) == 59 and np.isfinite(float(health["loss_mean"]))


def test_the_learning_rate_counts_updates():
    none, first, later = ({"skipped_steps": s, "skipped_in_a_row": r} for s, r in ((0, 0), (1, 1), (3, 0)))
    assert [updates(7, v) for v in (none, first, later)] == [6, 6, 3]


@pytest.mark.usefixtures("dense_attention")
def test_a_run_stops_with_its_last_good_checkpoint(tiny, tmp_path, monkeypatch, one_device):
    """Batches 5 and later are not finite; the metrics of several steps come at once."""
    loss = step.carried_loss

    def spoiled(graph, params, batch, *args, **kwargs):
        value, (sums, memory) = loss(graph, params, batch, *args, **kwargs)
        factor = jnp.where(batch["tokens"][0, 0] < 0, jnp.nan, 1.0)
        return value * factor, (sums._replace(nats=sums.nats * factor), memory)

    monkeypatch.setattr(step, "carried_loss", spoiled)
    place = loop.data.Loader.batch

    def spoil(self, k):
        found = place(self, k)
        spoilt = k >= 5 and self._stop == 12
        return found | {"tokens": found["tokens"].at[0, 0].set(-1)} if spoilt else found

    monkeypatch.setattr(loop.data.Loader, "batch", spoil)
    config = tiny(run__max_skipped=3, run__checkpoint_every=2, run__log_every=4, run__keep_checkpoints=9)
    with one_device(), pytest.raises(Diverged) as error:
        loop.train(config, str(tmp_path), quiet=True)
    assert "3 times in a row, in batches 5 to 7" in str(error.value)
    assert "run.max_skipped" in str(error.value)
    # 6 holds the state after batch 4, and the count of one.
    assert complete_steps(RunFolder(str(tmp_path)).checkpoints) == [6, 4, 2]
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in line]
    assert [line["train/skipped_steps"] for line in lines] == [0, 0, 0, 0, 0, 1, 2, 3]
    # Started again, it stops at the same batch: the count went on from the checkpoint.
    with one_device(), pytest.raises(Diverged, match="batches 5 to 7"):
        loop.train(config, str(tmp_path), quiet=True)
