"""Recurrent layers that go on from step to step: what they remember, where it is cut, and a resumed run."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from blockjax.data.index import TokenIndex
from blockjax.data.orders import StreamedEvaluation
from blockjax.errors import UsageError
from blockjax.parallel.mesh import make_mesh
from blockjax.train import config as configs
from blockjax.train import loop
from blockjax.train import step as steps
from blockjax.train.metrics import read_metrics
from blockjax.train.state import init_state, plan_state
from blockjax.train.step import make_eval_step, make_train_step
from tests.models.tiny import random_model, tiny_config

pytestmark = pytest.mark.usefixtures("dense_attention")

PATTERN = "brt:window=16/states=4,lightning"
T = 8


@pytest.fixture(autouse=True)
def token_scan(monkeypatch):
    """Compiles in a third of the time of chunks."""
    from blockjax.kernels.linear_attention import api, reference

    monkeypatch.setattr(api, "BACKENDS", {"reference": reference})


@pytest.fixture
def carrying(tiny):
    def make(**values):
        values = dict(model__pattern=PATTERN, data__order="stream", data__carry=True) | values
        return tiny(**dict(optimizer__name="adamw", data__seq_len=32) | values)

    return make


def test_a_step_goes_on_where_the_one_before_ended_but_for_rows_that_start_a_document():
    """The loss of the second half of a row is that of the whole row minus that of its first half."""
    model = random_model(tiny_config(pattern="brt:window=4/states=3", depth=1, attention_block=16))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 24, (2, 2 * T + 1)).astype(np.int32)
    state = init_state(model, optax.sgd(0.0), carried=2)
    step = jax.jit(make_train_step(nnx.graphdef(model), optax.sgd(0.0)))

    def batch(part, starts):
        where = np.zeros((2, T), bool)
        where[:, 0] = starts
        positions = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))
        own, targets = tokens[:, :-1][:, part], tokens[:, 1:][:, part]
        ids = np.zeros((2, T), np.int32)
        return dict(tokens=own, targets=targets, positions=positions, segment_ids=ids, starts=where)

    def nats(logits, part, row):
        logits, targets = np.float64(logits[row, part]), tokens[row, 1:][part]
        return (np.log(np.exp(logits).sum(-1)) - logits[np.arange(T), targets]).mean()

    first, second = slice(0, T), slice(T, 2 * T)
    state, metrics = step(state, batch(first, [True, True]))
    whole = np.asarray(model(tokens[:, :-1]))
    assert float(metrics["loss"]) == pytest.approx(np.mean([nats(whole, first, r) for r in (0, 1)]), rel=1e-4)
    _, metrics = step(state, batch(second, [False, True]))
    alone = np.pad(np.asarray(model(tokens[:, T : 2 * T])), ((0, 0), (T, 0), (0, 0)))
    expected = np.mean([nats(whole, second, 0), nats(alone, second, 1)])
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-4)
    forgetful = np.mean([nats(alone, second, r) for r in (0, 1)])
    assert abs(forgetful - expected) > 1e-3


@pytest.fixture
def two_groups(monkeypatch):
    """Positions 0 .. 7 and those after them."""
    monkeypatch.setattr(steps, "FIRST_EDGE", T)
    monkeypatch.setattr(loop, "FIRST_EDGE", T)


@pytest.mark.usefixtures("two_groups")
def test_evaluation_goes_on_where_the_batch_before_ended():
    """By position: the second half of row 0 is at 8 .. 15 of its document, row 1 starts another."""
    model = random_model(tiny_config(pattern="brt:window=4/states=3,gdn", attention_block=16))
    graph, params = nnx.split(model)
    evaluate = jax.jit(make_eval_step(graph, longest=2 * T))
    tokens = np.random.default_rng(0).integers(0, 24, (2, 2 * T + 1)).astype(np.int32)
    zeros = np.zeros((2, T), np.int32)

    def batch(part, offsets):
        positions, offsets = zeros + np.arange(T, dtype=np.int32), np.asarray(offsets)[:, None] + np.arange(T)
        own, targets = tokens[:, :-1][:, part], tokens[:, 1:][:, part]
        places = dict(positions=positions, offsets=offsets, segment_ids=zeros, starts=offsets == 0)
        return dict(tokens=own, targets=targets, target_bytes=np.ones(2), **places)

    def nats(logits, row):
        logits = np.float64(logits[row])[T:]
        return (np.log(np.exp(logits).sum(-1)) - logits[np.arange(T), tokens[row, 1 + T :]]).sum()

    # What came before a start is forgotten, so any memory may go in.
    dirty = jax.tree.map(lambda x: x + 1, model.memory(2))
    _, memory = evaluate(params, 0, batch(slice(0, T), [0, 0]), dirty)
    last = batch(slice(T, None), [T, 0])
    sums, _ = evaluate(params, 0, last, memory)
    alone, none = evaluate(params, 0, last, None)
    whole = np.asarray(model(tokens[:, :-1]))
    second = np.pad(np.asarray(model(tokens[:, T:-1])), ((0, 0), (T, 0), (0, 0)))
    np.testing.assert_allclose(sums["nats"], [nats(second, 1), nats(whole, 0)], rtol=1e-4)
    np.testing.assert_allclose(alone["nats"], [nats(second, 1), nats(second, 0)], rtol=1e-4)
    assert none is None and abs(alone["nats"][1] - sums["nats"][1]) > 1e-3


@pytest.mark.usefixtures("two_groups")
def test_an_evaluation_along_streams_is_that_of_whole_documents():
    """By position in the document: rows go on in documents, end in them, hold several, and are padded."""
    lengths, rng = np.array([21, 3, 30, 12, 2, 17]), np.random.default_rng(0)
    ends = np.cumsum(lengths)
    text, sizes = rng.integers(0, 23, ends[-1]).astype(np.uint16), rng.integers(3, 9, len(lengths)) * lengths
    index = TokenIndex("made up", text, np.array([0, *ends]), sizes, boundary=23)
    evaluation = StreamedEvaluation(index, batch_size=2, seq_len=T)
    model = random_model(tiny_config(pattern="gdn,lightning"))
    graph, params = nnx.split(model)
    state = init_state(model, optax.sgd(0.0), carried=2)
    trained = jax.tree.map(lambda x: x + 1, state.memory)  # of other documents
    state = dataclasses.replace(state, memory=trained)
    run_eval = jax.jit(make_eval_step(graph, evaluation.longest))
    batches = [evaluation.batch(k) for k in range(len(evaluation))]
    assert len(batches) == 6 and not (batches[2]["starts"][:, 0] & batches[3]["starts"][:, 0]).any()
    found = loop.evaluate(run_eval, state, batches)

    documents = np.full((len(lengths), evaluation.longest + 1), 23)
    for row, part in zip(documents, np.split(text, ends), strict=False):
        row[1 : len(part) + 1] = part
    logits = np.float64(jax.jit(lambda params, x: nnx.merge(graph, params)(x))(params, documents[:, :-1]))
    picked = np.take_along_axis(logits, documents[:, 1:, None], axis=2)[..., 0]
    nats = np.log(np.exp(logits).sum(-1)) - picked
    place = np.arange(evaluation.longest)
    real = place <= lengths[:, None]
    per_token = sizes.sum() / real.sum() * np.log(2)
    expected = {"val/bits_per_byte": nats[real].mean() / per_token}
    for begin, end in ((0, T), (T, 2 * T), (2 * T, 4 * T)):
        inside = real & (place >= begin) & (place < end)
        expected[f"val/bits_per_byte_from/{begin:02}"] = nats[inside].mean() / per_token
    by_position = {key: x for key, x in found.items() if key.startswith("val/bits_per_byte")}
    assert by_position == pytest.approx(expected, rel=1e-4)


def test_a_run_resumed_within_a_document_is_the_one_that_was_not_stopped(carrying, one_device, tmp_path):
    config = carrying(run__steps=6, run__checkpoint_every=3, run__eval_every=3)

    def lines(name):
        exact = ("step", "train/loss", "train/grad_norm", "val/loss")
        found = read_metrics(tmp_path / name / "metrics.jsonl")
        return [{key: line[key] for key in exact if key in line} for line in found]

    with one_device(), pytest.MonkeyPatch.context() as patch:
        whole = loop.train(config, str(tmp_path / "whole"), quiet=True)
        seen = {}

        class Interrupted(loop.data.Loader):
            def __iter__(self):
                for k, batch in enumerate(super().__iter__(), self._start):
                    if k == 4 and not isinstance(self._order, loop.data.Evaluation):
                        raise KeyboardInterrupt
                    seen[k] = np.asarray(batch["starts"][:, 0])
                    yield batch

        patch.setattr(loop.data, "Loader", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.train(config, str(tmp_path / "stopped"), quiet=True)
        assert not seen[3].all()  # some rows go on within a document
        patch.undo()
        resumed = loop.train(config, str(tmp_path / "stopped"), quiet=True)
    assert lines("stopped") == lines("whole")
    for a, b in zip(*(jax.tree.leaves(nnx.state(run.model)) for run in (resumed, whole)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_memory_lives_with_the_rows(carrying):
    config = carrying(data__batch_size=8)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        plan = plan_state(configs.check(config, vocab_size=264), config, mesh)
    leaves = jax.tree.leaves(plan.abstract.memory)
    assert len(leaves) == 6
    for leaf in leaves:
        assert leaf.shape[0] == 8 and leaf.sharding.shard_shape(leaf.shape)[0] == 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(data__order="packed"), ["data.order='stream'", "'packed'"]),
        (dict(model__pattern="8"), ["model.pattern", "'8'"]),
        (dict(run__accumulate=2), ["run.accumulate=1", "2"]),
        (dict(data__seq_len=24), ["seq_len=24", "16 tokens"]),
    ],
)
def test_what_cannot_be_carried_is_refused(carrying, values, words):
    with pytest.raises(UsageError) as error:
        configs.check(carrying(**values))
    assert all(word in str(error.value) for word in words)
