import gzip
import json
import multiprocessing
import subprocess
import sys
import textwrap

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from blockjax.data import open_corpus
from blockjax.data.sources import MAX_PIECE, file_source, stdlib_source
from blockjax.data.splits import assign_splits, hash_fraction
from blockjax.errors import UsageError


def write_files(folder, count=40):
    for i in range(count):
        path = folder / f"part{i % 3}" / f"{i:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {i}\nzwölf\n" * (i + 1))
    return folder


def everything(corpus):
    return {split: list(documents) for split, documents in corpus.splits.items()}


def test_a_folder_becomes_three_splits(tmp_path):
    corpus = open_corpus(str(write_files(tmp_path / "texts")), tmp_path / "data", quiet=True)
    splits = everything(corpus)
    assert list(splits) == ["train", "validation", "test"] and all(splits.values())
    found = dict(document for documents in splits.values() for document in documents)
    assert found == {f"part{i % 3}/{i:03}.txt": f"document {i}\nzwölf\n" * (i + 1) for i in range(40)}
    for documents in splits.values():
        assert documents == sorted(documents)
    assert corpus.documents("train")[3] == splits["train"][3]


def test_moved_files_keep_digest_and_splits_and_changed_ones_do_not(tmp_path):
    here = write_files(tmp_path / "texts")
    first = open_corpus(str(here), tmp_path / "data", quiet=True)
    there = here.rename(tmp_path / "elsewhere")
    moved = open_corpus(str(there), tmp_path / "data", quiet=True)
    assert (moved.digest, everything(moved)) == (first.digest, everything(first))
    (there / "part0" / "000.txt").write_text("changed")
    assert open_corpus(str(there), tmp_path / "data", quiet=True).digest != first.digest


def test_a_second_opening_prepares_nothing(tmp_path, capsys):
    texts = str(write_files(tmp_path / "texts"))
    open_corpus(texts, tmp_path / "data")
    first = capsys.readouterr()
    assert (
        first.out == ""
        and first.err.startswith("corpus texts: 40 documents in")
        and first.err.count("\n") == 1
    )
    open_corpus(texts, tmp_path / "data")
    assert capsys.readouterr() == ("", "")


def test_a_lost_file_is_prepared_again(tmp_path):
    texts = str(write_files(tmp_path / "texts"))
    before = everything(open_corpus(texts, tmp_path / "data", quiet=True))
    next((tmp_path / "data").rglob("*train.array_record*")).unlink()
    assert everything(open_corpus(texts, tmp_path / "data", quiet=True)) == before


