"""Bits per byte by position in the document: numbers of an evaluation, and their picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from etils import epath
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from blockjax.analysis.plots import save, style
from blockjax.analysis.sweep_plots import palette

PREFIX = "val/bits_per_byte_from/"


def by_position(values: Mapping[str, float]) -> dict[int, float]:
    """Of a line of `metrics.jsonl`: where each group of positions begins -> its bits per byte."""
    found = {int(key.removeprefix(PREFIX)): x for key, x in values.items() if key.startswith(PREFIX)}
    return dict(sorted(found.items()))


def plot_positions(runs: Mapping[str, Sequence[Mapping[int, float]]]) -> Figure:
    """A line a model: mean over its runs, such as seeds, with a band from the least to the greatest.

    Args:
      runs: name of a model -> of each of its runs, what `by_position` returns. A group of positions is drawn
        where all runs of a model have it.
    """
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    begins = sorted({begin for each in runs.values() for run in each for begin in run})
    for (name, each), color in zip(runs.items(), palette(len(runs)), strict=True):
        shown = [i for i, begin in enumerate(begins) if each and all(begin in run for run in each)]
        columns = [[run[begins[i]] for run in each] for i in shown]
        label = f"{name} ({len(each)} runs)" if len(each) > 1 else name
        means = list(map(statistics.fmean, columns))
        ax.plot(shown, means, "o-", color=color, linewidth=1.6, markersize=3.5, label=label)
        ax.fill_between(
            shown, list(map(min, columns)), list(map(max, columns)), color=color, alpha=0.18, lw=0
        )
    style(ax, "position in the document, tokens: from here to the next", "bits per byte")
    ax.set_xticks(range(len(begins)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda i, _: f"{begins[int(i)]:,}"))
    ax.tick_params("x", labelsize=8)
    ax.legend(frameon=False)
    return figure


def write(found: Mapping[str, Mapping[str, float]], folder: epath.Path) -> list[tuple[str, ...]]:
    """Draws evaluations of one run in `evaluation.png` of a folder.

    Args:
      found: name of an evaluation -> what it found, as `train.loop.evaluate` returns it.

    Returns:
      A table: a head, a line for each group of positions, and one for all of them.
    """
    groups = {name: by_position(values) for name, values in found.items()}
    save(plot_positions({name: [group] for name, group in groups.items()}), folder / "evaluation.png")
    head = ("from position", *found)
    begins = next(iter(groups.values()))
    lines = [(f"{begin:,}", *(f"{group[begin]:.4f}" for group in groups.values())) for begin in begins]
    return [head, *lines, ("all", *(f"{values['val/bits_per_byte']:.4f}" for values in found.values()))]
