"""What schedules would send and how even layouts are, for one shape, counted without running anything.

    python -m blockjax.parallel.compare --tokens 65536 --places 8 --heads 32 --kv-heads 8 --mask causal

Bytes are those of a device and one pass: over its busier direction on a ring of neighbours (a TPU torus), and
out of it where every device is linked to every other (NVLink). Rounds are transfers that wait for each other.
"""

import argparse
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from blockjax.errors import UsageError
from blockjax.kernels.block_sparse_attention.bench import make_mask
from blockjax.masks import BlockMask
from blockjax.parallel.circulate import Ring
from blockjax.parallel.layouts import LAYOUTS, Layout, lockstep, work
from blockjax.parallel.schedules import SCHEDULES
from blockjax.parallel.shards import Job, Keys, Queries
from blockjax.parallel.traffic import Traffic, traffic

MIB = 2**20


class Shape(NamedTuple):
    """Of the arrays of a call on all devices, B = 1."""

    N: int
    K: int
    H: int
    dtype: str = "bfloat16"


class Counted(NamedTuple):
    """One pass of one schedule; `refused` says why it cannot serve, and then nothing is counted."""

    sent: Traffic | None
    rounds: int
    refused: str | None


def count(mask: BlockMask, layout: Layout, shape: Shape) -> dict[str, tuple[Counted, Counted]]:
    """Forward and backward of every schedule, for a mask with T = S in this layout."""
    table = work(mask, layout, layout)
    uses = np.ones((layout.devices,) * 2, bool) if table is None else table > 0
    blocks = layout.blocks(mask.bq)
    job = Job(Ring("seq", layout.devices, 1, uses), mask, blocks, layout.blocks(mask.bk), None, {})
    here = layout.tokens // layout.devices
    q, k = (jax.ShapeDtypeStruct((1, here, n, shape.H), jnp.dtype(shape.dtype)) for n in shape[:2])
    queries, keys = Queries(q, None, None, None), Keys(k, k, None, None)

    def one(name: str, backward: bool) -> Counted:
        schedule = SCHEDULES[name]
        if (reason := schedule.refuses(job)) is not None:
            return Counted(None, 0, reason)
        sent = traffic(name, job, queries, keys, backward)
        return Counted(sent, schedule.rounds(job, shape.K, backward), None)

    return {name: (one(name, False), one(name, True)) for name in SCHEDULES}


def balance(mask: BlockMask, places: int, block: int) -> dict[str, np.ndarray]:
    """The table of `work` of each layout, [places, places]."""
    layouts = {name: Layout.of(name, mask.T, places, block, [mask]) for name in LAYOUTS}
    return {name: work(mask, layout, layout) for name, layout in layouts.items()}


def plot_balance(tables: dict[str, np.ndarray]) -> Figure:
    """The listed blocks of each device's queries and each device's keys, one panel a layout."""
    figure, axes = plt.subplots(1, len(tables), figsize=(2.6 * len(tables), 3.1), layout="constrained")
    most = max(table.max() for table in tables.values())
    for ax, (name, table) in zip(np.atleast_1d(axes), tables.items(), strict=True):
        image = ax.imshow(table, cmap="Blues", vmin=0, vmax=most)
        ax.set_title(f"{name}\na ring is {lockstep(table):.0%} busy", fontsize=10)
        ax.set_xlabel("keys of device")
        ax.set_xticks(range(len(table)), labels=range(len(table)), fontsize=7)
        ax.set_yticks(range(len(table)), labels=range(len(table)), fontsize=7)
    np.atleast_1d(axes)[0].set_ylabel("queries of device")
    figure.colorbar(image, ax=axes, label="listed blocks", shrink=0.8)
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536, help="of the sequence, over all places")
    parser.add_argument("--places", type=int, default=8, help="devices along the sequence axis")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mask", default="causal", help="causal, window:LEFT or random:DENSITY")
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--layout", default="zigzag", choices=LAYOUTS, help="for which schedules are counted")
    parser.add_argument("--plot", type=pathlib.Path, help="write a picture of the layouts here")
    args = parser.parse_args(argv)
    try:
        compare(args, Console(highlight=False))
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None


def compare(args: argparse.Namespace, console: Console) -> None:
    mask = make_mask(args.mask, args.tokens, args.heads, args.block)
    tables = balance(mask, args.places, args.block)
    lines = Table(title=f"{args.mask}, {args.tokens} tokens over {args.places} devices", title_justify="left")
    for column in ("layout", "a ring is busy", "most work", "least work"):
        lines.add_column(column, justify="left" if column == "layout" else "right")
    for name, table in tables.items():
        each = table.sum(1) / max(table.sum() / len(table), 1)
        lines.add_row(name, f"{lockstep(table):.0%}", f"{each.max():.2f} of mean", f"{each.min():.2f}")
    console.print(lines)

    layout = Layout.of(args.layout, mask.T, args.places, args.block, [mask])
    counted = count(mask, layout, Shape(args.heads, args.kv_heads, args.head_dim, args.dtype))
    title = f"MiB a device sends over its busier way of a ring, and in all; layout {args.layout}"
    lines = Table(title=title, title_justify="left")
    lines.add_column("schedule", no_wrap=True)
    for way in ("forward", "backward"):
        for column in (way, "in all", "rounds"):
            lines.add_column(column, justify="right")
    for name, passes in counted.items():
        cells = []
        for sent, rounds, _ in passes:
            sizes = (sent.busiest, sent.injected) if sent else ()
            cells += [*(f"{size / MIB:,.4g}" for size in sizes), str(rounds)] if sent else ["", "", ""]
        lines.add_row(name, *cells)
    console.print(lines)
    for name, (forward, _) in counted.items():
        if forward.refused:
            console.print(f"{name} cannot serve: {forward.refused}.", soft_wrap=True)
    if args.plot:
        plot_balance(tables).savefig(args.plot, dpi=150)
        console.print(f"The layouts are drawn in {args.plot}.")


if __name__ == "__main__":
    main()