@pytest.mark.parametrize("characters", [50, 3000, 30 * MAX_PIECE])
def test_one_text_file_is_cut_at_line_breaks(tmp_path, characters):
    text = ("a line of text\n" * (characters // 15 + 1))[:characters]
    (tmp_path / "book.txt").write_text(text)
    pieces = list(file_source(str(tmp_path / "book.txt")))
    assert "".join(piece for _, piece in pieces) == text
    assert max(len(piece) for _, piece in pieces) <= MAX_PIECE
    assert 3 <= len(pieces) <= 50
    if characters > 50:
        assert all(piece.endswith("\n") for _, piece in pieces[:-1])
    splits = everything(open_corpus(str(tmp_path / "book.txt"), tmp_path / "data", quiet=True))
    assert len(splits) == 3 and sum(map(len, splits.values())) == len(pieces)


def test_jsonl_and_parquet_rows_are_documents(tmp_path):
    texts = [f"row {i} ß" for i in range(20)]
    lines = "\n".join(json.dumps({"body": t, "n": 1}) for t in texts) + "\n\n" + json.dumps({"body": ""})
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    parquet.write_table(pyarrow.table({"body": [*texts, None], "n": [1] * 21}), tmp_path / "c.parquet")
    for name, first in [
        ("a.jsonl", "a.jsonl:1"),
        ("b.jsonl.gz", "b.jsonl.gz:1"),
        ("c.parquet", "c.parquet:0"),
    ]:
        documents = list(file_source(str(tmp_path / name), "body"))
        assert [text for _, text in documents] == texts
        assert documents[0][0] == first
    assert len(list(file_source(str(tmp_path / "*.*"), "body"))) == 60


def test_half_a_surrogate_pair_does_not_stop_the_preparation(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud800y"}\n' * 5)
    splits = everything(open_corpus(str(tmp_path / "a.jsonl"), tmp_path / "data", quiet=True))
    assert {text for documents in splits.values() for _, text in documents} == {"x?y"}


def test_hash_decides_unless_a_split_would_be_empty():
    fractions = {"train": 0.9, "validation": 0.05, "test": 0.05}
    hashes = np.array([hash_fraction(str(i)) for i in range(5000)])
    assignment = assign_splits(hashes, fractions)
    assert np.array_equal(assignment, np.searchsorted([0.9, 0.95], hashes, side="right"))
    assert np.allclose(np.bincount(assignment) / 5000, [0.9, 0.05, 0.05], atol=0.01)
    assert assign_splits(np.array([0.1, 0.3, 0.2]), fractions).tolist() == [0, 2, 1]
    assert sorted(assign_splits(np.array([0.99, 0.98, 0.97]), fractions)) == [0, 1, 2]
    assert assign_splits(np.array([0.99]), fractions).tolist() == [0]


def test_stdlib_is_long_real_and_without_tests(tmp_path):
    names = [name for name, _ in stdlib_source().files]
    assert len(names) > 400 and "os.py" in names and "asyncio/base_events.py" in names
    assert not any(part in ("test", "tests", "site-packages") for name in names for part in name.split("/"))
    corpus = open_corpus("stdlib", tmp_path, quiet=True)
    assert corpus.name.startswith("stdlib-3.") and len(corpus.digest) == 64
    sizes = {split: len(documents) for split, documents in corpus.splits.items()}
    assert 0.85 < sizes["train"] / sum(sizes.values()) < 0.95
    assert sum(len(text) for _, text in corpus.documents("train")) > 5e6


def test_a_python_without_its_sources_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "python312.zip"))
    with pytest.raises(
        UsageError, match=r"carries no standard library source files .* name a corpus of your own"
    ):
        open_corpus("stdlib", tmp_path)


MISTAKES = {
    "missing file": ("gone.txt", {}, "there is no file or folder .*gone.txt"),
    "glob": ("*.nope", {}, r"no file matches .*\*.nope"),
    "long name": ("x" * 300, {}, "x cannot be reached: File name too long"),
    "unknown user": ("~nobody-of-this-name/x", {}, "there is no file or folder .*~nobody-of-this-name/x"),
    "unprintable": ("a\0b", {}, "cannot be reached"),
    "empty folder": ("folder", {"folder/x.bin": b"1"}, r"holds no file that ends in .txt, .md"),
    "empty files": ("a.txt", {"a.txt": b""}, r"the corpus a\.txt is empty: 1 files"),
    "not utf-8": ("a.txt", {"a.txt": b"ab\xff"}, r"a.txt is not UTF-8 text \(byte 2\)"),
    "not json": ("a.jsonl", {"a.jsonl": b'{"text": "x"}\n{text\n'}, "a.jsonl line 2 is not JSON"),
    "no field": (
        "a.jsonl",
        {"a.jsonl": b'\n{"body": "x", "n": 1}'},
        r"line 2 has no text field 'text' .*fields body, n",
    ),
    "not an object": ("a.jsonl", {"a.jsonl": b"[1]"}, r"line 1 has no text field 'text' \(it has list\)"),
    "not text": ("a.jsonl", {"a.jsonl": b'{"text": 3}'}, "line 1 has no text field 'text'"),
    "not gzip": ("a.jsonl.gz", {"a.jsonl.gz": b"{}"}, "a.jsonl.gz cannot be read: Not a gzipped file"),
    "cut gzip": ("a.jsonl.gz", {"a.jsonl.gz": gzip.compress(b'{"text": "x"}' * 99)[:-9]}, "cannot be read"),
    "not parquet": ("a.parquet", {"a.parquet": b"text"}, "a.parquet is not a Parquet file"),
    "tfds": ("tfds:nothing_here", {}, "'nothing_here' is not prepared under .* file_format=array_record"),
}


@pytest.mark.parametrize("source, files, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_get_one_sentence(tmp_path, source, files, message):
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=message) as error:
        open_corpus(
            source if source[0] == "~" or ":" in source else str(tmp_path / source),
            tmp_path / "data",
            quiet=True,
        )
    assert "\n" not in str(error.value)


def test_parquet_mistakes_name_the_columns(tmp_path):
    parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"has no column 'text' .it has body, n."):
        open_corpus(str(tmp_path / "a.parquet"), tmp_path / "data")
    with pytest.raises(UsageError, match="column 'n' holds int64, not text"):
        open_corpus(str(tmp_path / "a.parquet"), tmp_path / "data", text_field="n")


def test_unknown_split_and_a_folder_that_cannot_be_written(tmp_path):
    texts = str(write_files(tmp_path / "texts", 3))
    with pytest.raises(UsageError, match=r"no split 'valid'; it has train \(1 documents\), validation"):
        open_corpus(texts, tmp_path / "data", quiet=True).documents("valid")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"data folder .* cannot be written .* pass a data_dir"):
        open_corpus(texts, tmp_path / "file" / "data")


def _digest(texts, data):
    return open_corpus(texts, data, quiet=True).digest


def test_processes_that_start_at_once_prepare_one_corpus(tmp_path):
    texts = str(write_files(tmp_path / "texts"))
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        digests = pool.starmap(_digest, [(texts, tmp_path / "data")] * 3)
    assert digests == [_digest(texts, tmp_path / "data")] * 3
    assert len(list((tmp_path / "data").rglob("dataset_info.json"))) == 1


def test_tensorflow_is_never_imported_even_where_it_is_installed(tmp_path):
    (tmp_path / "installed" / "tensorflow").mkdir(parents=True)
    (tmp_path / "installed" / "tensorflow" / "__init__.py").write_text(
        "raise RuntimeError('imported TensorFlow')"
    )
    program = f"""
        import importlib.util, sys
        sys.path.insert(0, {str(tmp_path / "installed")!r})
        assert importlib.util.find_spec("tensorflow")
        from blockjax.data import Evaluation, open_corpus, open_tokenizer, token_index
        corpus = open_corpus({str(write_files(tmp_path / "texts"))!r}, {str(tmp_path / "data")!r})
        index = token_index(corpus, open_tokenizer("bytes"), "train", {str(tmp_path / "data")!r})
        Evaluation(index, 2, 8).batch(0)
        assert "tensorflow" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr.count("\n") == 2
