"""Times attention over a sequence cut across the GPUs of one host, every schedule beside one device.

    python experiments/scaling.py [--devices 1 2] [--case causal-128k] [--schedule ring halo] [--plot out.png]

Forward and forward + backward of B1 N32 H128 in bfloat16, T tokens in all. Each schedule is first compared
with one device, outputs and gradients. The table has milliseconds, times as fast as one device, the share of
the devices' time that this is, and milliseconds beyond one device's by their number. Then, of both passes:
MiB that a device sends by the count of `blockjax.parallel.compare` and as compiled, what they take at the
rate of single transfers in the same run, what transfers took in a profile of one call, and the share of that
time in which kernels were at work.

With `--jobs` several cases are made ready at a time, each in a process of its own; only one uses the GPUs.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed

import jax
import jax.numpy as jnp
import numpy as np
from blockjax.kernels.benching import interleaved
from blockjax.kernels.block_sparse_attention.bench import make_mask
from filelock import FileLock
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import track
from rich.table import Table

from blockjax.analysis.plots import save
from blockjax.errors import UsageError
from blockjax.parallel import SCHEDULES, Layout, attention
from blockjax.parallel.compare import Shape, count
from blockjax.parallel.mesh import compiler_options
from blockjax.pods.collectives import collectives
from blockjax.pods.program import Program as Text

N, H, BLOCK = 32, 128, 512
CHECKED = 32768
"""Tokens at which schedules are compared with one device."""
TOLERANCE = 1e-2
"""Of outputs and gradients, relative to their norm: both round to bfloat16."""
LONG = 200_000
"""Tokens from which ways are timed one after the other, so that the arrays of one are there at a time."""
ROUND = 0.25
"""Seconds of the first way in a round: calls follow each other, as the layers of a model do."""
PAUSE = 0.05
"""Seconds between the calls of a profile, by which they are told apart."""
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Case:
    """`documents` in a row are segments; `layout` is that of all schedules but those that need another."""

    T: int
    K: int = 8
    mask: str = "causal"
    layout: str = "zigzag"
    documents: int = 1

    def arrays(self) -> list[jax.Array]:
        """q, k, v and the gradient of o."""
        return [
            jax.random.normal(jax.random.key(i), (1, self.T, n, H), jnp.bfloat16)
            for i, n in enumerate((N, self.K, self.K, N))
        ]

    def segments(self) -> jax.Array | None:
        starts = np.random.default_rng(0).random((1, self.T)) < (self.documents - 1) / self.T
        return None if self.documents == 1 else jnp.asarray(np.cumsum(starts, 1), jnp.int32)

    def at(self, T: int) -> "Case":
        return dataclasses.replace(self, T=min(T, self.T))


CASES = {
    "causal-16k": Case(16384),
    "causal-16k-mha": Case(16384, K=32),
    "causal-32k": Case(32768),
    "causal-32k-mha": Case(32768, K=32),
    "causal-128k": Case(131072),
    "causal-128k-mha": Case(131072, K=32),
    "causal-512k": Case(524288),
    "causal-512k-mha": Case(524288, K=32),
    "window-128k": Case(131072, mask="window:4096", layout="contiguous"),
    "random-128k": Case(131072, mask="random:0.13", layout="balanced"),
    "documents-128k": Case(131072, documents=16),
}


@dataclasses.dataclass(frozen=True)
class Way:
    """One schedule on the first `devices`; `ulysses` as in `attention`."""

    schedule: str
    devices: int
    layout: str
    ulysses: int = 1

    @property
    def name(self) -> str:
        if self.ulysses <= 1:
            return self.schedule
        return "ulysses" if self.ulysses == self.devices else f"ulysses={self.ulysses} x {self.schedule}"


def ways(case: Case, devices: int, schedules: list[str]) -> list[Way]:
    if devices == 1:
        return [Way("one device", 1, "contiguous")]
    found = [Way(name, devices, "contiguous" if name == "halo" else case.layout) for name in schedules]
    found = [way for way in found if way.schedule != "halo" or case.mask.startswith("window")]
    found += [Way("ring", devices, case.layout, 2)] if devices > 2 else []
    return [*found, Way("ring", devices, "contiguous", devices), Way("auto", devices, case.layout, 0)]


class Program:
    """A case done one way, compiled: both passes, and the forward alone if asked for."""

    def __init__(self, case: Case, way: Way, hide: bool, forward: bool = True):
        self.case, self.way = case, way
        self.mask = make_mask(case.mask, case.T, N, BLOCK)
        self.mesh = jax.make_mesh(
            (way.devices,), ("seq",), (AxisType.Auto,), devices=jax.devices()[: way.devices]
        )
        self.layout = Layout.of(way.layout, case.T, way.devices, BLOCK, [self.mask])
        self.place = NamedSharding(self.mesh, P(None, "seq"))
        how = dict(mesh=self.mesh, layout=self.layout, ulysses=way.ulysses)
        how |= {} if way.devices == 1 else dict(schedule=way.schedule)

        def attend(q, k, v, do, ids):
            return attention(q, k, v, self.mask, q_segment_ids=ids, kv_segment_ids=ids, **how)

        def both(q, k, v, do, ids):
            o, pullback = jax.vjp(lambda *x: attend(*x, do, ids), q, k, v)
            return o, *pullback(do)

        shapes = [
            jax.ShapeDtypeStruct((1, case.T, n, H), jnp.bfloat16, sharding=self.place)
            for n in (N, case.K, case.K, N)
        ]
        ids = jax.ShapeDtypeStruct((1, case.T), jnp.int32, sharding=self.place)
        shapes.append(None if case.documents == 1 else ids)
        options = compiler_options(self.mesh) if hide else {}
        self.both = jax.jit(both).lower(*shapes).compile(options)
        self.forward = jax.jit(attend).lower(*shapes).compile(options) if forward else None

    def run(self, both: bool):
        return (self.both if both else self.forward)(*arrays(self))

    def results(self) -> list[jax.Array]:
        """`o, dq, dk, dv` in the order of the sequence, on one device."""
        found = [jax.device_put(x, jax.devices()[0]) for x in self.run(both=True)]
        return [self.layout.restore(x).astype(jnp.float32) for x in found]

    def mib(self) -> dict[str, float]:
        """MiB that a device sends: by the count, which is of one schedule alone, and as compiled."""
        sent = sum(x.sent for x in collectives(Text(self.both.as_text()), self.mesh)) / MIB
        found = dict(compiled_mib=sent)
        if self.way.ulysses == 1:
            counted = count(self.mask, self.layout, Shape(N, self.case.K, H))
            found["mib"] = sum(x.sent.injected for x in counted[self.way.schedule]) / MIB
        return found


_placed: dict[tuple, list] = {}


def arrays(program: Program) -> list:
    """Arrays of a program in their places: once for all that want the same."""
    key = program.case, program.way.devices, program.way.layout
    if key not in _placed:
        found = [*program.case.arrays(), program.case.segments()]
        _placed[key] = [
            x if x is None else jax.device_put(program.layout.apply(x), program.place) for x in found
        ]
    return _placed[key]


def check(programs: list[Program]) -> None:
    """Raises AssertionError if one differs from the first, which has one device."""
    one, *others = programs
    exact = one.results()
    for program in others:
        for name, a, b in zip(("o", "dq", "dk", "dv"), program.results(), exact, strict=True):
            error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
            if not error <= TOLERANCE:
                raise AssertionError(f"{program.way}: {name} differs from one device by {error:.1e}.")


def transfers(programs: list[Program]) -> list[tuple[float, float] | None]:
    """Of each, seconds of transfers in both passes on the first device, and the share that kernels hid."""
    from jax.profiler import ProfileData

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for program in programs:
                jax.block_until_ready(program.run(both=True))
                time.sleep(PAUSE)
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = [p for p in ProfileData.from_file(str(path)).planes if p.name.startswith("/device:GPU:0")]
    events = [
        (event.start_ns * 1e-9, (event.start_ns + event.duration_ns) * 1e-9, event.name.lower())
        for plane in planes
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    calls = split(sorted(events))
    return [hidden(call) for call in calls] if len(calls) == len(programs) else [None] * len(programs)


def split(events: list[tuple[float, float, str]]) -> list[list[tuple[float, float, str]]]:
    """Events of a profile by the call they belong to."""
    calls, end = [], -np.inf
    for event in events:
        if event[0] - end > PAUSE / 2:
            calls.append([])
        calls[-1].append(event)
        end = max(end, event[1])
    return calls


def hidden(events: Iterable[tuple[float, float, str]]) -> tuple[float, float] | None:
    """Seconds of transfers among events, and the share in which others ran; None without transfers."""
    spans = {True: [], False: []}
    for start, end, name in events:
        spans["nccl" in name or "memcpyp2p" in name].append((start, end))
    sent, kernels = (merged(spans[key]) for key in (True, False))
    total = sum(b - a for a, b in sent)
    shared = sum(max(0, min(b, d) - max(a, c)) for a, b in sent for c, d in kernels)
    return (total, shared / total) if total else None


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Disjoint spans that cover the same time."""
    out = []
    for a, b in sorted(spans):
        if out and a <= out[-1][1]:
            out[-1] = out[-1][0], max(b, out[-1][1])
        else:
            out.append((a, b))
    return out


