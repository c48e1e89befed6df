"""A run that is ended again and again, wherever it is, is the run that was not."""

import json
import random
import signal

import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from blockjax.train import manifest
from blockjax.train.checkpoint import complete_steps
from blockjax.train.endings import Hung, Preempted
from blockjax.train.metrics import read_metrics
from tests.train.killable import End, Trainer

STEPS = 16
EVERY = 2
KILLED, TERMINATED = -signal.SIGKILL, -signal.SIGTERM
TIMES = ("train/tokens_per_second", "train/mfu_useful", "train/mfu_executed")

MODELS = {
    "prenorm": dict(optimizer__name="muon"),
    "block_attn_res": dict(model__residual="block_attn_res:size=2", data__order="stream"),
    "delta_block": dict(model__residual="delta_block:size=2", run__accumulate=2),
    # Two kinds of memory, carried from step to step.
    "recurrent": dict(
        model__pattern="brt:window=16/states=4,lightning", data__order="stream", data__carry=True
    ),
}

# In this order, one after the other on the same run; a step's time is random.
LONG = (
    End("step", 1),  # before the first checkpoint
    End("commit", 2),  # the first checkpoint, not complete
    End("write", 2),
    End("step", 3, (signal.SIGTERM,)),
    End("copy", 6),
    End("written", 6),
    End("manifest", 6),
    End("step", 6, delay=0.02),
    End("step", 7, (signal.SIGINT,)),
    End("read", 0),
    End("read", 0),  # twice in a row
    End("retire", 10),
    End("journal", 12),
    End("step", 12, (signal.SIGTERM, signal.SIGTERM)),
    End("step", 13, delay=0.01),
    End("write", 14),
    End("evaluation", 15),
    End("commit", 16),
)
SHORT = (End("commit", 2), End("step", 3, (signal.SIGTERM,)), End("write", 6), End("manifest", 8))


@pytest.fixture(scope="module")
def trainer():
    return Trainer()


@pytest.fixture(scope="module")
def make_config(tiny):
    def make(name, **values):
        common = dict(
            model__depth=2,
            model__pattern="8",
            run__steps=STEPS,
            run__checkpoint_every=EVERY,
            run__log_every=3,
            run__eval_every=5,
            run__eval_sequences=8,
        )
        config = tiny(**common | MODELS[name] | values)
        config.mesh.update(data=2, fsdp=2)
        return config

    return make


@pytest.fixture(scope="module")
def reference(trainer, make_config, tmp_path_factory):
    """`reference(name)` is the folder of a run that nothing ended, with all its checkpoints."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "whole"
            assert trainer.run(make_config(name, run__keep_checkpoints=STEPS), made[name]) == 0
        return made[name]

    return make


def expected_code(end: End) -> int:
    if end.sends[0] == signal.SIGKILL:
        return KILLED
    return TERMINATED if len(end.sends) > 1 else Preempted.exit_code


def leaves(run, step: int) -> dict:
    """Names, shapes, dtypes and digests of everything in a checkpoint."""
    return json.loads((run / "checkpoints" / str(step) / manifest.NAME).read_text())["leaves"]


def complete(run) -> list[int]:
    return complete_steps(epath.Path(run / "checkpoints"))


def batches(run) -> list[tuple[int, str]]:
    lines = (line.split() for line in (run / "batches.txt").read_text().splitlines())
    return [(int(k), digest) for k, digest in lines]


def exact(run) -> list[dict]:
    lines = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def assert_part_of(run, whole, before: list[int]) -> None:
    """What is there so far is as in the run that nothing ended, and the newest complete step is not lost."""
    steps = complete(run)
    for step in set(steps) & set(complete(whole)):
        assert leaves(run, step) == leaves(whole, step), step
    assert max(steps, default=0) >= max(before, default=0)
    assert set(batches(run)) <= set(batches(whole))


def assert_same(run, whole) -> None:
    assert exact(run) == exact(whole)
    read = lambda folder: ocp.PyTreeCheckpointer().restore(folder / "checkpoints" / str(STEPS))  # noqa: E731
    ours, theirs = (jax_leaves(read(folder)) for folder in (run, whole))
    assert len(ours) == len(theirs) > 10
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def jax_leaves(tree):
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def chain(trainer, config, whole, run, ends) -> None:
    for end in ends:
        before = complete(run)
        code = trainer.run(config, run, end)
        assert code == expected_code(end), (end, (run.parent / f"{run.name}.log").read_text()[-2000:])
        assert_part_of(run, whole, before)
        if code == Preempted.exit_code:
            assert complete(run)[0] == end.at + 1  # the step that ran when the signal came
    assert trainer.run(config, run) == 0
    assert_part_of(run, whole, complete(run))
    assert_same(run, whole)


@pytest.mark.slow
def test_some_kills(trainer, make_config, reference, tmp_path):
    chain(trainer, make_config("prenorm"), reference("prenorm"), tmp_path / "run", SHORT)


@pytest.mark.reliability
@pytest.mark.parametrize("name", MODELS)
def test_the_matrix_of_kills(trainer, make_config, reference, tmp_path, name):
    """With those at random times, 80 ends in all, 68 of them by SIGKILL."""
    draw = random.Random(name)
    random_ends = [End("step", 15, delay=draw.uniform(0, 0.05)), End("copy", 16)]
    carried = [leaf for leaf in leaves(reference(name), STEPS) if leaf.startswith("memory/")]
    assert bool(carried) == (name == "recurrent")
    chain(trainer, make_config(name), reference(name), tmp_path / "run", (*LONG, *random_ends))


@pytest.mark.reliability
def test_two_runs_are_equal_bit_for_bit(trainer, make_config, reference, tmp_path):
    config = make_config("prenorm", run__keep_checkpoints=STEPS, run__deterministic=True)
    assert trainer.run(config, tmp_path / "run") == 0
    for step in complete(reference("prenorm")):
        assert leaves(tmp_path / "run", step) == leaves(reference("prenorm"), step)
    assert_same(tmp_path / "run", reference("prenorm"))


@pytest.mark.parametrize(
    ("end", "words"),
    [
        pytest.param(End("loader", 3), "the loader, batch 3", marks=pytest.mark.slow),
        pytest.param(End("stuck step", 4), "step 4", marks=pytest.mark.reliability),
        pytest.param(End("stuck evaluation", 0), "evaluation batch 0", marks=pytest.mark.reliability),
        pytest.param(End("stuck save", 4), "the writing of checkpoint 4", marks=pytest.mark.reliability),
    ],
    ids=str,
)
def test_hangs(trainer, make_config, tmp_path, end, words):
    config = make_config("prenorm", run__hang_seconds=20.0)
    run = tmp_path / "run"
    assert trainer.run(config, run, end, timeout=120) == Hung.exit_code
    report = (run / "hang-process-0.txt").read_text()
    assert f"hangs: {words} took more than 20 s" in report
    assert "in forever" in report and "in _watch" in report
    assert trainer.run(config, run) == 0
