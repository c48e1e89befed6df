"""A run that is stopped and continued is the run that was not."""

import jax
import numpy as np
import pytest

from blockjax.data import Evaluation, Loader
from blockjax.errors import UsageError
from blockjax.train import loop
from blockjax.train.checkpoint import Checkpoints
from blockjax.train.folder import RunFolder
from blockjax.train.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("dense_attention")

EXACT = ("train/loss", "train/grad_norm", "train/visible_pairs", "val/loss", "val/bits_per_byte")


class Stop(Exception):
    pass


@pytest.fixture
def train(monkeypatch):
    """Trains, and with `stop` raises in place of batch number `stop`, so that many steps are made."""

    def run(config, folder, stop=None, error=Stop):
        class Interrupted(Loader):
            def __iter__(self):
                for k, batch in enumerate(super().__iter__(), self._start):
                    if k == stop and not isinstance(self._order, Evaluation):
                        raise error
                    yield batch

        with monkeypatch.context() as patch:
            patch.setattr(loop.data, "Loader", Interrupted)
            if stop is None:
                return loop.train(config, str(folder), quiet=True)
            with pytest.raises(error):
                loop.train(config, str(folder), quiet=True)

    return run


def exact_lines(folder) -> list[dict]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k in ("step", *EXACT)} for line in lines]


def assert_same_params(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def state_of(folder, step: int, config) -> dict:
    """Every array of a checkpoint."""
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointer().restore(folder / "checkpoints" / str(step))


@pytest.mark.parametrize(
    ("optimizer", "order"),
    [("muon", "packed"), ("adamw", "stream")],
)
@pytest.mark.reliability
def test_stopped_at_any_step(tiny, train, tmp_path, optimizer, order):
    config = tiny(optimizer__name=optimizer, data__order=order, run__checkpoint_every=3, run__eval_every=4)
    whole = train(config, tmp_path / "whole")
    assert [line["step"] for line in exact_lines(tmp_path / "whole")] == [
        *(1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12)
    ]
    # Before the first checkpoint, between checkpoints, right at one, and twice at the same step.
    for stop in (1, 5, 6, 7, 7):
        train(config, tmp_path / "stopped", stop)
        assert max(line["step"] for line in exact_lines(tmp_path / "stopped")) == stop
    resumed = train(config, tmp_path / "stopped")
    assert exact_lines(tmp_path / "stopped") == exact_lines(tmp_path / "whole")
    for step in (9, 12):
        assert_same_params(
            state_of(tmp_path / "stopped", step, config), state_of(tmp_path / "whole", step, config)
        )
    assert (resumed.step, whole.step) == (12, 12)

    # Started once more, a finished run is loaded and nothing is written.
    lines = read_metrics(tmp_path / "stopped" / "metrics.jsonl")
    again = train(config, tmp_path / "stopped")
    assert again.step == 12 and read_metrics(tmp_path / "stopped" / "metrics.jsonl") == lines
    assert_same_params(*(jax.tree.leaves(loop.nnx.state(run.model)) for run in (again, whole)))


def test_ctrl_c_keeps_the_metrics_of_finished_steps(tiny, train, tmp_path):
    train(tiny(), tmp_path, 7, KeyboardInterrupt)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]


def test_metrics_are_on_disk_before_the_checkpoint(tiny, tmp_path, monkeypatch):
    """A kill right after a checkpoint would otherwise leave a gap."""
    seen = {}

    def save(self, step, state):
        seen[step] = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]

    monkeypatch.setattr(Checkpoints, "save", save)
    loop.train(
        tiny(run__log_every=100, run__checkpoint_every=5, run__eval_every=0), str(tmp_path), quiet=True
    )
    assert {step: max(lines) for step, lines in seen.items()} == {5: 5, 10: 10, 12: 12}


@pytest.mark.exhaustive
def test_a_longer_run_continues(tiny, train, tmp_path):
    # The schedule that is constant until the decay: the first steps are the same ones.
    values = dict(optimizer__schedule="stable_decay", optimizer__decay_fraction=0.1)
    train(tiny(**values, run__steps=4), tmp_path)
    run = train(tiny(**values, run__steps=6), tmp_path)
    assert run.step == 6
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert train(tiny(**values, run__steps=4), tmp_path).step == 6  # a shorter one has nothing to do


@pytest.fixture
def compile_nothing(monkeypatch):
    monkeypatch.setattr(loop, "compile_step", lambda *_: pytest.fail("the training step was compiled"))


def tokenizer_file(path, words):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))


@pytest.mark.exhaustive
def test_another_tokenizer_behind_the_same_path_is_refused(tiny, train, tmp_path):
    path = tmp_path / "words.json"
    config = tiny(data__tokenizer=str(path), run__steps=3)
    tokenizer_file(path, ["block", "time"])
    train(config, tmp_path / "run")
    record = RunFolder(str(tmp_path / "run")).read_record()
    assert record["tokenizer"]["name"] == "words.json" and len(record["tokenizer"]["digest"]) == 64
    tokenizer_file(path, ["block", "depth"])
    with pytest.raises(UsageError, match=r"another tokenizer: it was .*digest.*; it is .*digest.*--run"):
        train(config, tmp_path / "run")


def test_another_corpus_behind_the_same_path_is_refused(tiny, train, tmp_path, compile_nothing):
    path = tmp_path / "text.txt"
    config = tiny(data__source=str(path))
    path.write_text("A text about blocks.\n" * 200)
    with pytest.raises(pytest.fail.Exception):  # the record is written before
        loop.train(config, str(tmp_path / "run"), quiet=True)
    assert RunFolder(str(tmp_path / "run")).read_record()["corpus"].keys() == {"name", "digest"}
    path.write_text("A text about time.\n" * 200)
    with pytest.raises(UsageError, match=r"another corpus: it was name text\.txt, digest"):
        loop.train(config, str(tmp_path / "run"), quiet=True)


def test_a_vocabulary_that_does_not_divide_is_refused(tiny, tmp_path, monkeypatch, compile_nothing):
    monkeypatch.setattr(loop, "padded_vocab", lambda tokenizer: tokenizer.vocab_size)
    config = tiny()
    config.mesh.tensor = 2
    with pytest.raises(UsageError, match=r"257 along 'vocab'.*tensor=2"):
        loop.train(config, str(tmp_path), quiet=True)
