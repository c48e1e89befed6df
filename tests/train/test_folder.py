import json

import jax
import pytest

from blockjax.errors import UsageError
from blockjax.train import folder as module
from blockjax.train.folder import RunFolder

RECORD = {"config": {}, "tokenizer": {}, "corpus": {}}


def test_on_disk_everything_is_in_place(tmp_path):
    folder = RunFolder(str(tmp_path / "a" / "run"))
    assert folder.local == tmp_path / "a" / "run" and list(folder.local.iterdir()) == []
    assert folder.read_record() is None
    folder.write_record(RECORD)
    assert folder.read_record() == RECORD
    folder.sync()
    assert [p.name for p in folder.local.iterdir()] == ["run.json"]


def test_a_relative_folder_has_absolute_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(RunFolder("run").checkpoints) == str(tmp_path / "run" / "checkpoints")


def test_a_bucket_gets_what_changed(bucket):
    folder = RunFolder("gs://bucket/runs/a")
    assert str(folder.checkpoints) == "gs://bucket/runs/a/checkpoints"
    folder.write_record(RECORD)
    (folder.local / "report").mkdir()
    (folder.local / "report" / "report.md").write_text("# a")
    (folder.local / "metrics.jsonl").write_text("1\n")
    folder.sync()
    assert bucket().keys() == {"a/run.json", "a/report/report.md", "a/metrics.jsonl"}
    assert json.loads(bucket()["a/run.json"]) == RECORD
    with (folder.local / "metrics.jsonl").open("a") as file:
        file.write("2\n")
    folder.sync()
    assert bucket()["a/metrics.jsonl"] == b"1\n2\n"


def test_a_bucket_is_not_written_too_often(bucket, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    folder = RunFolder("gs://bucket/runs/a")
    for clock[0], seconds, expected in [(0, 30, b"0"), (29, 30, b"0"), (30, 30, b"30"), (31, 0, b"31")]:
        (folder.local / "metrics.jsonl").write_text(str(clock[0]))
        folder.sync(at_most_every=seconds)
        assert bucket()["a/metrics.jsonl"] == expected


def test_a_run_in_a_bucket_goes_on_with_its_metrics(bucket):
    first = RunFolder("gs://bucket/runs/a")
    first.write_record(RECORD)
    (first.local / "metrics.jsonl").write_text("1\n")
    first.sync()
    again = RunFolder("gs://bucket/runs/a", create=False)
    assert again.local != first.local
    assert (again.local / "metrics.jsonl").read_text() == "1\n"
    assert again.read_record() == RECORD


def test_what_is_not_there_is_not_made(bucket, tmp_path):
    for path in ("gs://bucket/runs/b", str(tmp_path / "b")):
        with pytest.raises(UsageError, match="There is no run folder"):
            RunFolder(path, create=False)
    assert bucket() == {} and not (tmp_path / "b").exists()


def test_without_the_library_for_buckets():
    with pytest.raises(UsageError, match=r"blockjax\[gcs\]"):
        RunFolder("gs://bucket/runs/a")


def test_processes_that_share_no_disk_are_told(tmp_path, monkeypatch):
    from blockjax.train import run

    monkeypatch.setattr(jax, "process_index", lambda: 1)
    named = type("Named", (), dict(name="x", digest="d", vocab_size=1, fingerprint="f"))
    with pytest.raises(UsageError, match="shared disk"):
        run.claim(RunFolder(str(tmp_path)), run.configs.base_config(), named, named)
