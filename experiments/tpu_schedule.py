"""The static schedule of the TPU kernels, ours and jax's splash attention, without a TPU.

    python experiments/tpu_schedule.py [--chip v5e v6e] [--tile 1024x1024 ...] [--json out.json]
    python experiments/tpu_schedule.py --peer ours --form lists --block 128

libtpu compiles for any chip on a CPU-only x86 machine and dumps the bundles it scheduled; a bundle is what
one cycle issues when nothing stalls. This counts those on the path of a full block: the loop over key tiles,
with the branch that multiplies without a mask and the one that starts copies; inner loops count as often as
they run. It is a static count, not a time: waits for memory are not in it.

Columns: bundles per 128x128 (query x key) tile; the floor, what the slots of the matrix units alone need for
such a tile; how much of the capacity of each unit is used, of the matrix units it is the floor over the
bundles; vector registers spilled a tile.
Needs libtpu, importable or named by TPU_LIBRARY_PATH.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from blockjax.pods import libtpu

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
UNITS = {"MATMUL": "matrix", "VALU": "vector", "XLU": "lanes", "EUP": "exp", "VSTORE": "store"}
KERNELS = ("forward", "dq", "dkv")
DELAY_SLOTS = 4
"""Bundles after a branch that run whether it is taken or not."""


@dataclass(frozen=True)
class Case:
    """What is compiled: T = S tokens, N heads, lists of blocks per head or ranges; tiles (query, key)."""

    peer: str = "ours"  # or "splash"
    form: str = "causal"  # or "lists", a quarter of all blocks, per head
    block: int | None = None  # of the lists; None is the tile
    q_tile: int = 1024
    k_tile: int = 1024
    T: int = 8192
    N: int = 8
    H: int = 128
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Schedule:
    """Counts on the path of a full block, per 128x128 tile."""

    chip: str
    case: Case
    kernel: str
    bundles: float
    floor: float
    occupancy: dict[str, float]
    spills: float


def main(argv: list[str] | None = None) -> list[Schedule]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", nargs="+", choices=TOPOLOGIES, default=["v5e", "v6e"])
    parser.add_argument("--tile", nargs="+", default=["1024x1024", "512x512"], help="query x key rows")
    parser.add_argument("--form", nargs="+", choices=["causal", "lists"], default=["causal"])
    parser.add_argument("--block", type=int, help="of the lists; default: the tile")
    parser.add_argument("--peer", nargs="+", choices=["ours", "splash"], default=["ours", "splash"])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--compile", nargs=2, metavar=("CHIP", "CASE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.compile:
        compile_case(args.compile[0], Case(**json.loads(args.compile[1])))
        return []

    schedules = []
    for chip in args.chip:
        for tile in args.tile:
            q_tile, k_tile = map(int, tile.split("x"))
            for form in args.form:
                for peer in args.peer:
                    if peer == "splash" and form == "lists":
                        continue
                    case = Case(peer, form, args.block, q_tile, k_tile, H=args.head_dim)
                    schedules += measure(chip, case)
    show(schedules)
    if args.json:
        args.json.write_text(json.dumps([asdict(s) for s in schedules], indent=1))
    return schedules


def measure(chip: str, case: Case) -> list[Schedule]:
    """Compiles forward and backward of the case and reads what was scheduled."""
    with dumped(__file__, chip, json.dumps(asdict(case))) as folder:
        return [read(chip, case, kernel, folder) for kernel in KERNELS]


@contextlib.contextmanager
def dumped(script: str, chip: str, *case: str) -> Iterator[pathlib.Path]:
    """What libtpu scheduled of all that `script --compile chip *case` compiles, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            [sys.executable, script, "--compile", chip, *case],
            env=compiler_environment(chip, f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"),
            capture_output=True,
            text=True,
        )
        if run.returncode:
            raise SystemExit(f"{' '.join(case)} does not compile for {chip}:\n{run.stderr[-3000:]}")
        yield pathlib.Path(folder)


def compiler_environment(chip: str, flags: str = "") -> dict[str, str]:
    """The environment of a process that compiles for TPUs on a CPU."""
    library = libtpu.find()
    if library is None:
        raise SystemExit("This needs libtpu: make test installs it; or set TPU_LIBRARY_PATH.")
    return (
        os.environ
        | libtpu.variables(library, chip)
        | dict(JAX_PLATFORMS="cpu", JAX_ENABLE_COMPILATION_CACHE="false", LIBTPU_INIT_ARGS=flags)
        | dict(JAX_DISABLE_MOST_OPTIMIZATIONS="false")  # which tests set for the CPU
    )


