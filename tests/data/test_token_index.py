import json
import multiprocessing

import numpy as np
import pytest

from blockjax.data import open_corpus, open_tokenizer, token_index
from blockjax.data.corpus import Corpus
from blockjax.errors import UsageError


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"é{i}" * i}) + "\n" for i in range(200)))
    return open_corpus(str(tmp_path / "a.jsonl"), tmp_path / "data", quiet=True)


class Counting:
    """The bytes tokenizer, which counts its calls."""

    def __init__(self):
        self.inner, self.calls = open_tokenizer("bytes"), 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def encode_batch(self, texts):
        self.calls += 1
        return self.inner.encode_batch(texts)


def test_documents_are_addressed(corpus, tmp_path):
    tokenizer = open_tokenizer("bytes")
    index = token_index(corpus, tokenizer, "train", tmp_path, quiet=True)
    documents = [text for _, text in corpus.documents("train")]
    assert len(index) == len(documents) > 150
    for d, text in enumerate(documents):
        assert tokenizer.decode(index.tokens[index.offsets[d] : index.offsets[d + 1]]) == text
    assert index.num_bytes.tolist() == [len(t.encode()) for t in documents]
    assert np.array_equal(index.num_targets, index.num_bytes + 1)
    assert index.tokens.dtype == np.uint16 and isinstance(index.tokens.base, np.memmap)


def test_tokenised_once(corpus, tmp_path, capsys):
    tokenizer = Counting()
    token_index(corpus, tokenizer, "train", tmp_path)
    calls = tokenizer.calls
    assert calls > 0 and capsys.readouterr().err.startswith("tokens a.jsonl bytes train: ")
    token_index(corpus, tokenizer, "train", tmp_path)
    assert tokenizer.calls == calls and capsys.readouterr().err == ""
    token_index(corpus, tokenizer, "test", tmp_path, quiet=True)
    token_index(Corpus(corpus.name, "0" * 64, corpus.splits), tokenizer, "train", tmp_path, quiet=True)
    assert tokenizer.calls > calls
    assert len([p for p in (tmp_path / "token_index").iterdir() if p.is_dir()]) == 3


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "num_bytes.npy", "meta.json"])
@pytest.mark.parametrize("damage", [cut, lambda p: p.unlink(), lambda p: p.write_bytes(b"")])
def test_a_damaged_index_is_built_anew(corpus, tmp_path, name, damage):
    before = token_index(corpus, open_tokenizer("bytes"), "train", tmp_path, quiet=True)
    tokens, offsets = before.tokens.copy(), before.offsets
    damage(next((tmp_path / "token_index").rglob(name)))
    after = token_index(corpus, open_tokenizer("bytes"), "train", tmp_path, quiet=True)
    assert np.array_equal(after.tokens, tokens) and np.array_equal(after.offsets, offsets)


def test_an_index_of_another_format_is_built_anew(corpus, tmp_path, monkeypatch):
    tokenizer = Counting()
    token_index(corpus, tokenizer, "train", tmp_path, quiet=True)
    calls = tokenizer.calls
    monkeypatch.setattr("blockjax.data.index.FORMAT", 99)
    token_index(corpus, tokenizer, "train", tmp_path, quiet=True)
    assert tokenizer.calls == 2 * calls


def test_a_failure_leaves_nothing_behind(corpus, tmp_path):
    class Failing(Counting):
        def encode_batch(self, texts):
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        token_index(corpus, Failing(), "train", tmp_path, quiet=True)
    folder = tmp_path / "token_index"
    assert not [p for p in folder.iterdir() if p.is_dir()]

    # What a killed process could not tidy up goes with the next attempt.
    lock = next(folder.glob(".*.lock"))
    (folder / f"{lock.stem}.killed").mkdir()
    token_index(corpus, open_tokenizer("bytes"), "train", tmp_path, quiet=True)
    assert [p.name for p in folder.iterdir() if p.is_dir()] == [lock.stem[1:]]


def _count(source, data):
    corpus = open_corpus(source, data, quiet=True)
    return len(token_index(corpus, open_tokenizer("bytes"), "train", data, quiet=True).tokens)


def test_processes_that_start_at_once_build_one_index(corpus, tmp_path):
    arguments = (str(tmp_path / "a.jsonl"), tmp_path / "data")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        counts = pool.starmap(_count, [arguments] * 2)
    assert counts == [_count(*arguments)] * 2
    assert len([p for p in (tmp_path / "data" / "token_index").iterdir() if p.is_dir()]) == 1


def test_mistakes_get_one_sentence(corpus, tmp_path):
    with pytest.raises(UsageError, match="no split 'dev'; it has train"):
        token_index(corpus, open_tokenizer("bytes"), "dev", tmp_path)

    class Empty(Counting):
        def encode_batch(self, texts):
            return [np.zeros(0, np.uint16) for _ in texts]

    with pytest.raises(UsageError, match=r"split 'test' of corpus a.jsonl holds no tokens \(\d+ documents\)"):
        token_index(corpus, Empty(), "test", tmp_path, quiet=True)
