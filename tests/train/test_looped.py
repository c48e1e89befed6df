"""A looped transformer in the trainer."""

import jax
import numpy as np
import pytest

from blockjax.errors import UsageError
from blockjax.train import config as configs
from blockjax.train import loop
from blockjax.train.metrics import read_metrics
from blockjax.train.run import open_run

pytestmark = pytest.mark.usefixtures("dense_attention")


@pytest.mark.exhaustive
def test_a_loop_learns_and_may_be_repeated_more_often_later(tiny, one_device, tmp_path):
    """A curriculum: the same folder goes on with another count, the same parameters and optimizer."""
    shape = dict(model__depth=3, model__loop="1,1*2", model__pattern="full", run__checkpoint_every=8)
    with one_device():
        loop.train(tiny(**shape, run__steps=8), str(tmp_path), quiet=True)
        run = loop.train(tiny(**shape, run__steps=16, run__repeats=3), str(tmp_path), quiet=True)
    losses = {
        x["step"]: x["train/loss"] for x in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in x
    }
    assert losses[16] < losses[8] < losses[4] and losses[16] < 0.9 * losses[4]
    assert run.model.config.loop == "1,1*3" and run.model.config.distinct == 2
    opened = open_run(str(tmp_path))
    assert opened.step == 16 and opened.model.config.loop == "1,1*2"
    assert any(np.any(np.abs(x) > 1e-3) for x in jax.tree.leaves(run.model.condition.outer_bias[...]))


def test_what_does_not_fit_is_refused(tiny):
    with pytest.raises(UsageError, match=r"'1,2\*2'.*5 layers.*depth=2"):
        configs.check(tiny(model__loop="1,2*2"))
    with pytest.raises(UsageError, match="repeated 3 times"):
        configs.check(tiny(run__repeats=3))
    carried = dict(model__pattern="gdn", model__loop="1*2", data__order="stream", data__carry=True)
    configs.check(tiny(**carried))
    with pytest.raises(UsageError, match=r"run.repeats=0, not 3"):
        configs.check(tiny(**carried, run__repeats=3))
