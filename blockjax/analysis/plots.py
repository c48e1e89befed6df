"""Pictures of a run."""

from __future__ import annotations

import math

import matplotlib

matplotlib.use("Agg", force=False)
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

BLUE, ORANGE, GREY = "#2b6cb0", "#c05621", "#a0aec0"


def series(lines: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one key of `metrics.jsonl`."""
    pairs = [(line["step"], line[key]) for line in lines if key in line]
    return [step for step, _ in pairs], [value for _, value in pairs]


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average over about the last twentieth of the values so far.

    The window grows with the run: the first values, far above all others, are soon forgotten.
    """
    average, out = 0.0, []
    for count, value in enumerate(values):
        average += (value - average) / (1 + count / 20)
        out.append(average)
    return out


def plot_loss(lines: list[dict]) -> Figure:
    """Training loss, smoothed and raw, and validation loss, in nats per token."""
    figure, ax = _axes("training step", "loss (nats per token)")
    steps, losses = series(lines, "train/loss")
    ax.plot(steps, losses, color=GREY, linewidth=0.6, alpha=0.7, label="train, each step")
    ax.plot(steps, smooth(losses), color=BLUE, linewidth=1.8, label="train, moving average")
    val_steps, val = series(lines, "val/loss")
    ax.plot(val_steps, val, "o-", color=ORANGE, linewidth=1.4, markersize=4, label="validation")
    shown = sorted(loss for loss in losses + val if math.isfinite(loss))
    if shown:
        # The first steps fall from ln V and would flatten everything after them.
        ax.set_ylim(0.95 * shown[0], 1.05 * shown[int(0.97 * (len(shown) - 1))])
    ax.legend(frameon=False)
    return figure


def plot_learning_rate(lines: list[dict]) -> Figure:
    """The learning rate of every step."""
    figure, ax = _axes("training step", "learning rate")
    ax.plot(*series(lines, "train/learning_rate"), color=BLUE, linewidth=1.8)
    ax.set_ylim(bottom=0)
    return figure


def _axes(x: str, y: str):
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    ax.set(xlabel=x, ylabel=y)
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    return figure, ax
