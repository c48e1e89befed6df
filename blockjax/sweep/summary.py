"""What a sweep found: settings compared over seeds, in `sweep.md`, `sweep.json` and `sweep.png`."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping

from etils import epath
from rich.console import Console
from rich.table import Table

from blockjax.analysis.plots import save, series
from blockjax.analysis.positions import plot_positions
from blockjax.analysis.sweep_plots import Curve, plot_sweep
from blockjax.sweep.plan import Plan, as_text
from blockjax.sweep.state import BITS, RunState


@dataclasses.dataclass(frozen=True)
class Spread:
    """A mean over seeds.

    Attributes:
      mean: of the values.
      deviation: sample standard deviation (divisor n - 1); None of a single value.
      low, high: least and greatest.
      seeds: number of values.
    """

    mean: float
    deviation: float | None
    low: float
    high: float
    seeds: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting.

    Attributes:
      setting: its name.
      asked: runs planned.
      bits: final validation bits per byte of the finished runs, by seed.
      over_seeds: their spread; None before the first is finished.
      base: the setting that it is compared to; its own name: none.
      difference: to the base, seed by seed; None without one and without a common seed.
      tokens_per_second: median over all steps of all runs.
    """

    setting: str
    asked: int
    bits: dict[int, float]
    over_seeds: Spread | None
    base: str
    difference: Spread | None
    tokens_per_second: float | None


def summarise(plan: Plan, states: Mapping[str, RunState]) -> list[Row]:
    """A row for each setting, in the order of the config file."""
    rows: dict[str, Row] = {}
    for setting, base in plan.bases.items():
        runs = [run for run in plan.runs if run.setting == setting]
        bits = {run.seed: states[run.name].bits for run in runs if states[run.name].finished}
        speeds = [x for run in runs for x in series(states[run.name].lines, "train/tokens_per_second")[1]]
        other = {} if base == setting else rows[base].bits
        paired = [value - other[seed] for seed, value in bits.items() if seed in other]
        median = statistics.median(speeds) if speeds else None
        rows[setting] = Row(setting, len(runs), bits, spread(bits.values()), base, spread(paired), median)
    return list(rows.values())


def spread(values) -> Spread | None:
    """Mean and spread of some numbers; None of none."""
    values = list(values)
    if not values:
        return None
    # statistics.stdev fails on infinities, which a run that diverged may end with.
    finite = all(map(math.isfinite, values))
    deviation = (statistics.stdev(values) if finite else math.nan) if len(values) > 1 else None
    mean = statistics.fmean(values)
    return Spread(mean, deviation, min(values), max(values), len(values))


def write(plan: Plan, states: Mapping[str, RunState], console: Console) -> epath.Path:
    """Writes table, numbers and plot into the sweep folder and prints the table.

    Returns:
      Path of `sweep.md`.
    """
    rows, folder = summarise(plan, states), epath.Path(plan.folder)
    folder.mkdir(parents=True, exist_ok=True)
    save(plot_sweep({row.setting: row.bits for row in rows}, curves(plan, states)), folder / "sweep.png")
    pictures = {"Final bits per byte of every seed, and validation curves": "sweep.png"}
    if positions := positions_of(plan, states):
        save(plot_positions(positions), folder / "positions.png")
        pictures["Final bits per byte by position in the document"] = "positions.png"
    (folder / "sweep.json").write_text(json.dumps(as_json(plan, states, rows), indent=2))
    (folder / "sweep.md").write_text(render(plan, states, rows, pictures))
    show(rows, console)
    for line in unfinished(plan, states):
        console.print(f"Not finished: {line}", highlight=False, markup=False, soft_wrap=True)
    return folder / "sweep.md"


def positions_of(plan: Plan, states: Mapping[str, RunState]) -> dict[str, list[dict[int, float]]]:
    """Of each setting, bits per byte by position in the document of its finished runs that have them."""
    found: dict[str, list[dict[int, float]]] = {}
    for run in plan.runs:
        if values := states[run.name].positions:
            found.setdefault(run.setting, []).append(values)
    return found


