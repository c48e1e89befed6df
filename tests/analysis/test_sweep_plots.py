import math

import matplotlib.pyplot as plt
import numpy as np
import pytest

from blockjax.analysis.sweep_plots import COLORS, Curve, palette, plot_sweep


def drawn(finals, curves):
    figure = plot_sweep(finals, curves)
    figure.canvas.draw()
    plt.close(figure)
    return figure


@pytest.mark.parametrize(
    "runs",
    [
        [],
        [Curve([], [], False)],
        [Curve([5], [2.0], True)],
        [Curve([5, 10], [3.0, math.nan], True), Curve([5], [3.1], False)],
    ],
    ids=len,
)
def test_any_sweep_can_be_drawn(runs):
    finals = {"full": {i: run.values[-1] for i, run in enumerate(runs) if run.finished}}
    drawn(finals, {"full": runs})


def test_every_seed_is_a_dot_and_the_mean_a_bar():
    figure = drawn({"a": {0: 1.0, 1: 2.0}, "b": {}}, {"a": [], "b": []})
    dots, bar, *_ = figure.axes[0].lines
    assert list(dots.get_xdata()) == [1.0, 2.0] and list(bar.get_xdata()) == [1.5]
    assert [text.get_text() for text in figure.axes[0].texts] == ["none finished"]


def test_curves_are_the_mean_over_finished_runs_with_their_range():
    runs = [Curve([5, 10], [4.0, 2.0], True), Curve([5, 10], [5.0, 3.0], True), Curve([5], [9.0], False)]
    ax = drawn({"a": {}}, {"a": runs}).axes[1]
    dashed, mean = ax.lines
    assert dashed.get_linestyle() == "--" and list(dashed.get_ydata()) == [9.0]
    assert list(mean.get_ydata()) == [4.5, 2.5]
    (band,) = ax.collections
    assert {tuple(point) for point in band.get_paths()[0].vertices} == {(5, 4), (5, 5), (10, 2), (10, 3)}
    assert "not finished" in ax.get_xlabel()


def test_the_first_values_do_not_flatten_the_rest():
    steps = list(range(100))
    ax = drawn({"a": {}}, {"a": [Curve(steps, [1.0 + 9.0 * (step < 20) for step in steps], True)]}).axes[1]
    assert ax.get_ylim()[1] < 1.2


@pytest.mark.parametrize("count", [1, len(COLORS), 9, 30])
def test_settings_have_colours_of_their_own(count):
    names = [f"setting-{i}" for i in range(count)]
    assert len({plt.matplotlib.colors.to_hex(color) for color in palette(count)}) == count
    figure = drawn({name: {0: 1.0} for name in names}, {name: [] for name in names})
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    gaps = np.abs(np.diff([box.y0 for box in boxes]))
    assert (gaps > boxes[0].height).all()  # names do not overlap
