import math

import matplotlib.pyplot as plt
import numpy as np
import pytest

from blockjax.analysis.plots import plot_learning_rate, plot_loss, series, smooth


def test_series_takes_lines_that_have_the_key():
    lines = [{"step": 1, "a": 2.0}, {"step": 1, "b": 3.0}, {"step": 4, "a": 5.0}]
    assert series(lines, "a") == ([1, 4], [2.0, 5.0])
    assert series(lines, "c") == ([], [])


def test_smoothing_starts_at_the_first_value_and_forgets_it():
    assert smooth([]) == [] and smooth([7.0]) == [7.0]
    falling = [5.0, *[1.0] * 400]
    assert smooth(falling)[0] == 5.0 and smooth(falling)[10] < 1.1
    noise = np.random.default_rng(0).normal(size=2000)
    assert np.std(smooth(noise.tolist())[500:]) < 0.25


@pytest.mark.parametrize("losses", [[], [2.0], [6.0, 3.0, math.nan], list(np.linspace(6, 1, 300))], ids=len)
def test_any_run_can_be_drawn(losses):
    lines = [{"step": i, "train/loss": x, "train/learning_rate": 0.1} for i, x in enumerate(losses, 1)]
    lines += [{"step": len(losses), "val/loss": 2.0}]
    for figure in (plot_loss(lines), plot_learning_rate(lines)):
        figure.canvas.draw()
        plt.close(figure)


def test_the_first_steps_do_not_flatten_the_rest():
    lines = [{"step": i, "train/loss": 1.0 + 9.0 * (i < 5)} for i in range(400)]
    figure = plot_loss(lines)
    assert figure.axes[0].get_ylim()[1] < 2
    plt.close(figure)
