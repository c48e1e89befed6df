"""Schedules and layouts, compared by counts."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from blockjax.masks import BlockMask
from blockjax.parallel import compare
from blockjax.parallel.layouts import LAYOUTS, Layout
from blockjax.parallel.schedules import SCHEDULES


def counted(mask, layout="zigzag", K=8):
    return compare.count(mask, Layout.of(layout, mask.T, 8, mask.bq), compare.Shape(32, K, 128))


def test_rounds_are_those_of_the_schedules():
    rounds = {
        name: tuple(x.rounds for x in passes if x.sent)
        for name, passes in counted(BlockMask.full(8 * 1024, bq=128, bk=128)).items()
    }
    assert rounds == {
        "all_gather": (1, 2),
        "ring": (7, 8),
        "two_stream_ring": (4, 8),
        "ring_dma": (),
        "token_ring": (8, 8),
        "token_ring_direct": (8, 8),
        "halo": (),
    }


def test_a_window_makes_one_hop():
    found = counted(BlockMask.window(8 * 1024, left=512, bq=128, bk=128), "contiguous")
    assert found["ring"][0].rounds == found["halo"][0].rounds == 1
    assert found["halo"][0].sent.injected < found["ring"][0].sent.injected


def test_what_cannot_serve_says_why():
    forward, backward = counted(BlockMask.causal(8 * 1024, bq=128, bk=128))["halo"]
    assert forward.sent is backward.sent is None and "contiguous" in forward.refused


def test_the_command_prints_and_draws(tmp_path, capsys):
    picture = tmp_path / "balance.png"
    compare.main(f"--tokens 4096 --places 4 --block 128 --plot {picture}".split())
    said = capsys.readouterr().out
    for name in (*LAYOUTS, *SCHEDULES):
        assert name in said
    assert "zigzag     │           100%" in said and "halo cannot serve" in said
    assert picture.stat().st_size > 10_000
    with pytest.raises(SystemExit, match="windows:9"):
        compare.main(["--mask", "windows:9"])


def test_the_picture_shows_the_work():
    tables = compare.balance(BlockMask.causal(4096, bq=128, bk=128), 4, 128)
    figure = compare.plot_balance(tables)
    *axes, _ = figure.axes
    assert [ax.get_title().partition("\n")[0] for ax in axes] == list(LAYOUTS)
    for ax, table in zip(axes, tables.values(), strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), table)
        assert table.sum() == 32 * 33 / 2
    plt.close(figure)
