"""The picture of a sweep."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from blockjax.analysis.plots import BLUE, GREY, ORANGE, style

COLORS = (BLUE, ORANGE, "#2f855a", "#805ad5", "#b7791f", "#0987a0", "#b83280", "#4a5568")


class Curve(NamedTuple):
    """Validation of one run: steps, bits per byte, and whether the run is finished."""

    steps: Sequence[int]
    values: Sequence[float]
    finished: bool


def plot_sweep(finals: Mapping[str, Mapping[int, float]], curves: Mapping[str, Sequence[Curve]]) -> Figure:
    """Final bits per byte of every seed by setting, and validation curves in the same colours.

    Args:
      finals: setting -> seed -> bits per byte.
      curves: setting -> runs. The mean over finished ones has a band from the least to the greatest;
        others are dashed lines.
    """
    names = list(finals)
    colors = dict(zip(names, palette(len(names)), strict=True))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, max(4.0, 1.3 + 0.3 * len(names))), layout="constrained", width_ratios=(1, 1.1)
    )
    _draw_finals(left, finals, colors)
    for name, runs in curves.items():
        _draw_curves(right, runs, colors[name])
    _limit(right, curves)
    left.set(xlabel="bits per byte after the last step: seeds and mean")
    dashed = any(not run.finished for runs in curves.values() for run in runs)
    x = "training step" + " (dashed: not finished)" * dashed
    style(right, x, "bits per byte: mean and range over seeds")
    left.xaxis.set_major_locator(MaxNLocator(5))
    left.spines[["top", "right"]].set_visible(False)
    left.grid(alpha=0.25, axis="x")
    return figure


def palette(count: int) -> list:
    """Colours that can be told apart; for many, in the order of a colour map."""
    if count <= len(COLORS):
        return list(COLORS[:count])
    shades = plt.get_cmap("turbo")([0.05 + 0.9 * i / (count - 1) for i in range(count)])
    return [(0.85 * red, 0.85 * green, 0.85 * blue) for red, green, blue, _ in shades]  # yellow on white


def _draw_finals(ax, finals: Mapping[str, Mapping[int, float]], colors: Mapping) -> None:
    for row, (name, by_seed) in enumerate(finals.items()):
        values = [value for value in by_seed.values() if math.isfinite(value)]
        ax.plot(values, [row] * len(values), "o", color=colors[name], markersize=6, alpha=0.5, mew=0)
        if values:
            ax.plot([statistics.fmean(values)], [row], "|", color=colors[name], markersize=15, mew=2.4)
        else:
            # Placed by the axes: a number would change their limits.
            at = ax.get_yaxis_transform()
            ax.text(0.02, row, "none finished", transform=at, color=GREY, va="center")
    ax.set_ylim(len(finals) - 0.5, -0.5)
    ax.set_yticks(range(len(finals)), finals)


def _draw_curves(ax, runs: Sequence[Curve], color) -> None:
    finished = [run for run in runs if run.finished]
    for run in runs:
        if not run.finished:
            ax.plot(run.steps, run.values, "--", color=color, linewidth=0.9)
    if finished:
        at = [dict(zip(run.steps, run.values, strict=True)) for run in finished]
        steps = [step for step in finished[0].steps if all(step in values for values in at)]
        columns = [[values[step] for values in at] for step in steps]
        ax.fill_between(
            steps, list(map(min, columns)), list(map(max, columns)), color=color, alpha=0.18, lw=0
        )
        mark = "o-" if len(steps) < 12 else "-"
        ax.plot(steps, list(map(statistics.fmean, columns)), mark, color=color, linewidth=1.6, markersize=3.5)


def _limit(ax, curves) -> None:
    """Shows the later half of training in full: the first values fall steeply and would flatten it."""
    points = [p for runs in curves.values() for run in runs for p in zip(run.steps, run.values, strict=True)]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    half = max((step for step, _ in points), default=0) / 2
    later = [value for step, value in points if step >= half]
    if later:
        margin = 0.05 * (max(later) - min(later)) or 0.05
        ax.set_ylim(min(later) - margin, max(later) + margin)
