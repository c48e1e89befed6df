"""What a compiled step looks like, as tables."""

from __future__ import annotations

import jax
from rich.console import Console
from rich.table import Table

from blockjax.pods.chips import GIB
from blockjax.pods.collectives import Collective
from blockjax.pods.compile import Job, Memory, Outcome
from blockjax.pods.roofline import Estimate, seconds
from blockjax.pods.search import Guess


def show_job(console: Console, job: Job, mesh: str = "") -> None:
    """What is compiled for what; `mesh` in words if it is not decided."""
    m, c = job.model, job.config
    say(
        console,
        f"{m.num_params():,} parameters, {m.depth} layers of width {m.width}, {m.vocab_size} rows of "
        f"vocabulary; {c.data.batch_size} sequences of {c.data.seq_len:,} tokens a step, "
        f"remat={c.run.remat}, accumulate={c.run.accumulate}.\n"
        f"{job.topology.name}: {job.mesh.size} x {job.topology.chip.kind}, mesh {mesh or job.axes}; "
        f"jax {jax.__version__}.",
    )


def show_memory(console: Console, memory: Memory) -> None:
    """Bytes on each device."""
    table = Table(title="Memory of each device", title_justify="left", show_footer=True)
    table.add_column("what", footer="total, padding included")
    table.add_column("GiB", justify="right", footer=gib(memory.total))
    table.add_column("of the chip", justify="right", footer=f"{memory.total / memory.limit:.1%}")
    rows = ("params", "parameters"), ("optimizer", "optimizer state"), ("batch", "batch")
    for key, words in (*rows, ("temporaries", "temporaries: activations, gradients"), ("code", "program")):
        size = getattr(memory, key)
        table.add_row(words, gib(size), f"{size / memory.limit:.1%}")
    console.print(table)
    say(console, verdict(memory))


def verdict(memory: Memory) -> str:
    """Whether it fits, in a sentence."""
    total, limit = gib(memory.total), gib(memory.limit)
    if memory.fits:
        return f"It fits: {total} of {limit} GiB, {gib(memory.limit - memory.total)} GiB are left."
    return f"It does not fit: {total} of {limit} GiB, {gib(memory.total - memory.limit)} GiB too much."


def advice(job: Job, memory: Memory) -> list[str]:
    """What to change so that it fits, what costs least first."""
    c, sizes = job.config, job.mesh.shape
    ways = []
    if c.run.remat != "full":
        ways.append(f"--config.run.remat=full keeps less of each layer than {c.run.remat}")
    rows = c.data.batch_size // (sizes["data"] * sizes["fsdp"] * c.run.accumulate)
    if rows > 1:
        more = c.run.accumulate * rows
        ways.append(f"--config.run.accumulate={more} takes one sequence at a time instead of {rows}")
    if memory.params + memory.optimizer > memory.limit / 4 and sizes["data"] > 1:
        ways.append(f"devices of data={sizes['data']} moved to fsdp hold a smaller part of the state each")
    if rows <= 1:
        ways.append("devices moved to seq hold fewer tokens each")
    return [*ways, "--search tries other meshes"]


def show_collectives(console: Console, job: Job, found: list[Collective], uncounted: int) -> None:
    """What devices say to each other."""
    table = Table(title="Collectives of a step", title_justify="left", show_footer=True)
    table.add_column("kind", footer="total")
    table.add_column("along")
    table.add_column("devices", justify="right")
    table.add_column("times", justify="right", footer=f"{sum(c.count for c in found):,}")
    table.add_column("GB each sends", justify="right", footer=f"{sum(c.sent for c in found) / 1e9:.3f}")
    total = sum(seconds(job, c) for c in found)
    table.add_column("ms at link rate", justify="right", footer=f"{1e3 * total:.1f}")
    for c in found:
        cells = f"{c.count:,}", f"{c.sent / 1e9:.3f}", f"{1e3 * seconds(job, c):.1f}"
        table.add_row(c.kind, ",".join(c.axes), str(c.size), *cells)
    console.print(table)
    if uncounted:
        say(
            console,
            f"{uncounted} loops whose length is decided while they run count as one turn: what they send, "
            "read and write is more.",
        )


def show_search(console: Console, guesses: list[Guess], made: list[tuple[Memory, Estimate | None]]) -> None:
    """What was guessed of meshes and what compiling them showed, the best first."""
    table = Table(
        title="Meshes, by the time of a step if communication overlaps nothing", title_justify="left"
    )
    for name in ("mesh", "guess: GiB", "s a step", "compiled: GiB", "s a step", "MFU", ""):
        table.add_column(name, justify="left" if name in ("mesh", "") else "right")
    order = sorted(
        zip(guesses, made, strict=True), key=lambda x: x[1][1].serial if x[1][1] else x[1][0].total
    )
    for guess, (memory, bounds) in order:
        cells = [f"{bounds.serial:.4g}", f"{bounds.mfu(bounds.serial):.1%}"] if bounds else ["", ""]
        over = "" if memory.fits else f"{gib(memory.total - memory.limit)} GiB too much"
        guessed = gib(guess.bytes), f"{guess.estimate.serial:.4g}"
        table.add_row(guess.job.axes, *guessed, gib(memory.total), *cells, over)
    console.print(table)


def show_estimate(console: Console, job: Job, e: Estimate) -> None:
    """The roofline."""
    chip, tokens = job.topology.chip, job.config.data.batch_size * job.config.data.seq_len
    table = Table(title="Roofline of a step, not a measurement", title_justify="left")
    for name in ("bound", "seconds", "rate of a device"):
        table.add_column(name, justify="left" if name == "bound" else "right")
    table.add_row("matrix units", f"{e.compute:.4g}", f"{chip.peak_flops / 1e12:.0f} TFLOP/s")
    table.add_row("main memory", f"{e.memory:.4g}", f"{chip.hbm_rate / 1e9:,.0f} GB/s")
    table.add_row("interconnect", f"{e.links:.4g}", f"{chip.link_rate / 1e9:.0f} GB/s a link and direction")
    console.print(table)
    say(
        console,
        f"Useful: {e.work.useful:.4g} FLOPs a step; executed: {e.work.executed:.4g} "
        f"({e.work.executed / e.work.useful:.2f} x), tiles and recomputed layers included.\n"
        f"Step: {e.best:.4g} s if everything overlaps ({tokens / e.best:,.0f} tokens/s, "
        f"MFU {e.mfu(e.best):.1%}), {e.serial:.4g} s if communication does not "
        f"({tokens / e.serial:,.0f} tokens/s, MFU {e.mfu(e.serial):.1%}).",
    )


def show_outcome(console: Console, job: Job, outcome: Outcome) -> None:
    """Memory, and what to do about it."""
    say(console, f"{'Compiled' if outcome.executable else 'Refused'} after {outcome.seconds:.0f} s.")
    show_memory(console, outcome.memory)
    if not outcome.memory.fits:
        say(console, "What helps: " + "; ".join(advice(job, outcome.memory)) + ".")


def gib(size: float) -> str:
    """In GiB."""
    return f"{size / GIB:.2f}"


def say(console: Console, text: str) -> None:
    """Plain words, not wrapped where output is read by programs."""
    console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)
