"""Pictures of a run."""

from __future__ import annotations

import io
import math
import pathlib

import matplotlib.pyplot as plt
import numpy as np
from etils import epath
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

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


LOCALITY = {
    "fidelity": ("share of attention on local keys", 1.0),
    "relative_entropy": ("entropy relative to uniform", 1.0),
    "entropy": ("entropy (bits)", None),
}
"""What `plot_locality` draws, from left to right: the label and the upper end of the axis."""


def plot_locality(values: dict[str, np.ndarray], windows: list[int | None] | None = None) -> Figure:
    """Attention statistics of every layer: the heads as faint dots, their mean as a line.

    `values` has one or more arrays [L, N] under names of `AttentionStatistics`, NaN where there is nothing to
    show; each gets a panel. `windows`, one a layer, are drawn above them; None is full attention.
    """
    shown = [key for key in LOCALITY if key in values]
    figure, grid = plt.subplots(
        2 if windows else 1, len(shown), figsize=(0.4 + 4 * len(shown), 4.8 if windows else 4), sharex=True,
        height_ratios=[1, 4] if windows else None, squeeze=False, layout="constrained",
    )  # fmt: skip
    figure.get_layout_engine().set(w_pad=0.1)
    for ax, key in zip(grid[-1], shown, strict=True):
        label, top = LOCALITY[key]
        heads = np.ma.masked_invalid(values[key])
        layers = np.arange(len(heads))
        dots = dict(color=GREY, markersize=3.5, alpha=0.55, markeredgewidth=0)
        ax.plot(layers, heads, "o", **dots, label=["each head", *[None] * (heads.shape[1] - 1)])
        ax.plot(layers, heads.mean(1), "o-", color=BLUE, linewidth=1.8, markersize=4.5, label="mean of heads")
        style(ax, "layer", label)
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        ax.set_xlim(-0.6, len(heads) - 0.4)
        ax.set_ylim(0, None if top is None else 1.03 * top)
    grid[-1, -1].legend(frameon=False)
    if windows:
        for ax in grid[0]:
            _draw_windows(ax, windows)
        grid[0, 0].set_ylabel("window\n(tokens)")
    return figure


def _draw_windows(ax, windows: list[int | None]):
    """A bar a layer, on a log scale; full attention ends above the widest window."""
    widths = sorted({width for width in windows if width is not None})
    low, high = (widths[0], widths[-1]) if widths else (1, 1)
    bottom, full = low / 2, 4 * high
    tops = np.array([full if width is None else width for width in windows])
    colors = [ORANGE if width is None else GREY for width in windows]
    ax.bar(np.arange(len(tops)), tops - bottom, 0.7, bottom, color=colors, alpha=0.8)
    style(ax, "", "")
    ax.set_yscale("log")
    ax.set_ylim(bottom, 1.3 * full)
    # Closer than a factor of 2 the labels of the narrowest and the widest would overlap.
    marked = [low, high] if high >= 2 * low else widths[-1:]
    ticks = {width: f"{width:,}" for width in marked} | ({full: "full"} if None in windows else {})
    ax.set_yticks(list(ticks), list(ticks.values()))
    ax.minorticks_off()


def plot_depth_weights(weights: np.ndarray, labels_sources: list[str], labels_rows: list[str]) -> Figure:
    """How much each reading sublayer (row, the last is the output head) takes from each source (column).

    `weights` is [rows, sources], mean softmax weights; NaN, a source that does not exist yet, stays blank.
    """
    figure, ax = _heat_map(weights, "mean weight", labels_sources, labels_rows, pitch=(0.3, 0.22))
    ax.set(xlabel="source", ylabel="reading sublayer")
    return figure


def plot_token_weights(weights: np.ndarray, tokens: list[str], labels_sources: list[str]) -> Figure:
    """How much one reader takes from each source (rows) at each token (columns).

    `weights` is [T, sources]. Up to 100 tokens are written below their columns, escaped where they cannot be
    printed; more are counted.
    """
    text = [token if token.isprintable() else repr(token)[1:-1] for token in tokens]
    text = text if len(text) <= 100 else None
    figure, ax = _heat_map(
        np.transpose(weights), "weight", text, labels_sources, pitch=(0.16, 0.24), family="monospace"
    )
    ax.set(xlabel="token", ylabel="source")
    return figure


