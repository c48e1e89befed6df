"""Bits per byte by position: what is drawn, and what is written."""

import matplotlib.pyplot as plt
import numpy as np
from etils import epath
from PIL import Image

from blockjax.analysis.positions import PREFIX, by_position, plot_positions, write


def values(*bits, total=2.0):
    begins = (0, 64, 128, 1024)
    return {f"{PREFIX}{b:04}": x for b, x in zip(begins, bits, strict=False)} | {"val/bits_per_byte": total}


def test_groups_are_in_the_order_of_positions():
    line = dict(reversed(values(3.0, 2.0, 1.0, 0.5).items())) | {"val/loss": 1.0, "step": 3}
    assert list(by_position(line).items()) == [(0, 3.0), (64, 2.0), (128, 1.0), (1024, 0.5)]


def test_a_line_is_the_mean_of_runs_with_their_range_where_all_have_one():
    seeds = [by_position(values(3.0, 2.0, 1.0)), by_position(values(5.0, 2.5))]
    figure = plot_positions({"gdn": seeds, "dense": [by_position(values(1.0, 1.5, 2.0, 2.5))]})
    figure.canvas.draw()
    (ax,) = figure.axes
    gdn, dense = ax.lines
    assert list(gdn.get_xdata()) == [0, 1] and list(gdn.get_ydata()) == [4.0, 2.25]
    assert list(dense.get_xdata()) == [0, 1, 2, 3]
    band = {tuple(point) for point in ax.collections[0].get_paths()[0].vertices}
    assert band == {(0, 3), (0, 5), (1, 2), (1, 2.5)}
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "64", "128", "1,024"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["gdn (2 runs)", "dense"]
    plt.close(figure)


def test_the_evaluations_of_a_run_side_by_side(tmp_path):
    table = write({"carried": values(3.0, 1.0), "reset": values(3.0, 1.5, total=2.25)}, epath.Path(tmp_path))
    assert table == [
        ("from position", "carried", "reset"),
        ("0", "3.0000", "3.0000"),
        ("64", "1.0000", "1.5000"),
        ("all", "2.0000", "2.2500"),
    ]
    with Image.open(tmp_path / "evaluation.png") as image:
        assert np.asarray(image.convert("L")).std() > 5