def rate(devices: int, mib: int = 64) -> float:
    """MiB a millisecond that a device sends to the next one, of an array of so many MiB."""
    mesh = jax.make_mesh((devices,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:devices])
    pairs = [(i, (i + 1) % devices) for i in range(devices)]
    send = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.ppermute(x, "seq", pairs), mesh=mesh, in_specs=P("seq"), out_specs=P("seq")
        )
    )
    x = jax.device_put(jnp.ones((devices * mib, MIB // 4)), NamedSharding(mesh, P("seq")))
    (taken,) = interleaved([(functools.partial(send, x), jax.block_until_ready)], 5, 8)
    return mib / taken


def measure(name: str, case: Case, args: argparse.Namespace, console: Console) -> list[dict]:
    found = [way for n in args.devices for way in ways(case, n, args.schedule)]
    one = Way("one device", 1, "contiguous")
    with ThreadPoolExecutor(8) as pool:
        made = pool.map(lambda way: Program(case, way, args.hide), found)
        programs = list(track(made, f"compiling {name}", len(found), console=console, transient=True))
        small = programs
        if case.T > CHECKED or 1 not in args.devices:
            checked = [one, *(way for way in found if way.devices > 1)]
            small = list(pool.map(lambda way: Program(case.at(CHECKED), way, args.hide, False), checked))
    rows = [dict(case=name, schedule=p.way.name, devices=p.way.devices) for p in programs]
    for program, row in zip(programs, rows, strict=True):
        row |= program.mib() if program.way.devices > 1 else {}
    with FileLock(args.lock) if args.lock else contextlib.nullcontext():
        check(small)
        rates = {n: rate(n) for n in args.devices if n > 1}
        alone = case.T > LONG
        for group in [[i] for i in range(len(rows))] if alone else [range(len(rows))]:
            _placed.clear()
            for i, row in zip(group, timed([programs[i] for i in group], args), strict=True):
                rows[i] |= row
    return [derived(row, rows[0], rates) for row in rows]


def timed(programs: list[Program], args: argparse.Namespace) -> list[dict]:
    """What the GPUs say of programs that are timed in turns."""
    rounds, calls = args.rounds, 1
    if programs[0].case.T > LONG:
        rounds = 1
    else:
        jax.block_until_ready(programs[0].run(both=True))
        begin = time.perf_counter()
        jax.block_until_ready(programs[0].run(both=True))
        calls = max(1, min(16, int(ROUND / (time.perf_counter() - begin))))
    times = [
        interleaved(
            [(functools.partial(p.run, both), jax.block_until_ready) for p in programs], rounds, calls
        )
        for both in (False, True)
    ]
    rows = [dict(forward_ms=forward, both_ms=both) for forward, both in zip(*times, strict=True)]
    for row, seen in zip(rows, transfers(programs) if args.profile else [None] * len(rows), strict=True):
        row |= dict(transfer_ms=1e3 * seen[0], overlap=seen[1]) if seen else {}
    return rows


def derived(row: dict, one: dict, rates: dict[int, float]) -> dict:
    """With what follows from the measured numbers."""
    row = dict(row)
    if row["devices"] > 1 and "mib" in row:
        row["link_ms"] = row["mib"] / rates[row["devices"]]
    if one["devices"] == 1:
        row["beyond_ms"] = row["both_ms"] - one["both_ms"] / row["devices"]
        for way in ("forward", "both"):
            row[f"{way}_speedup"] = one[f"{way}_ms"] / row[f"{way}_ms"]
        row["efficiency"] = row["both_speedup"] / row["devices"]
    return row


COLUMNS = {
    "P": ("devices", "d"),
    "schedule": ("schedule", "s"),
    "forward ms": ("forward_ms", ".3f"),
    "x": ("forward_speedup", ".2f"),
    "both ms": ("both_ms", ".3f"),
    "x ": ("both_speedup", ".2f"),
    "share": ("efficiency", ".1%"),
    "beyond": ("beyond_ms", ".2f"),
    "MiB": ("mib", ",.0f"),
    "compiled": ("compiled_mib", ",.0f"),
    "link ms": ("link_ms", ".2f"),
    "seen ms": ("transfer_ms", ".2f"),
    "hidden": ("overlap", ".0%"),
}


def show(rows: list[dict], title: str, console: Console) -> None:
    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "schedule" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(format(row[key], form) if key in row else "" for key, form in COLUMNS.values()))
    console.print(table)


def plot(results: dict[str, list[dict]], path: pathlib.Path) -> None:
    """Efficiency of forward + backward by the number of devices, a panel a case."""
    import matplotlib.pyplot as plt

    wide = min(4, len(results))
    high = -(-len(results) // wide)
    figure, axes = plt.subplots(
        high, wide, figsize=(3.2 * wide, 2.9 * high), layout="constrained", sharey=True, squeeze=False
    )
    names = list(dict.fromkeys(row["schedule"] for rows in results.values() for row in rows))[1:]
    least = min(row.get("efficiency", 1) for rows in results.values() for row in rows)
    for ax, (case, rows) in zip(axes.flat, results.items(), strict=False):
        for i, name in enumerate(names):
            own = [row for row in rows if row["schedule"] == name and "efficiency" in row]
            if own:
                points = [(1, 1.0), *((row["devices"], row["efficiency"]) for row in own)]
                ax.plot(*zip(*points, strict=True), "o-", color=f"C{i}", label=name, markersize=4)
        ax.axhline(1, color="#a0aec0", linewidth=0.8)
        ax.set(title=case, xlabel="devices", xscale="log", ylim=(np.floor(10 * least) / 10, 1.1))
        ax.set_xticks(sizes := sorted({row["devices"] for row in rows}), labels=sizes)
        ax.minorticks_off()
    for ax in axes.flat[len(results) :]:
        ax.set_axis_off()
    for row in axes:
        row[0].set_ylabel("speed-up / devices, both passes")
    handles = {label: line for ax in axes.flat for line, label in zip(*ax.get_legend_handles_labels())}  # noqa: B905
    figure.legend(handles.values(), handles, frameon=False, loc="outside lower center", ncols=4)
    save(figure, path)


def apart(args: argparse.Namespace, console: Console) -> Iterable[tuple[str, list[dict]]]:
    """The cases in processes of their own, as they are done."""
    shared = ["--rounds", args.rounds, "--schedule", *args.schedule]
    shared += ["--devices", *args.devices] if args.devices else []
    shared += [*["--no-hide"] * (not args.hide), *["--no-profile"] * (not args.profile)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:

        def run(case: str) -> tuple[str, subprocess.CompletedProcess, pathlib.Path]:
            out = pathlib.Path(folder, f"{case}.json")
            own = ["--case", case, "--json", out, "--lock", args.lock or pathlib.Path(folder, "lock")]
            command = map(str, [sys.executable, __file__, *own, *shared])
            return case, subprocess.run([*command], capture_output=True, text=True), out

        for done in as_completed([pool.submit(run, case) for case in args.case]):
            case, process, out = done.result()
            console.print(process.stdout.rstrip(), soft_wrap=True)
            if out.exists():
                yield case, json.loads(out.read_text())[case]
            else:
                code, said = process.returncode, process.stderr[-2000:]
                console.print(f"{case} ended with code {code}. {said}", soft_wrap=True)


def here(args: argparse.Namespace, console: Console) -> Iterable[tuple[str, list[dict]]]:
    """The cases one after the other in this process."""
    there = jax.device_count()
    args.devices = args.devices or [n for n in (1, 2, 4, 8) if n <= there]
    if max(args.devices) > there:
        raise SystemExit(f"error: --devices {max(args.devices)}, but there are {there}.")
    for name in args.case:
        begin = time.perf_counter()
        try:
            rows = measure(name, CASES[name], args, console)
        except (UsageError, AssertionError) as error:
            console.print(f"{name}: {error}", soft_wrap=True)
            continue
        took = time.perf_counter() - begin
        show(rows, f"{name}, {CASES[name]}, {jax.devices()[0].device_kind}, {took:.0f} s", console)
        yield name, rows


def main(argv: list[str] | None = None) -> None:
    # Of several processes, and of the one that starts them, none may take all the memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--devices", nargs="+", type=int, help="default: 1, 2, 4, 8, as far as there are")
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=CASES)
    schedules = [name for name in SCHEDULES if name != "ring_dma"]  # which is for TPUs
    parser.add_argument("--schedule", nargs="+", default=schedules, choices=schedules)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--no-hide", dest="hide", action="store_false", help="without the latency-hiding scheduler"
    )
    parser.add_argument("--no-profile", dest="profile", action="store_false")
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers here")
    parser.add_argument("--plot", type=pathlib.Path, help="draw the efficiencies here")
    parser.add_argument("--jobs", type=int, default=1, help="cases made ready at a time")
    parser.add_argument("--lock", type=pathlib.Path, help="hold this file while the GPUs are at work")
    args = parser.parse_args(argv)
    console, results = Console(highlight=False, width=None if sys.stdout.isatty() else 140), {}
    for name, rows in apart(args, console) if args.jobs > 1 else here(args, console):
        results[name] = rows
        if args.json:
            ordered = {name: results[name] for name in args.case if name in results}
            args.json.write_text(json.dumps(ordered, indent=2) + "\n")
    if args.plot and results:
        plot({name: results[name] for name in args.case if name in results}, args.plot)


if __name__ == "__main__":
    main()
