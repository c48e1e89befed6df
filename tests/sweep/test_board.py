import io
import re

import pytest
from rich.console import Console

from blockjax.sweep import board as module
from blockjax.sweep.board import Board


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    time = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: time[0])
    return time


def test_plain_lines_where_there_is_no_terminal(clock):
    console = Console(file=io.StringIO(), width=80)
    with Board(console, {"a": 100, "b": 100, "c": 50}, {"a": 50, "b": 0, "c": 0}) as board:
        board.start("a")
        board.start("b")
        clock[0] = 30.0
        board.update("a", 60, "loss 2.000")  # less than a minute: not said
        clock[0] = 100.0
        board.update("b", 10, "loss 3.000")
        clock[0] = 200.0
        board.end("a", "finished")
        board.end("b", "failed with exit code 1")
        board.start("c")
    assert console.file.getvalue().splitlines() == [
        "a starts, 1 of 3.",
        "b starts, 2 of 3.",
        # 20 steps in 100 s; 40 + 90 + 50 are to do.
        "b 10/100  loss 3.000  0:01:40; all runs: 0:01:40 so far, about 0:15:00 left.",
        # 60 steps in 200 s; then the rest of b is not done any more.
        "a finished after 0:03:20; 1 of 3 ended, 0:03:20 so far, about 0:07:47 left.",
        "b failed with exit code 1 after 0:03:20; 2 of 3 ended, 0:03:20 so far, about 0:02:47 left.",
        "c starts, 3 of 3.",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_bars_on_a_terminal(width, clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system="standard")
    with Board(console, {"window-8-seed0": 12_000}, {"window-8-seed0": 0}) as board:
        board.start("window-8-seed0")
        clock[0] = 60.0
        board.update("window-8-seed0", 3_000, "loss 2.345  val 1.801")
        board._bars.refresh()
        clock[0] = 120.0
        board.end("window-8-seed0", "finished")
    shown = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()))
    assert all(len(line) <= width for line in shown if "━" in line)
    (bar, *_) = [line for line in shown if "loss" in line]
    assert all(
        words in bar for words in ("window-8-seed0", "━━━", "3000/12000  loss 2.345  val 1.801  0:01:00")
    )
    assert any(line.startswith("all runs") and "about 0:03:00 left" in line for line in shown)
    assert any("finished after 0:02:00; 1 of 1 ended" in line for line in shown)