def one_chip(chip: str):
    """A mesh of one device of this chip, to compile for."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    return jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",), axis_types=(jax.sharding.AxisType.Auto,))


def compile_case(chip: str, case: Case):
    import jax
    import jax.numpy as jnp

    mesh = one_chip(chip)
    sharding = jax.sharding.NamedSharding(mesh, jax.P())
    attend, shape = (ours if case.peer == "ours" else splash)(chip, case)
    x = jax.ShapeDtypeStruct(shape, case.dtype, sharding=sharding)

    def both(q, k, v):
        out, pullback = jax.vjp(attend, q, k, v)
        return out, pullback(jax.tree.map(jnp.ones_like, out))

    with jax.sharding.set_mesh(mesh):
        jax.jit(both).lower(x, x, x).compile()


def ours(chip: str, case: Case):
    import numpy as np
    from blockjax.kernels.block_sparse_attention import Tiles, block_sparse_attention

    from blockjax.masks import BlockMask

    tiles = Tiles(
        forward=(case.q_tile, case.k_tile), dq=(case.q_tile, case.k_tile), dkv=(case.k_tile, case.q_tile)
    )
    bq, bk = (case.q_tile, case.k_tile) if case.block is None else (case.block, case.block)
    if case.form == "causal":
        mask = BlockMask.causal(case.T, bq=bq, bk=bk)
    else:
        blocks = np.random.default_rng(0).random((case.N, case.T // bq, case.T // bk)) < 0.25
        mask = BlockMask.from_block_bool(blocks, bq=bq, bk=bk)

    def attend(q, k, v):
        return block_sparse_attention(q, k, v, mask, return_lse=True, implementation="tpu", config=tiles)

    return attend, (1, case.T, case.N, case.H)


def splash(chip: str, case: Case):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    q, k, step = case.q_tile, case.k_tile, min(case.k_tile, 512)
    sizes = kernel.BlockSizes(
        block_q=q, block_kv=k, block_kv_compute=step,
        block_q_dq=q, block_kv_dq=k,
        block_q_dkv=q, block_kv_dkv=k, block_kv_dkv_compute=step,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((case.T, case.T))] * case.N)
    attend = kernel.make_splash_mha_single_device(mask, block_sizes=sizes)
    return attend, (case.N, case.T, case.H)


def read(chip: str, case: Case, kernel: str, folder: pathlib.Path) -> Schedule:
    """The counts of one kernel from the final bundles and the use of units in each."""
    names = {
        "ours": f"block_sparse_attention_{kernel}.",
        "splash": f"splash_mha_{kernel.replace('forward', 'fwd')}",
    }
    program = Program.of(folder, names[case.peer])
    path = program.full_block_path()
    q_tile, k_tile = case.q_tile, case.k_tile
    if case.peer == "ours" and case.block is not None:
        # The side that stays is not gathered.
        q_tile, k_tile = (q_tile, case.block) if kernel == "dkv" else (case.block, k_tile)
    tiles = q_tile * k_tile / 128**2
    bundles = sum(path.values())
    return Schedule(
        chip=chip,
        case=case,
        kernel=kernel,
        bundles=bundles / tiles,
        floor=program.used("MATMUL", path) / tiles,
        occupancy={name: program.used(unit, path) / bundles for unit, name in UNITS.items()},
        spills=program.used("VSTORE:SPILL", path) / tiles,
    )


@dataclass
class Program:
    """The bundles of one kernel: their loop depth and text, and how many slots of each unit each one uses."""

    depth: list[int]
    text: list[str]
    units: list[str]
    capacity: list[int]
    use: list[list[int]]

    @staticmethod
    def of(folder: pathlib.Path, kernel: str) -> "Program":
        def newest(suffix):
            # Kernels that are differentiated may have jvp_ and transpose_ before their names.
            name = rf"\d+-(?:jvp_|transpose_)*{kernel}.*-\d+-{suffix}"
            found = [p for p in folder.iterdir() if re.fullmatch(name, p.name)]
            assert len(found) == 1, (kernel, suffix, found)
            return found[0].read_text()

        depth, text = [], []
        for line in newest("final_bundles.txt").splitlines():
            bundle = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s*(>*)(.*)", line)
            if bundle:
                empty = not bundle[2] and bundle[3].lstrip().startswith("{}")
                depth.append(depth[-1] if empty and depth else len(bundle[2]))
                text.append(f"{bundle[1] or ''} {bundle[3]}")
            elif text:
                text[-1] += line
        lines = newest("final_hlo-static-per-bundle-utilization.txt").splitlines()
        rows = [[int(n) for n in line.split()] for line in lines if re.fullmatch(r"[\d\s]*\d\s*", line)]
        units = next(line for line in lines if line.startswith("MATMUL")).split(", ")
        assert len(text) == len(rows) - 1, (len(text), len(rows))
        return Program(depth, text, units, rows[0], rows[1:])

    def used(self, unit: str, path: dict[int, int]) -> float:
        """Bundles that would do on this path if the unit alone were busy."""
        column = self.units.index(unit)
        return sum(self.use[i][column] * times for i, times in path.items()) / self.capacity[column]

    def full_block_path(self) -> dict[int, int]:
        """Bundles of one turn of the loop over tiles, each with how often it runs.

        The loop is the innermost one around all products whose number of turns the data decides, else the
        loop over the grid. Of branches that multiply the cheapest counts, the full block's; of the others
        those that start copies: what runs at the first or last tile only starts none.
        """
        products = {i for i, use in enumerate(self.use) if use[0]}
        around = [(a, b) for a, b in self.loops() if products <= set(range(a, b))]
        counted = [loop for loop in around if self.turns(*loop) is None]
        start, stop = min(counted or around[:1], key=lambda loop: loop[1] - loop[0])
        return self.path(start, stop, 1)

    def loops(self) -> list[tuple[int, int]]:
        """First bundle and end of each loop, outer ones first."""
        heads = [i for i, text in enumerate(self.text) if text.startswith("LB")]
        ends = (
            next((j for j in range(i, len(self.text)) if self.depth[j] < self.depth[i]), len(self.text))
            for i in heads
        )
        return list(zip(heads, ends, strict=True))

    def turns(self, start: int, stop: int) -> int | None:
        """How often a loop runs, if that is a constant of the program."""
        tests = re.findall(
            r"s32\.totalorder %s\w+, (\S+) /\* loop exit test", " ".join(self.text[start:stop])
        )
        return int(tests[-1]) if tests and tests[-1].isdigit() else None

    def path(self, start: int, stop: int, times: int) -> dict[int, int]:
        regions = []
        i = start
        while i < stop:
            end = self.branch_end(i, stop)
            if end is None:
                i += 1
            else:
                regions.append((i + 1, end))
                i = end
        multiply = [r for r in regions if self.total(r, "MATMUL")]
        cheapest = min(multiply, key=lambda r: self.total(r, "VALU"), default=None)
        path = dict.fromkeys(range(start, stop), times)
        for region in regions:
            a, b = region
            inner = self.path(a, b, times)
            copies = any("dma." in self.text[i] for i in range(a, b))
            if region == cheapest or (region not in multiply and copies):
                path.update({i: inner.get(i, 0) for i in range(a, b)})
            else:
                path.update({i: 0 for i in range(min(a + DELAY_SLOTS, b), b)})
        for a, b in self.loops():
            if start < a and b <= stop and all(path[i] for i in range(a, b)):
                path.update({i: path[i] * (self.turns(a, b) or 1) for i in range(a, b)})
        return path

    def branch_end(self, i: int, stop: int) -> int | None:
        """Where the forward branch in bundle i goes; None if there is none."""
        target = re.search(r"sbr\.rel \(!?%\w+\) target = \$region(\d+)", self.text[i])
        if target is None:
            return None
        here = re.compile(rf"(Start|Start/End empty) region {target[1]}\b")
        return next((j for j in range(i + 1, stop) if here.search(self.text[j])), None)

    def total(self, region: tuple[int, int], unit: str) -> int:
        column = self.units.index(unit)
        return sum(use[column] for use in self.use[slice(*region)])


def show(schedules: list[Schedule]):
    table = Table(title="Static schedule on the path of a full block: a count of bundles, not a time")
    for name in ("chip", "kernel", "peer", "form", "tile", "bundles", "floor", *UNITS.values(), "spills"):
        table.add_column(name, justify="left" if name in ("chip", "kernel", "peer", "form") else "right")
    for s in sorted(schedules, key=lambda s: (s.chip, KERNELS.index(s.kernel))):
        form = s.case.form if s.case.block is None else f"{s.case.form} {s.case.block}"
        table.add_row(
            s.chip, s.kernel, s.case.peer, form, f"{s.case.q_tile}x{s.case.k_tile}", f"{s.bundles:.1f}",
            f"{s.floor:.1f}", *(f"{x:.2f}" for x in s.occupancy.values()), f"{s.spills:.1f}",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    main()