def curves(plan: Plan, states: Mapping[str, RunState]) -> dict[str, list[Curve]]:
    """Validation curves of the runs of each setting."""
    found: dict[str, list[Curve]] = {setting: [] for setting in plan.settings}
    for run in plan.runs:
        state = states[run.name]
        found[run.setting].append(Curve(*series(state.lines, BITS), state.finished))
    return found


EXPLANATION = """\
Validation after the last step: mean over seeds, sample standard deviation, least and greatest. The difference
is taken seed by seed, with the standard deviation of the differences. Tokens/s is the median over steps."""

COLUMNS = ("setting", "runs", "bits per byte", "s.d.", "min .. max", "to {base}", "tokens/s")


def cells(rows: list[Row]) -> list[list[str]]:
    """The table in words: a head and a line for each setting."""
    bases = {row.base for row in rows}
    lines = [[column.format(base=rows[0].base if len(bases) == 1 else "its base") for column in COLUMNS]]
    for row in rows:
        s, d = row.over_seeds, row.difference
        lines.append(
            [
                row.setting,
                f"{len(row.bits)}/{row.asked}",
                f"{s.mean:.4f}" if s else "-",
                f"{s.deviation:.4f}" if s and s.deviation is not None else "-",
                f"{s.low:.4f} .. {s.high:.4f}" if s and s.seeds > 1 else "-",
                _difference(d)
                + (f" ({d.seeds} of {s.seeds})" if d and d.seeds < s.seeds else "")
                + (f" to {row.base}" if d and len(bases) > 1 else ""),
                f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else "-",
            ]
        )
    return lines


def _difference(d: Spread | None) -> str:
    if d is None:
        return "-"
    return f"{d.mean:+.4f}" + ("" if d.deviation is None else f" ± {d.deviation:.4f}")


def show(rows: list[Row], console: Console) -> None:
    """Prints the table."""
    head, *lines = cells(rows)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(head):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    # Where the terminal is narrow, lines go on in the next one; cells stay whole.
    table.width = console.measure(table, options=console.options.update(width=1000)).maximum
    console.print(table, highlight=False, markup=False, crop=False, soft_wrap=True)


def unfinished(plan: Plan, states: Mapping[str, RunState]) -> list[str]:
    """The runs that are not finished and how far they are."""
    return [
        f"{run.name}, {states[run.name].describe(run.steps)}"
        for run in plan.runs
        if not states[run.name].finished
    ]


def as_json(plan: Plan, states: Mapping[str, RunState], rows: list[Row]) -> dict:
    """Everything in the table, and the state of every run. What is not finite is null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    settings = [
        plain(dataclasses.asdict(row)) | {"overrides": dict(plan.settings[row.setting])} for row in rows
    ]
    runs = [
        {
            "name": run.name,
            "setting": run.setting,
            "seed": run.seed,
            "state": states[run.name].describe(run.steps),
            "step": states[run.name].step,
            "steps": run.steps,
            "bits_per_byte": plain(states[run.name].bits),
            "bits_per_byte_from": plain(states[run.name].positions),
        }
        for run in plan.runs
    ]
    return {"config": plan.spec, "common": dict(plan.common), "settings": settings, "runs": runs}


def render(plan: Plan, states: Mapping[str, RunState], rows: list[Row], pictures: Mapping[str, str]) -> str:
    """The text of `sweep.md`, with the names of pictures by what they show."""
    everywhere = f", all runs with {_sets(plan.common)}" if plan.common else ""
    missing = [f"- {line}" for line in unfinished(plan, states)]
    own = [["setting", "sets"], *([setting, _sets(values)] for setting, values in plan.settings.items())]
    parts = [
        f"# {epath.Path(plan.folder).name}",
        f"Config `{plan.spec}`{everywhere}.",
        _markdown(cells(rows)),
        EXPLANATION,
        "\n".join(["Not finished, and left out of the table:", "", *missing]) if missing else "",
        *(f"![{shown}]({name})" for shown, name in pictures.items()),
        _markdown(own),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _markdown(lines: list[list[str]]) -> str:
    head, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rest])


def _sets(values: Mapping) -> str:
    return ", ".join(f"`{key}={as_text(value)}`".replace("|", r"\|") for key, value in values.items()) or "-"
