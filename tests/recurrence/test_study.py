"""The study of `configs/recurrence.py` compares models of one size."""

import pathlib

import pytest

from blockjax.sweep.plan import collect
from blockjax.train.config import check, load_config

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs/recurrence.py")
KINDS = ("dense", "window", "brt", "lightning", "gdn", "hybrid")


@pytest.mark.parametrize("arg", ["small", "30m", "125m"])
def test_all_kinds_have_as_many_parameters_and_see_the_same_text(arg):
    spec = f"{CONFIG}:{arg}"
    dense = check(load_config(f"{spec},kind=dense"))
    runs = collect(spec, "runs/x", load_config(spec)).runs
    assert [run.name for run in runs] == [f"{kind}-seed{seed}" for kind in KINDS for seed in range(3)]
    for run in runs:
        model = check(run.config)
        assert model.num_params() == pytest.approx(dense.num_params(), rel=0.01), run.name
        assert run.config.data.carry == model.recurrent == (run.setting not in KINDS[:2])
        data, expected = run.config.data.to_dict(), runs[0].config.data.to_dict()
        assert data | {"carry": False} == expected, run.name
    assert len({run.config.model.pattern for run in runs}) == len(KINDS)
    assert check(runs[0].config).ffn == dense.ffn
