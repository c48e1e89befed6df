import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockjax.data.index import TokenIndex
from blockjax.data.orders import (
    EVALUATIONS,
    DocumentStream,
    Evaluation,
    StreamedEvaluation,
    deal,
    make_order,
    permutation,
)
from blockjax.errors import UsageError

LENGTHS = [5, 1, 17, 3, 40, 2, 9, 11, 6, 4]
BOUNDARY = 1000
lengths_of_documents = st.lists(st.integers(1, 20), min_size=1, max_size=12)


def positions(fragments):
    return [(f.document, f.offset + i) for f in fragments for i in range(f.length)]


def epoch_by_hand(lengths, order):
    return [(d, i) for d in order for i in range(lengths[d])]


def row_by_hand(index, places):
    """Inputs and targets of (document, position) pairs, from the definition."""
    tokens, targets = [], []
    for document, i in places:
        text = index.tokens[index.offsets[document] : index.offsets[document + 1]].tolist()
        tokens.append([BOUNDARY, *text][i])
        targets.append([*text, BOUNDARY][i])
    return tokens, targets


@settings(max_examples=60, deadline=None)
@given(lengths_of_documents, st.integers(0, 300), st.integers(0, 100), st.integers(0, 5))
def test_random_access_is_a_slice_of_the_concatenation(lengths, position, count, seed):
    lengths = np.array(lengths)
    stream = DocumentStream(lengths, (seed,))
    epochs = range((position + count) // lengths.sum() + 1)
    whole = itertools.chain(*(epoch_by_hand(lengths, permutation((seed, e), len(lengths))) for e in epochs))
    assert positions(stream.read(position, count)) == list(whole)[position : position + count]


@settings(max_examples=30, deadline=None)
@given(lengths_of_documents, st.integers(0, 4))
def test_an_epoch_holds_every_position_once(lengths, epoch):
    stream = DocumentStream(np.array(lengths), (3,))
    read = positions(stream.read(epoch * stream.epoch_length, stream.epoch_length))
    assert sorted(read) == epoch_by_hand(lengths, range(len(lengths)))


def test_epochs_and_seeds_permute_anew():
    orders = {tuple(permutation((seed, epoch), 20)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_permutation_is_the_same_on_every_machine():
    assert permutation((7, 1), 8).tolist() == [7, 6, 1, 4, 3, 2, 5, 0]


@pytest.mark.parametrize("name", ["packed", "stream"])
def test_batch_is_a_function_of_seed_and_number(make_index, name):
    index = make_index(LENGTHS)
    order = make_order(name, index, 4, 16, seed=5)
    for k in (7, 0, 3, 7):
        fresh = make_order(name, index, 4, 16, seed=5).batch(k)
        assert all(np.array_equal(fresh[key], value) for key, value in order.batch(k).items())
    other = make_order(name, index, 4, 16, seed=6)
    assert any(not np.array_equal(order.batch(k)["tokens"], other.batch(k)["tokens"]) for k in range(3))


@pytest.mark.parametrize("name", ["packed", "stream"])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_global_batch_does_not_depend_on_the_processes(make_index, name, processes):
    index = make_index(LENGTHS)
    whole = make_order(name, index, 8, 16, seed=1).batch(11)
    for rows in np.split(np.arange(8), processes):
        part = make_order(name, index, 8, 16, seed=1).batch(11, rows)
        assert all(np.array_equal(part[key], value[rows]) for key, value in whole.items())


def test_rows_come_in_the_order_asked_for(make_index):
    order = make_order("packed", make_index(LENGTHS), 8, 16, seed=1)
    assert np.array_equal(order.batch(2, [5, 0])["targets"], order.batch(2)["targets"][[5, 0]])


def test_packed_rows_hold_the_stream_and_nothing_else(make_index):
    index = make_index(LENGTHS)
    order = make_order("packed", index, 3, 16, seed=2)
    stream = DocumentStream(index.num_targets, (2,))
    assert order.deck == stream.epoch_length // 16
    batches = [order.batch(k) for k in range(2 * order.deck)]  # six decks of rows
    assert np.mean([batch["targets"] >= 0 for batch in batches]) >= 0.99
    dealt = [
        row
        for batch in batches
        for row in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True)
    ]
    cut = [tuple(row_by_hand(index, positions(stream.read(i * 16, 16)))) for i in range(len(dealt))]
    for deck in range(6):
        rows = slice(deck * order.deck, (deck + 1) * order.deck)
        assert sorted(dealt[rows]) == sorted(cut[rows])
    assert dealt != cut


def test_rows_of_one_document_are_spread_over_batches(make_index):
    order = make_order("packed", make_index([4000] * 8), 8, 16, seed=0)
    documents = [{f.document for b in range(8) for f in order.row(k, b)} for k in range(20)]
    assert np.mean([len(d) for d in documents]) > 4


def test_layout_of_a_row(make_index):
    batch = make_order("packed", make_index([2, 3]), 1, 9, seed=0).batch(0)
    a, b = BOUNDARY + 1, BOUNDARY + 3
    documents = {0: [BOUNDARY, a, a + 1], 1: [BOUNDARY, b, b + 1, b + 2]}
    first, second = permutation((0, 0), 2)
    third = permutation((0, 1), 2)[0]
    row = [*documents[first], *documents[second], *documents[third][:2]]
    begins = [0, len(documents[first]), 7]
    assert batch["tokens"][0].tolist() == row
    assert np.flatnonzero(batch["starts"][0]).tolist() == begins
    assert batch["segment_ids"][0].tolist() == [sum(i >= b for b in begins) - 1 for i in range(9)]
    assert batch["positions"][0].tolist() == [i - max(b for b in begins if b <= i) for i in range(9)]
    dtypes = {key: value.dtype.name for key, value in batch.items()}
    assert dtypes.pop("starts") == "bool" and dtypes.pop("target_bytes") == "float32"
    assert set(dtypes.values()) == {"int32"}


def test_targets_are_inputs_shifted_within_the_document(make_index):
    for batch in map(make_order("packed", make_index(LENGTHS), 4, 16, seed=0).batch, range(5)):
        same = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
        assert np.array_equal(batch["tokens"][:, 1:][same], batch["targets"][:, :-1][same])
        assert (batch["targets"][:, :-1][~same] == BOUNDARY).all()
        assert (batch["tokens"][batch["starts"]] == BOUNDARY).all()


def test_stream_rows_go_on_where_they_ended(make_index):
    index = make_index(LENGTHS)
    order = make_order("stream", index, 3, 8, seed=4)
    batches = [order.batch(k) for k in range(12)]
    lanes = deal(index.num_targets, 3, 4)
    assert sorted(np.concatenate(lanes)) == list(range(len(LENGTHS)))
    for b, documents in enumerate(lanes):
        stream = DocumentStream(index.num_targets[documents], (4, b), documents)
        tokens, targets = row_by_hand(index, positions(stream.read(0, 12 * 8)))
        row = {
            key: np.concatenate([batch[key][b] for batch in batches])
            for key in ("tokens", "targets", "starts")
        }
        assert row["tokens"].tolist() == tokens
        assert row["targets"].tolist() == targets
        assert row["starts"].tolist() == [t == BOUNDARY for t in tokens]
        # One document is whole before the next begins.
        inside = ~row["starts"][1:]
        assert np.array_equal(row["tokens"][1:][inside], row["targets"][:-1][inside])


def test_stream_balances_its_rows():
    lengths = np.random.default_rng(0).integers(1, 1000, 200)
    loads = [lengths[documents].sum() for documents in deal(lengths, 8, 0)]
    assert max(loads) - min(loads) <= 1000
    assert max(loads) / min(loads) < 1.01


@settings(max_examples=30, deadline=None)
@given(lengths_of_documents, st.integers(1, 9))
def test_bytes_of_an_epoch_are_exact(lengths, seq_len):
    lengths = np.array(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    num_bytes = lengths * 7 + np.arange(len(lengths))
    index = TokenIndex("made up", np.zeros(offsets[-1], np.uint16), offsets, num_bytes, BOUNDARY)
    epoch = int(index.num_targets.sum())
    deck = max(1, epoch // seq_len)
    rows = math.lcm(epoch, deck * seq_len) // seq_len  # whole epochs in whole decks
    batch = make_order("packed", index, rows, seq_len, seed=0).batch(0)
    assert batch["target_bytes"].astype(np.float64).sum() == rows * seq_len // epoch * num_bytes.sum()
    assert (batch["target_bytes"] >= 0).all()


def test_bytes_of_a_whole_document(make_index):
    index = make_index([6])
    assert make_order("packed", index, 2, 7, seed=0).batch(3)["target_bytes"].tolist() == [19, 19]
    halves = make_order("packed", index, 21, 2, seed=0).batch(0)["target_bytes"]
    assert halves.sum() == 6 * 19 and halves.max() - halves.min() <= 1


@pytest.mark.parametrize("kind", EVALUATIONS.values())
@pytest.mark.parametrize("batch_size, seq_len", [(3, 16), (4, 7), (2, 500), (12, 5)])
def test_evaluation_holds_every_position_once(make_index, kind, batch_size, seq_len):
    index = make_index(LENGTHS)
    evaluation = kind(index, batch_size, seq_len)
    batches = [evaluation.batch(k) for k in range(len(evaluation))]
    for key in ("tokens", "targets", "target_bytes"):
        assert {b[key].shape[0] for b in batches} == {batch_size}
    targets = np.concatenate([b["targets"].ravel() for b in batches])
    there = targets >= 0
    assert sorted(targets[there]) == sorted([*index.tokens.tolist(), *[BOUNDARY] * len(index)])
    assert np.array_equal(there, np.concatenate([b["segment_ids"].ravel() for b in batches]) >= 0)
    assert (np.diff(there.reshape(-1, seq_len).astype(int)) <= 0).all()  # padding ends a row
    assert sum(b["target_bytes"].sum() for b in batches) == index.num_bytes.sum()


def test_streamed_evaluation_goes_on_in_each_row(make_index):
    """Also two rows more than documents: they are padding."""
    index = make_index(LENGTHS)
    evaluation = StreamedEvaluation(index, 12, 5)
    batches = [evaluation.batch(k) for k in range(len(evaluation))]
    there = batches[0]["targets"][:, 0] >= 0
    assert there.sum() == 10 and np.array_equal(batches[0]["starts"][:, 0], there)
    keys = "targets", "offsets", "starts"
    whole = {key: np.concatenate([b[key] for b in batches], axis=1) for key in keys}
    for row in range(12):
        real = whole["targets"][row] >= 0
        offsets, starts = whole["offsets"][row][real], whole["starts"][row][real]
        assert np.array_equal(starts, offsets == 0)
        assert np.array_equal(offsets[1:][~starts[1:]], offsets[:-1][~starts[1:]] + 1)
    assert evaluation.longest == whole["offsets"].max() + 1


def test_evaluation_takes_the_first_batches_of_the_same_rows(make_index):
    index = make_index(LENGTHS)
    few, all_ = Evaluation(index, 2, 16, batches=2), Evaluation(index, 2, 16)
    assert len(few) == 2 and len(Evaluation(index, 2, 16, batches=99)) == len(all_)
    assert np.array_equal(few.batch(1, [1])["tokens"], all_.batch(1)["tokens"][1:])


def test_mistakes_get_one_sentence(make_index):
    index = make_index(LENGTHS)
    with pytest.raises(UsageError, match=r"no order .paked.\. Did you mean .packed."):
        make_order("paked", index, 2, 8, 0)
    with pytest.raises(UsageError, match="Known: packed, stream"):
        make_order("x", index, 2, 8, 0)
    with pytest.raises(UsageError, match="batch_size is 11, and made up has 10 documents"):
        make_order("stream", index, 11, 8, 0)
    with pytest.raises(UsageError, match="at least 1, and are 0 and 8"):
        make_order("packed", index, 0, 8, 0)
    with pytest.raises(UsageError, match="negative, and is -1"):
        make_order("packed", index, 2, 8, -1)
    with pytest.raises(UsageError, match="at least 1, and is 0"):
        Evaluation(index, 2, 8, batches=0)
