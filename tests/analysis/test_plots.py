import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest

from blockjax.analysis.plots import (
    plot_depth_weights,
    plot_learning_rate,
    plot_locality,
    plot_loss,
    plot_phases,
    plot_token_weights,
    series,
    smooth,
)


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


def locality(layers, heads):
    values = np.random.default_rng(0).uniform(size=(layers, heads))
    return dict(entropy=9 * values, fidelity=values, relative_entropy=values**2)


@pytest.mark.parametrize(("layers", "heads", "windows"), [
    (1, 1, None), (1, 1, [None]), (1, 1, [1]), (2, 8, None), (12, 1, [512] * 12),
    (192, 16, [*range(1, 192), None]),
], ids=lambda x: str(x)[:6])  # fmt: skip
def test_locality_of_any_model_can_be_drawn(layers, heads, windows):
    figure = plot_locality(locality(layers, heads), windows)
    figure.canvas.draw()
    assert len(figure.axes) == (6 if windows else 3)
    for ax in figure.axes[-3:]:
        line = ax.lines[-1]
        np.testing.assert_array_equal(line.get_xdata(), np.arange(layers))
        assert ax.get_xlim()[0] < 0 and layers - 1 < ax.get_xlim()[1]
        assert (ax.get_xticks() % 1 == 0).all() and 0 in ax.get_xticks()
    plt.close(figure)


def test_locality_shows_the_mean_of_the_heads_that_are_there():
    values = locality(4, 3)
    del values["entropy"]
    values["fidelity"][1] = math.nan
    values["fidelity"][2, 0] = math.nan
    figure = plot_locality(values)
    fidelity, relative = figure.axes
    assert "share" in fidelity.get_ylabel() and fidelity.get_ylim()[0] == 0
    drawn = np.ma.filled(fidelity.lines[-1].get_ydata(), math.nan)
    assert math.isnan(drawn[1])
    np.testing.assert_allclose(drawn[2], values["fidelity"][2, 1:].mean())
    np.testing.assert_allclose(relative.lines[-1].get_ydata(), values["relative_entropy"].mean(1))
    plt.close(figure)


@pytest.mark.parametrize(("windows", "labels"), [
    ([None, 2048, 300, 64], {"64": 64, "2,048": 2048, "full": 8192}),
    ([300, 512, 512, 512], {"512": 512}),
    ([None] * 4, {"full": 4}),
], ids=["all kinds", "close", "full"])  # fmt: skip
def test_windows_are_bars_over_their_layers(windows, labels):
    figure = plot_locality(locality(4, 2), windows)
    figure.canvas.draw()
    for ax in figure.axes[:3]:
        assert ax.get_yscale() == "log"
        shown = zip(ax.get_yticklabels(), ax.get_yticks(), strict=True)
        assert {label.get_text(): tick for label, tick in shown} == labels
        assert_readable(ax.get_yticklabels(), vertical=True)
        tops = [bar.get_y() + bar.get_height() for bar in ax.patches]
        np.testing.assert_allclose(tops, [labels["full"] if w is None else w for w in windows])
        np.testing.assert_allclose([bar.get_x() + 0.35 for bar in ax.patches], range(4), atol=1e-9)
        assert min(bar.get_height() for bar in ax.patches) > 0 and ax.get_ylim()[1] > max(tops)
    plt.close(figure)


def staircase(rows, columns):
    """Sources that do not exist yet are NaN."""
    weights = np.random.default_rng(0).uniform(0, 0.4, (rows, columns))
    weights[np.arange(columns) > 1 + np.arange(rows)[:, None] * columns // rows] = math.nan
    return weights


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (9, 2), (49, 10), (98, 97), (193, 193)])
def test_depth_weights_of_any_model_can_be_read(rows, columns):
    sources = ["embedding", *(f"block {i}" for i in range(1, columns))]
    readers = [*(f"attention {i}" for i in range(rows - 1)), "output head"]
    figure = plot_depth_weights(staircase(rows, columns), sources, readers)
    figure.canvas.draw()
    ax, bar = figure.axes
    assert bar.get_ylim() == (0, 1)
    assert_readable(ax.get_yticklabels(), vertical=True)
    assert_readable(ax.get_xticklabels(), vertical=False)
    for tick, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True):
        assert label.get_text() == readers[tick]
    assert ax.get_yticks()[-1] == rows - 1
    assert len(ax.get_yticks()) > min(rows, 30) - 1
    assert_inside(figure)
    plt.close(figure)