def plot_phases(similarity: np.ndarray, starts: list[int]) -> Figure:
    """How alike the outputs of layers are, [L, L] of cosines, and the phases into which they are cut.

    `starts` holds the first layer of each phase; a frame is drawn around each.
    """
    L = len(similarity)
    labels = [str(i) for i in range(L)]
    figure, ax = plt.subplots(layout="constrained")
    low = min(0.0, float(np.min(similarity)))
    image = ax.imshow(similarity, cmap="viridis", vmin=low, vmax=1, interpolation="none")
    size = float(np.clip(0.3 * L, 3.5, 10))
    room = _thin_labels(ax, "y", labels, size) + _thin_labels(ax, "x", labels, size)
    figure.set_size_inches(size + room + 1.2, size + 0.6)
    for start, stop in zip(starts, [*starts[1:], L], strict=True):
        corner, side = (start - 0.5, start - 0.5), stop - start
        frame = dict(fill=False, edgecolor=ORANGE, linewidth=2.5, clip_on=False)
        ax.add_patch(plt.Rectangle(corner, side, side, **frame))
    figure.colorbar(image, label="mean cosine of outputs", fraction=0.046)
    ax.set(xlabel="layer", ylabel="layer")
    return figure


def _heat_map(values, label: str, columns: list[str] | None, rows: list[str], *, pitch, family=None):
    """A picture of weights between 0 and 1, NaN blank, `pitch` inches a cell where that is a sensible size.

    Colours follow the square root, so that small weights differ too.
    """
    shape = np.shape(values)[::-1]
    width, height = np.clip(np.multiply(pitch, shape), (4.5, 1.8), (14, 10))
    figure, ax = plt.subplots(layout="constrained")
    image = ax.imshow(
        np.ma.masked_invalid(values), cmap="viridis", norm=PowerNorm(0.5, vmin=0, vmax=1), aspect="auto",
        interpolation="none",
    )  # fmt: skip
    left = _thin_labels(ax, "y", rows, height)
    below = 0 if columns is None else _thin_labels(ax, "x", columns, width, family)
    figure.set_size_inches(width + left + 1.2, height + below + 0.6)
    bar = figure.colorbar(image, label=label, fraction=0.16 / (width + 1), aspect=height / 0.14, pad=0.015)
    bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1])
    bar.ax.tick_params(labelsize=8)
    bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    return figure, ax


def _thin_labels(ax, axis: str, labels: list[str], inches: float, family=None) -> float:
    """Labels every 1, 2, 4, ... cells, as many as fit, the last one always; returns the room they take.

    Powers of two, so that labels which alternate between two kinds of sublayer keep to one of them.
    """
    step = 1
    while inches / len(labels) * step < 0.135:
        step *= 2
    at = range((len(labels) - 1) % step, len(labels), step)
    longest = 0.065 * max(len(labels[i]) for i in at)
    turned = axis == "x" and longest > inches / len(labels) * step
    text = dict(family=family, fontsize=8, parse_math=False, rotation=90 if turned else 0)
    ax.set(**{f"{axis}ticks": at})
    getattr(ax, f"set_{axis}ticklabels")([labels[i] for i in at], **text)
    ax.tick_params(axis, length=2)
    return longest if turned or axis == "y" else 0.15


def _axes(x: str, y: str):
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    style(ax, x, y)
    return figure, ax


def save(figure: Figure, path: pathlib.Path | epath.Path) -> None:
    """Writes a figure as PNG, to disk or a bucket, and closes it."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    plt.close(figure)
    path.write_bytes(picture.getvalue())


def style(ax, x: str, y: str) -> None:
    """Labels, whole steps with separators, a light grid and no box."""
    ax.set(xlabel=x, ylabel=y)
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
