"""Times attention over a sequence cut across the GPUs of one host, every schedule beside one device.

    python experiments/scaling.py [--devices 1 2] [--case causal-128k] [--schedule ring halo] [--plot out.png]

Forward and forward + backward of B1 N32 H128 in bfloat16, T tokens in all. Each schedule is first compared
with one device, outputs and gradients. The table has milliseconds, times as fast as one device, the share of
the devices' time that this is, MiB that a device sends by the count of `blockjax.parallel.compare`, and how
much of the time of transfers kernels were at work, from a profile of one call.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from blockjax.kernels.block_sparse_attention.bench import interleaved, make_mask
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import track
from rich.table import Table

from blockjax.errors import UsageError
from blockjax.parallel import SCHEDULES, Layout, attention
from blockjax.parallel.compare import Shape, count
from blockjax.parallel.mesh import compiler_options

N, H, BLOCK = 32, 128, 512
CHECKED = 16384
"""Tokens at which schedules are compared with one device."""
TOLERANCE = 1e-2
"""Of outputs and gradients, relative to their norm: both round to bfloat16."""


@dataclasses.dataclass(frozen=True)
class Case:
    """`documents` in a row are segments; `layout` is that of all schedules but those that need another."""

    T: int
    K: int = 8
    mask: str = "causal"
    layout: str = "zigzag"
    documents: int = 1

    def arrays(self):
        heads = dict(q=N, k=self.K, v=self.K, do=N)
        return [
            jax.random.normal(jax.random.key(i), (1, self.T, n, H), jnp.bfloat16)
            for i, n in enumerate(heads.values())
        ]

    def segments(self):
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
    """One schedule on the first `devices`."""

    schedule: str
    devices: int
    layout: str
    ulysses: int = 1

    @property
    def name(self) -> str:
        return "ulysses" if self.ulysses > 1 else self.schedule


def ways(case: Case, devices: int, schedules: list[str]) -> list[Way]:
    if devices == 1:
        return [Way("one device", 1, "contiguous")]
    found = [Way(name, devices, "contiguous" if name == "halo" else case.layout) for name in schedules]
    found = [way for way in found if way.schedule != "halo" or case.mask.startswith("window")]
    return [*found, Way("ring", devices, "contiguous", devices)]


class Placed(NamedTuple):
    """The arrays of a case on some devices: q, k, v, do, and segment ids or None."""

    mesh: jax.sharding.Mesh
    layout: Layout
    arrays: list


@functools.lru_cache(maxsize=8)
def placed(case: Case, devices: int, name: str) -> Placed:
    """Once for all schedules that want the same."""
    mesh = jax.make_mesh((devices,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:devices])
    layout = Layout.of(name, case.T, devices, BLOCK, [make_mask(case.mask, case.T, N, BLOCK)])
    ids = case.segments()
    place = NamedSharding(mesh, P(None, "seq"))
    arrays = [x if x is None else jax.device_put(layout.apply(x), place) for x in (*case.arrays(), ids)]
    return Placed(mesh, layout, arrays)


class Program:
    """A case done one way: arrays in place, forward and both passes compiled."""

    def __init__(self, case: Case, way: Way, hide: bool):
        self.way = way
        self.mask = make_mask(case.mask, case.T, N, BLOCK)
        mesh, self.layout, self.arrays = placed(case, way.devices, way.layout)
        how = dict(mesh=mesh, layout=self.layout, ulysses=way.ulysses)
        how |= {} if way.devices == 1 else dict(schedule=way.schedule)

        def forward(q, k, v, do, ids):
            return attention(q, k, v, self.mask, q_segment_ids=ids, kv_segment_ids=ids, **how)

        def both(q, k, v, do, ids):
            o, pullback = jax.vjp(lambda *x: forward(*x, do, ids), q, k, v)
            return o, *pullback(do)

        def compiled(f):
            return jax.jit(f).lower(*self.arrays).compile(compiler_options(mesh) if hide else {})

        self.forward, self.both = compiled(forward), compiled(both)

    def run(self, both: bool):
        return (self.both if both else self.forward)(*self.arrays)

    def results(self) -> list[np.ndarray]:
        """`o, dq, dk, dv` in the order of the sequence."""
        return [np.asarray(self.layout.restore(x), np.float32) for x in self.run(both=True)]


def check(case: Case, found: list[Way], hide: bool) -> None:
    """Raises AssertionError if a schedule differs from one device."""
    short = case.at(CHECKED)
    with ThreadPoolExecutor(8) as pool:
        one, *others = pool.map(
            lambda way: Program(short, way, hide), [Way("one device", 1, "contiguous"), *found]
        )
    exact = one.results()
    for program in others:
        for name, a, b in zip(("o", "dq", "dk", "dv"), program.results(), exact, strict=True):
            error = np.linalg.norm(a - b) / np.linalg.norm(b)
            if not error <= TOLERANCE:
                raise AssertionError(f"{program.way}: {name} differs from one device by {error:.1e}.")


def overlap(program: Program) -> tuple[float, float] | None:
    """Seconds of transfers in both passes on the first device, and the share in which kernels ran."""
    from jax.profiler import ProfileData

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(program.run(both=True))
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = [p for p in ProfileData.from_file(str(path)).planes if p.name.startswith("/device:GPU:0")]
    spans = {True: [], False: []}
    for plane in planes:
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    sent = any(
                        word in event.name.lower() for word in ("nccl", "memcpyp2p", "permute", "gather")
                    )
                    spans[sent].append((event.start_ns, event.start_ns + event.duration_ns))
    transfers, kernels = (merged(spans[key]) for key in (True, False))
    total = sum(b - a for a, b in transfers)
    if not total:
        return None
    shared = sum(max(0, min(b, d) - max(a, c)) for a, b in transfers for c, d in kernels)
    return total * 1e-9, shared / total


def merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint spans that cover the same time."""
    out = []
    for a, b in sorted(spans):
        if out and a <= out[-1][1]:
            out[-1] = out[-1][0], max(b, out[-1][1])
        else:
            out.append((a, b))
    return out


