"""How the benchmarks of all ops take time and show it: `bench.py` of each op says what is compared."""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from blockjax.kernels.platforms import target
from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

WAYS = "fwd", "fwd_bwd"


def interleaved(runs: list[tuple[Callable, Callable]], rounds: int, calls: int = 1) -> list[float]:
    """Median milliseconds of each (start, wait): in each round, `calls` starts in a row and one wait.

    Each round has an order of its own: clocks depend on what ran just before.
    """
    times, shuffled = [[] for _ in runs], random.Random(0)
    for _ in range(rounds + 1):
        for (start, wait), taken in shuffled.sample([*zip(runs, times, strict=True)], len(runs)):
            begin = time.perf_counter()
            for _ in range(calls):
                out = start()
            wait(out)
            taken.append(1e3 * (time.perf_counter() - begin) / calls)
    return [statistics.median(taken[1:]) for taken in times]


def copy_bandwidth(platform: str, rounds: int, calls: int) -> float:
    """Bytes a second of a large elementwise pass, counting what it reads and what it writes."""
    x = jnp.ones((1 << 30 if platform == "gpu" else 1 << 26) // 4, jnp.float32)
    run = jax.jit(lambda x: x + 1)
    (ms,) = interleaved([(lambda: run(x), jax.block_until_ready)], rounds, calls)
    return 2 * x.nbytes / ms * 1e3


def compare(runners: dict, rounds: int, calls: int) -> dict[str, dict]:
    """Milliseconds of each runner, `fwd_ms` and `fwd_bwd_ms`, all taking turns."""
    forward = interleaved([(r.forward, r.wait) for r in runners.values()], rounds, calls)
    both = interleaved([(r.both, r.wait) for r in runners.values()], rounds, calls)
    return {name: dict(fwd_ms=f, fwd_bwd_ms=b) for name, f, b in zip(runners, forward, both, strict=True)}


def arguments(doc: str, cases: dict[str, dict]) -> tuple[argparse.ArgumentParser, dict]:
    """The options of every benchmark, and the cases of this platform; a TPU has those of a CPU."""
    # Peers of other frameworks need memory too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    platform, _ = target()
    cases = cases.get(platform, cases["cpu"])
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--case", nargs="*", choices=cases, default=list(cases))
    parser.add_argument("--json", help="also write the numbers to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=1 if platform == "cpu" else 8, help="a round")
    return parser, cases


def show(args, cases: dict, measure: Callable, title: str, beside: tuple[str, Callable], **about) -> None:
    """Measures the cases that were asked for and prints a table: of "ours", and times as fast as each peer.

    Args:
      args: what the parser of `arguments` found.
      measure: of a case, a dict with `runs`, which are what `compare` returns.
      beside: header and text of the column beside milliseconds: `text(result, run, way)`, way of `WAYS`.
      about: what the file of `--json` also holds.
    """
    console, (header, text) = Console(), beside
    table = Table(title=title)
    for column in ("case", "", "fwd", header, "x", "fwd+bwd", header, "x"):
        table.add_column(column, justify="right" if column not in ("case", "") else "left")
    results = {}
    # A terminal sees the table grow, and the file holds what was measured if the rest is interrupted.
    with Live(Group(table, spinner := Spinner("dots")), console=console) as live:
        for name in args.case:
            spinner.update(text=name)
            result = results[name] = measure(cases[name])
            runs = result["runs"]
            for who, run in runs.items():
                cells = []
                for way in WAYS:
                    ms, ours = run[f"{way}_ms"], runs["ours"][f"{way}_ms"]
                    cells += [
                        f"{ms:.3f}",
                        text(result, run, way),
                        "" if who == "ours" else f"{ms / ours:.2f}",
                    ]
                table.add_row(name if who == "ours" else "", who, *cells, end_section=who == [*runs][-1])
            if args.json:
                described = {name: {**vars(cases[name]), **result} for name, result in results.items()}
                with open(args.json, "w") as file:
                    json.dump({"device": target()[1], **about, "cases": described}, file, indent=2)
        live.update(table)


def show_beside_copy(op: str, args, cases: dict, bandwidth: float, runners: Callable) -> None:
    """`show` with the time that a case's bytes alone take at the speed of a copy, as a part of the time."""

    def measure(case) -> dict:
        runs = compare(runners(case), args.rounds, args.calls)
        fwd, fwd_bwd = (1e3 * count / bandwidth for count in case.bytes())
        return dict(floor=dict(fwd_ms=fwd, fwd_bwd_ms=fwd_bwd), runs=runs)

    def share(result: dict, run: dict, way: str) -> str:
        return f"{100 * result['floor'][f'{way}_ms'] / run[f'{way}_ms']:.0f} %"

    title = f"{op} on {target()[1]}, copy {bandwidth / 1e12:.3g} TB/s: milliseconds"
    show(args, cases, measure, title, ("of copy", share), bytes_a_second=bandwidth)
