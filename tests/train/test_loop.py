import math

import jax
import numpy as np
import pytest

from blockjax.analysis import report
from blockjax.data import Evaluation
from blockjax.train import folder as folder_module
from blockjax.train import loop
from blockjax.train.folder import RunFolder
from blockjax.train.metrics import read_metrics
from blockjax.train.run import open_run

pytestmark = pytest.mark.usefixtures("dense_attention")


def lines_of(folder, key) -> dict[int, float]:
    return {line["step"]: line[key] for line in read_metrics(folder / "metrics.jsonl") if key in line}


def test_bits_per_byte_of_uniform_logits(tiny, tmp_path, monkeypatch):
    """A head of zeros: every id of the padded vocabulary is as likely as any other."""
    seen = {}
    evaluate = loop.evaluate

    def blank(run_eval, state, batches, watch):
        state.params["head"] = 0 * state.params["head"]
        batches = list(batches)
        seen["targets"] = sum(int((b["targets"] >= 0).sum()) for b in batches)
        seen["bytes"] = sum(float(b["target_bytes"].sum()) for b in batches)
        seen["values"] = evaluate(run_eval, state, batches, watch)
        return seen["values"]

    monkeypatch.setattr(loop, "evaluate", blank)
    run = loop.train(tiny(run__steps=3), str(tmp_path), quiet=True)
    vocab = run.model.config.vocab_size
    assert vocab == 264 and seen["targets"] > 700
    expected = {
        "val/bits_per_byte": math.log2(vocab) * seen["targets"] / seen["bytes"],
        "val/loss": math.log(vocab),
        "val/perplexity": vocab,
    }
    by_position = [key for key in seen["values"] if key.startswith("val/bits_per_byte_from/")]
    assert len(by_position) > 2
    average = seen["targets"] / seen["bytes"]  # tokens a byte
    expected |= dict.fromkeys(by_position, math.log2(vocab) * average)
    assert seen["values"] == pytest.approx(expected, rel=3e-6)  # float32 sums
    assert lines_of(tmp_path, "val/perplexity") == {3: seen["values"]["val/perplexity"]}


@pytest.mark.exhaustive
def test_every_evaluation_is_of_the_same_text_and_any_mesh_agrees(tiny, one_device, tmp_path, monkeypatch):
    read = []
    batch = Evaluation.batch

    def record(self, k, rows=None):
        found = batch(self, k, rows)
        read.append((k, found["tokens"].tobytes()))
        return found

    monkeypatch.setattr(Evaluation, "batch", record)
    config = tiny(run__eval_every=6)
    loop.train(config, str(tmp_path / "eight"), quiet=True)
    first, second = sorted(read[:3]), sorted(read[3:])
    assert first == second and [k for k, _ in first] == [0, 1, 2]
    with one_device():
        loop.train(config, str(tmp_path / "one"), quiet=True)
    for key in ("val/bits_per_byte", "train/loss"):
        eight, one = (lines_of(tmp_path / name, key) for name in ("eight", "one"))
        np.testing.assert_allclose(list(eight.values()), list(one.values()), rtol=1e-5)


@pytest.mark.exhaustive
def test_a_trace_of_chosen_steps(tiny, tmp_path, monkeypatch):
    traced = []
    start = jax.profiler.start_trace
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: (traced.append(path), start(path)))
    loop.train(tiny(run__steps=3), str(tmp_path), profile=(2, 3), quiet=True)
    assert traced == [str(tmp_path / "profile")]
    (file,) = tmp_path.glob("profile/**/*.xplane.pb")
    content = file.read_bytes()
    assert b"train" in content and b"step_num" in content

    # Started once more with the same flags, beyond those steps, there is nothing to trace.
    loop.train(tiny(run__steps=5), str(tmp_path), profile=(2, 3), quiet=True)
    assert len(traced) == 1
    # Steps that are done are left out.
    loop.train(tiny(run__steps=7), str(tmp_path), profile=(4, 6), quiet=True)
    assert len(traced) == 2


@pytest.mark.exhaustive
def test_a_run_in_a_bucket(tiny, tmp_path, monkeypatch, bucket):
    """Everything but checkpoints, which orbax writes to buckets by itself."""
    monkeypatch.setattr(RunFolder, "checkpoints", tmp_path / "checkpoints")
    monkeypatch.setattr(folder_module.time, "monotonic", lambda: 0.0)  # only forced copies
    url = "gs://bucket/runs/a"
    config = tiny(run__steps=3, run__tensorboard=True)
    config.optimizer.schedule = "stable_decay"
    loop.train(config, url, profile=(2, 2), quiet=True)
    names = set(bucket())
    assert {"a/run.json", "a/metrics.jsonl"} < names
    assert any(n.startswith("a/tensorboard/events.") for n in names)
    assert any(n.startswith("a/profile/") and n.endswith(".xplane.pb") for n in names)

    config.run.steps = 5
    path = report.write(loop.train(config, url, quiet=True))
    assert str(path) == f"{url}/report/report.md"
    assert {"a/report/report.md", "a/report/loss.png"} < bucket().keys()
    assert [line.count(b'"train/loss"') for line in bucket()["a/metrics.jsonl"].splitlines()] == [
        1,
        1,
        1,
        0,
        1,
        1,
        0,
    ]
    assert open_run(url).step == 5