def test_missing_sources_are_blank_and_zero_is_not():
    weights = np.array([[1.0, math.nan], [0.0, 0.002]])
    figure = plot_depth_weights(weights, ["embedding", "block 1"], ["attention 0", "output head"])
    (one, blank), (zero, small) = colours(figure, weights.shape)
    assert (blank == 255).all()
    assert (zero < 100).all() and (abs(small.astype(int) - zero) > 3).any() and one[0] > 200
    plt.close(figure)


@pytest.mark.parametrize("text", [
    "a", "To be, or not\nto be\t$x$ \x00", "x" * 96, "y" * 300, ["<|begin|>", " the", "\n", ".", "$x$"],
], ids=["one", "escapes", "96", "300", "words"])  # fmt: skip
@pytest.mark.parametrize("sources", [1, 193])
def test_token_weights_of_any_text_can_be_read(text, sources):
    weights = np.random.default_rng(0).uniform(size=(len(text), sources))
    labels = ["embedding", *(f"block {i}" for i in range(1, sources))]
    figure = plot_token_weights(weights, list(text), labels)
    figure.canvas.draw()
    ax = figure.axes[0]
    assert_readable(ax.get_yticklabels(), vertical=True)
    if len(text) <= 100:
        assert not any(label.get_parse_math() for label in ax.get_xticklabels())
        shown = [label.get_text() for label in ax.get_xticklabels()]
        assert shown == [token.translate({10: "\\n", 9: "\\t", 0: "\\x00"}) for token in text]
    assert_readable(ax.get_xticklabels(), vertical=False)
    assert_inside(figure)
    plt.close(figure)


def test_token_weights_have_tokens_along_x():
    weights = np.array([[1.0, 0.0], [0.0, 1.0], [math.nan, 1.0]])
    figure = plot_token_weights(weights, list("abc"), ["embedding", "block 1"])
    embedding, block = colours(figure, (2, 3))
    assert embedding[0][0] > 200 and block[0][0] < 100 and block[2][0] > 200
    assert (embedding[2] == 255).all()
    plt.close(figure)


def colours(figure, shape):
    """RGB in the middle of each cell of the first axes, as drawn."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[::-1, :, :3]
    rows, columns = np.indices(shape)
    at = figure.axes[0].transData.transform(np.stack([columns.ravel(), rows.ravel()], 1)).astype(int)
    return pixels[at[:, 1], at[:, 0]].reshape(*shape, 3)


def assert_readable(labels, *, vertical):
    """No label touches the next."""
    boxes = [label.get_window_extent() for label in labels if label.get_text().strip()]
    edges = sorted((box.y0, box.y1) if vertical else (box.x0, box.x1) for box in boxes)
    assert all(a[1] <= b[0] + 0.5 for a, b in itertools.pairwise(edges))


def assert_inside(figure):
    width, height = figure.canvas.get_width_height()
    for ax in figure.axes:
        box = ax.get_tightbbox()
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1


def test_phases_are_framed_and_cover_the_diagonal():
    x = np.linspace(1, -0.2, 6)
    figure = plot_phases(x[np.abs(np.subtract.outer(np.arange(6), np.arange(6)))], [0, 1, 4])
    figure.canvas.draw()
    ax = figure.axes[0]
    frames = [patch.get_bbox().bounds for patch in ax.patches]
    assert frames == [(-0.5, -0.5, 1, 1), (0.5, 0.5, 3, 3), (3.5, 3.5, 2, 2)]
    assert ax.images[0].get_clim() == (pytest.approx(-0.2), 1)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == list("012345")
    plt.close(figure)
