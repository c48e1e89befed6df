"""An evaluation with the memory carried is that of whole documents in one row; one without it is not."""

import json

import jax
import pytest

from blockjax import data
from blockjax.errors import UsageError
from blockjax.parallel.mesh import make_mesh
from blockjax.train import config as configs
from blockjax.train.evaluate import evaluate_memory
from blockjax.train.folder import RunFolder
from blockjax.train.run import Run, claim, padded_vocab
from tests.models.tiny import random_model


@pytest.fixture(autouse=True)
def token_scan(dense_attention, monkeypatch):
    """Compiles in a third of the time of chunks."""
    from blockjax.kernels.linear_attention import api, reference

    monkeypatch.setattr(api, "BACKENDS", {"reference": reference})


@pytest.fixture
def make_run(tiny, tmp_path):
    """`make_run(data__seq_len=32)` is a run that was never trained, in a folder of its own."""

    def make(**values):
        config = tiny(**dict(model__pattern="lightning", data__order="stream", data__batch_size=2) | values)
        config.model.depth = 1
        folder = RunFolder(str(tmp_path / f"run-{config.data.seq_len}"))
        corpus = data.open_corpus(config.data.source, config.run.data_dir, quiet=True)
        tokenizer = data.open_tokenizer(config.data.tokenizer)
        claim(folder, config, corpus, tokenizer)
        model = random_model(configs.check(config, vocab_size=padded_vocab(tokenizer)))
        return Run(folder, config, model, tokenizer, make_mesh({}, jax.devices()[:1]), 7)

    return make


def test_with_the_memory_and_without(make_run):
    """Rows of 32 tokens over the whole split; and one row for all documents of a stream."""
    run = make_run(data__seq_len=32)
    found = evaluate_memory(run, 10_000, quiet=True)
    whole = evaluate_memory(make_run(data__seq_len=2048), 10_000, quiet=True)
    assert whole["sequences"] == 2 < 10 < found["sequences"] and found["step"] == 7
    assert found["carried"] == pytest.approx(whole["reset"], rel=1e-4)
    late = [key for key in found["reset"] if key.startswith("val/bits_per_byte_from/")][2:]
    assert late and all(abs(found["reset"][key] - found["carried"][key]) > 1e-3 for key in late)
    assert json.loads((run.folder.path / "evaluation.json").read_text()) == found


@pytest.mark.parametrize(
    ("values", "sequences", "words"),
    [
        (dict(model__pattern="full"), 8, ["model.pattern='full'"]),
        (dict(data__order="packed"), 8, ["data.order='packed'"]),
        ({}, 0, ["--sequences=0"]),
    ],
)
def test_what_has_no_memory_is_refused(make_run, values, sequences, words):
    with pytest.raises(UsageError) as error:
        evaluate_memory(make_run(**values), sequences, quiet=True)
    assert all(word in str(error.value) for word in words)


def test_another_corpus_is_refused(make_run):
    run = make_run()
    record = run.folder.read_record()
    run.folder.write_record(record | {"corpus": {"name": "other", "digest": "0"}})
    with pytest.raises(UsageError, match="another corpus"):
        evaluate_memory(run, 8, quiet=True)
