"""The static schedule of the TPU kernels of `linear_attention`, without a TPU.

    python experiments/recurrence_schedule.py [--chip v5e v5p v6e] [--rule decay delta gla kda]
        [--json out.json]

As `tpu_schedule.py`: what libtpu scheduled, in bundles, on the way through one chunk of the grid; waits for
memory are not in it. Columns: heads of a grid step; bundles for a chunk of one head; the floor, what the
slots of the matrix units alone need for it; how much of the capacity of each unit is used; vector registers
spilled.
"""

import argparse
import json
import pathlib
import sys

from rich.console import Console
from rich.table import Table

if __package__ is None:
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from experiments.tpu_schedule import TOPOLOGIES, UNITS, Program, dumped, one_chip

RULES = {
    "decay": ("decay", "token"),
    "delta": ("delta", "token"),
    "gla": ("decay", "channel"),
    "kda": ("delta", "channel"),
}
"""Kind and form of decay."""
KERNELS = {"decay": ("forward", "states", "backward"), "delta": ("inverse", "forward", "states", "backward")}
SIZES = dict(B=1, T=8192, N=16, K=16, Hk=128, Hv=128)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", nargs="+", choices=TOPOLOGIES, default=[*TOPOLOGIES])
    parser.add_argument("--rule", nargs="+", choices=RULES, default=[*RULES])
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--compile", nargs=2, metavar=("CHIP", "RULE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.compile:
        compile_case(*args.compile)
        return []
    rows = []
    for chip in args.chip:
        for rule in args.rule:
            with dumped(__file__, chip, rule) as folder:
                rows += [read(chip, rule, kernel, folder) for kernel in KERNELS[RULES[rule][0]]]
    show(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return rows


def compile_case(chip: str, rule: str):
    """Forward and backward, in bfloat16."""
    import jax
    import jax.numpy as jnp
    from blockjax.kernels.linear_attention import linear_attention

    mesh = one_chip(chip)
    sharding = jax.sharding.NamedSharding(mesh, jax.P())

    def array(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    (kind, decay), (B, T, N, K, Hk, Hv) = RULES[rule], SIZES.values()
    args = dict(q=array(B, T, N, Hk, dtype="bfloat16"), k=array(B, T, K, Hk, dtype="bfloat16"))
    args["v"] = array(B, T, K, Hv, dtype="bfloat16")
    args["log_decay"] = array(*dict(token=(B, T, K), channel=(B, T, K, Hk))[decay])
    if kind == "delta":
        args["beta"] = array(B, T, K)

    def both(args):
        out, pullback = jax.vjp(lambda args: linear_attention(**args, kind=kind, implementation="tpu"), args)
        return out, pullback(jnp.ones_like(out))

    with jax.sharding.set_mesh(mesh):
        jax.jit(both).lower(args).compile()


def read(chip: str, rule: str, kernel: str, folder: pathlib.Path) -> dict:
    """The counts of one kernel on the way through one chunk, for each of the heads of a grid step."""
    import jax.numpy as jnp
    from blockjax.kernels.linear_attention import tpu

    _, _, N, K, Hk, Hv = SIZES.values()
    chunk = tpu.chunk_of(*RULES[rule])
    heads = tpu.Sizes(*RULES[rule], chunk, N // K, K, Hk, Hv, jnp.dtype("bfloat16")).heads
    program = Program.of(folder, f"linear_attention_{kernel}")
    path = program.full_block_path()
    bundles = sum(path.values())
    return dict(
        chip=chip, rule=rule, kernel=kernel, chunk=chunk, heads=heads,
        bundles=bundles / heads, floor=program.used("MATMUL", path) / heads,
        **{name: program.used(unit, path) / bundles for unit, name in UNITS.items()},
        spills=program.used("VSTORE:SPILL", path) / heads,
    )  # fmt: skip


def show(rows: list[dict]):
    table = Table(title="Static schedule of a chunk of one head: a count of bundles, not a time")
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("chip", "rule", "kernel") else "right")
    for row in rows:
        values = (f"{x:.2f}" if name in UNITS.values() else f"{x:.0f}" if isinstance(x, float) else str(x)
                  for name, x in row.items())  # fmt: skip
        table.add_row(*values)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    main()
