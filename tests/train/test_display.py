import io
import re

import pytest
from rich.console import Console

from blockjax.train import display as module
from blockjax.train.display import Display

TEXT = "loss 2.345  val 1.801  1,234,567 tok/s  MFU 21% (24%)"


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    time = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: time[0])
    return time


def screen(width: int) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system="standard")


@pytest.mark.parametrize("width", [80, 120])
def test_everything_fits_beside_the_bar(width, clock):
    display = Display(20_000, console=screen(width))
    display.start(0)
    clock[0] = 100.0
    display.update(500, TEXT)
    display.stop()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", display.console.file.getvalue())
    last = [line for line in re.split(r"[\r\n]", shown) if "loss" in line][-1]
    assert len(last) <= width
    for words in ("500/20000", "━━━━", *TEXT.split("  "), "1:05:00"):
        assert words in last, last


def test_plain_lines_where_there_is_no_terminal(clock):
    display = Display(100, console=Console(file=io.StringIO(), width=80))
    display.say("Starts.")
    display.start(40)
    clock[0] = 20.0
    display.update(50, TEXT)
    display.stop()
    assert display.console.file.getvalue() == f"Starts.\nstep 50/100  {TEXT}  0:01:40 left\n"


def test_quiet(capsys, clock):
    display = Display(10, quiet=True)
    display.say("Starts.")
    display.start(0)
    display.update(5, TEXT)
    display.stop()
    assert capsys.readouterr().out == ""
