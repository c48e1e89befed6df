"""Numbers worked out by hand, and words for what is missing."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
from etils import epath
from PIL import Image
from rich.console import Console

from blockjax.sweep.state import read_states
from blockjax.sweep.summary import cells, spread, summarise, write


@pytest.fixture
def written(plan):
    """`written()` summarises; returns the text, the numbers and what was printed."""

    def run():
        console = Console(file=io.StringIO(), width=80)
        path = write(plan, read_states(plan), console)
        numbers = json.loads((path.parent / "sweep.json").read_text(), parse_constant=pytest.fail)
        with Image.open(path.parent / "sweep.png") as image:
            assert min(image.size) > 300 and np.asarray(image.convert("L")).std() > 5
        return path.read_text(), numbers, console.file.getvalue()

    return run


def test_numbers(plan, make_run, written):
    # Means 2.0 and 1.75; deviations sqrt(2 * 0.1**2) and sqrt(2 * 0.25**2); pairs -0.4 and -0.1.
    make_run("full-seed0", {6: 3.0, 12: 2.1}, speed=100.0)
    make_run("full-seed1", {6: 3.2, 12: 1.9}, speed=300.0)
    make_run("window-8-seed0", {6: 2.5, 12: 1.7}, speed=7000.0)
    make_run("window-8-seed1", {6: 2.7, 12: 1.8}, speed=9000.0)
    first, second = summarise(plan, read_states(plan))
    assert first.bits == {0: 2.1, 1: 1.9} and first.difference is None
    assert first.over_seeds.mean == pytest.approx(2.0)
    assert first.over_seeds.deviation == pytest.approx(0.1 * math.sqrt(2))
    assert (first.over_seeds.low, first.over_seeds.high) == (1.9, 2.1)
    assert second.over_seeds.deviation == pytest.approx(0.05 * math.sqrt(2))
    assert second.difference.mean == pytest.approx(-0.25)
    assert second.difference.deviation == pytest.approx(0.15 * math.sqrt(2))  # of the pairs
    assert (first.tokens_per_second, second.tokens_per_second) == (200.0, 8000.0)

    text, numbers, printed = written()
    rows = [
        ["full", "2/2", "2.0000", "0.1414", "1.9000 .. 2.1000", "-", "200"],
        ["window-8", "2/2", "1.7500", "0.0707", "1.7000 .. 1.8000", "-0.2500 ± 0.2121", "8,000"],
    ]
    assert cells([first, second])[1:] == rows
    for row in rows:
        assert f"| {' | '.join(row)} |" in text
        assert row in [printed_row(line) for line in printed.splitlines()]
    assert "| to full |" in text and "| window-8 | `model.pattern=8`, `optimizer.learning_rate=1.0` |" in text
    assert "Not finished" not in text + printed
    assert numbers["settings"][1]["difference"]["mean"] == pytest.approx(-0.25)
    assert numbers["settings"][1]["overrides"] == plan.settings["window-8"]
    assert [run["bits_per_byte"] for run in numbers["runs"]] == [2.1, 1.9, 1.7, 1.8]


def printed_row(line):
    return [cell.strip() for cell in line.strip().split("  ") if cell.strip()]


def test_what_is_not_finished_is_named_and_left_out(plan, make_run, written, tmp_path):
    make_run("full-seed0", {6: 3.0, 12: 2.0})
    make_run("full-seed1", {12: 1.0}, checkpoint=False)
    make_run("window-8-seed1", {6: 2.5})
    (tmp_path / "sweep" / "window-8-seed1" / "log.txt").write_text("x\n--- exit code 0\n--- exit code -9\n")
    text, numbers, printed = written()
    for words in (
        "full-seed1, step 12 of 12",
        "window-8-seed0, not started",
        "window-8-seed1, failed with exit code -9 (step 6 of 12)",
    ):
        assert f"- {words}\n" in text and f"Not finished: {words}\n" in printed
    assert "| full | 1/2 | 2.0000 | - | - | - | 100 |" in text
    assert "| window-8 | 0/2 | - | - | - | - | 100 |" in text
    assert numbers["runs"][1]["bits_per_byte"] is None
    # Once it is started again, its end is not known.
    with (tmp_path / "sweep" / "window-8-seed1" / "log.txt").open("a") as log:
        log.write("--- python train.py\n")
    assert "window-8-seed1, step 6 of 12" in written()[0]


def test_bits_by_position_of_finished_runs(plan, make_run, written):
    make_run("full-seed0", {12: 2.0})
    make_run("window-8-seed0", {6: 2.5})
    folder = epath.Path(plan.folder)
    assert "positions.png" not in written()[0] and not (folder / "positions.png").exists()
    for name in ("full-seed0", "window-8-seed0"):
        line = {"step": 12, "val/bits_per_byte": 2.0}
        line |= {"val/bits_per_byte_from/0000": 3.0, "val/bits_per_byte_from/0064": 1.0}
        with (folder / name / "metrics.jsonl").open("a") as lines:
            lines.write(json.dumps(line) + "\n")
    text, numbers, _ = written()
    assert "(positions.png)" in text and (folder / "positions.png").exists()
    assert numbers["runs"][0]["bits_per_byte_from"] == {"0": 3.0, "64": 1.0}
    assert numbers["runs"][2]["bits_per_byte_from"] == {}  # no checkpoint of step 12


def test_differences_are_taken_over_common_seeds(plan, make_run):
    make_run("full-seed0", {12: 2.0})
    make_run("window-8-seed0", {12: 1.5})
    make_run("window-8-seed1", {12: 1.0})
    _, row = cells(summarise(plan, read_states(plan)))[1:]
    assert row[2] == "1.2500" and row[5] == "-0.5000 (1 of 2)"


def test_settings_with_bases_of_their_own(plan, make_run):
    for name, bits in (("full", 2.0), ("window-8", 1.5)):
        make_run(f"{name}-seed0", {12: bits})
    apart = dataclasses.replace(plan, bases={"full": "full", "window-8": "window-8"})
    head, *rows = cells(summarise(apart, read_states(plan)))
    assert head[5] == "to its base" and [row[5] for row in rows] == ["-", "-"]
    crossed = dataclasses.replace(plan, bases={"window-8": "window-8", "full": "window-8"})
    head, *rows = cells(summarise(crossed, read_states(plan)))
    assert head[5] == "to window-8" and [row[5] for row in rows] == ["-", "+0.5000"]


def test_a_run_that_diverged(plan, make_run, written):
    make_run("full-seed0", {12: math.nan})
    make_run("full-seed1", {12: math.inf})
    make_run("window-8-seed0", {12: 2.0})
    text, numbers, _ = written()
    assert "| full | 2/2 | nan | nan |" in text and numbers["runs"][0]["bits_per_byte"] is None


def test_spread():
    assert spread([]) is None
    one = spread([3.0])
    assert (one.mean, one.deviation, one.seeds) == (3.0, None, 1)


def test_in_a_bucket(sweep, bucket, make_run):
    """Trained here, kept there: the log is copied when a run ends."""
    folder = "gs://bucket/runs/x"
    make_run("full-seed0", {12: 1.0}, folder=folder)
    code, out = sweep(folder=folder, launcher="none")
    assert code == 0 and ["full", "1/2", "1.0000"] in [line.split()[:3] for line in out.splitlines()]
    assert "1/2 | 1.0000" in (epath.Path(folder) / "sweep.md").read_text()
    assert (epath.Path(folder) / "sweep.png").exists()
    code, out = sweep(folder=folder, fault="fail in full-seed1", only="full-seed1")
    log = (epath.Path(folder) / "full-seed1" / "log.txt").read_text()
    assert code == 1 and log.endswith("cannot be made\n--- exit code 1\n")
    assert "Not finished: full-seed1, failed with exit code 1" in out