def measure(name: str, case: Case, args, console: Console) -> list[dict]:
    found = [way for n in args.devices for way in ways(case, n, args.schedule)]
    check(case, [way for way in found if way.devices > 1], args.hide)
    with ThreadPoolExecutor(8) as pool:
        made = pool.map(lambda way: Program(case, way, args.hide), found)
        programs = list(track(made, f"compiling {name}", len(found), console=console, transient=True))
    calls = 1 if case.T > 65536 else 4
    times = [
        interleaved(
            [(functools.partial(p.run, both), jax.block_until_ready) for p in programs], args.rounds, calls
        )
        for both in (False, True)
    ]
    rows = []
    for program, forward, both in zip(programs, *times, strict=True):
        way, row = program.way, dict(case=name, forward_ms=forward, both_ms=both)
        row |= dict(schedule=way.name, devices=way.devices)
        if way.devices > 1 and way.ulysses == 1:
            passes = count(program.mask, program.layout, Shape(N, case.K, H))[way.schedule]
            row["mib"] = sum(x.sent.injected for x in passes) / 2**20
        if way.devices > 1 and args.profile and (seen := overlap(program)):
            row["transfer_ms"], row["overlap"] = 1e3 * seen[0], seen[1]
        rows.append(row)
    one = next((row for row in rows if row["devices"] == 1), None)
    for row in rows if one else []:
        for way in ("forward", "both"):
            row[f"{way}_speedup"] = one[f"{way}_ms"] / row[f"{way}_ms"]
    placed.cache_clear()
    return rows


def show(rows: list[dict], title: str, console: Console) -> None:
    table = Table(title=title, title_justify="left")
    for column in (
        "P",
        "schedule",
        "forward ms",
        "x",
        "both ms",
        "x",
        "efficiency",
        "MiB",
        "transfer ms",
        "hidden",
    ):
        table.add_column(column, justify="left" if column == "schedule" else "right", no_wrap=True)
    for row in rows:
        text = lambda key, form, row=row: format(row[key], form) if key in row else ""  # noqa: E731
        share = {**row, "share": row.get("both_speedup", 1) / row["devices"]}
        table.add_row(
            str(row["devices"]), row["schedule"], text("forward_ms", ".3f"), text("forward_speedup", ".2f"),
            text("both_ms", ".3f"), text("both_speedup", ".2f"), format(share["share"], ".0%"),
            text("mib", ",.0f"), text("transfer_ms", ".2f"), text("overlap", ".0%"),
        )  # fmt: skip
    console.print(table)


def plot(results: dict[str, list[dict]], path: pathlib.Path) -> None:
    """Efficiency of forward + backward by the number of devices, a panel a case."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(results), figsize=(3.2 * len(results), 3.4), layout="constrained", sharey=True, squeeze=False
    )
    for ax, (name, rows) in zip(axes[0], results.items(), strict=True):
        for schedule in dict.fromkeys(row["schedule"] for row in rows if row["devices"] > 1):
            own = [row for row in rows if row["devices"] == 1 or row["schedule"] == schedule]
            sizes = [row["devices"] for row in own]
            ax.plot(
                sizes,
                [row["both_speedup"] / row["devices"] for row in own],
                "o-",
                label=schedule,
                markersize=4,
            )
        ax.axhline(1, color="#a0aec0", linewidth=0.8)
        ax.set(title=name, xlabel="devices", xscale="log", ylim=(0, 1.1))
        ax.set_xticks(sizes := sorted({row["devices"] for row in rows}), labels=sizes)
        ax.minorticks_off()
    axes[0][0].set_ylabel("speed-up / devices, forward + backward")
    axes[0][-1].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    there = jax.device_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--devices", nargs="+", type=int, default=[n for n in (1, 2, 4, 8) if n <= there])
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
    args = parser.parse_args(argv)
    if max(args.devices) > there:
        raise SystemExit(f"error: --devices {max(args.devices)}, but there are {there}.")
    console, results = Console(highlight=False), {}
    for name in args.case:
        begin = time.perf_counter()
        try:
            results[name] = measure(name, CASES[name], args, console)
        except (UsageError, AssertionError) as error:
            console.print(f"{name}: {error}", soft_wrap=True)
            continue
        took = time.perf_counter() - begin
        show(results[name], f"{name}, {CASES[name]}, {jax.devices()[0].device_kind}, {took:.0f} s", console)
        if args.json:
            args.json.write_text(json.dumps(results, indent=2) + "\n")
    if args.plot and results:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
