"""A compiled program as its text says: computations, instructions, and how often each runs in a step."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0, "opaque": 0}
ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
ASSIGNMENT = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
# What an instruction runs, but for functions of scalars that reduce or compare.
CALLS = re.compile(r"\b(?:calls|body|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
SCALAR_FUNCTIONS = (
    "reduce",
    "reduce-window",
    "sort",
    "scatter",
    "select-and-scatter",
    "map",
    "reduce-scatter",
)
VMEM = "S(1)"  # in a layout: the array lies in the fast memory of the TPU


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`%name = shape op(operands), rest`."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def bytes(self) -> int:
        """Of what it results in, wherever that lies."""
        return sum(size for size, _ in arrays(self.shape))


def arrays(shape: str) -> Iterator[tuple[int, str]]:
    """Bytes and layout of each array in a shape."""
    for dtype, dims, layout in ARRAY.findall(shape):
        bits = BITS.get(dtype) if dtype in BITS else int(re.search(r"\d+", dtype)[0])
        yield math.prod(map(int, dims.split(","))) * bits // 8 if dims else bits // 8, layout


class Program:
    """A program that `Compiled.as_text` printed.

    Attributes:
      computations: instructions in order, by name of the computation.
      entry: the one that runs first.
      runs: how often each computation runs in a step; those that never do are missing.
      fused: computations whose values stay inside one instruction.
      uncounted: loops of a length that the program does not say; they count once.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if not line.startswith(" "):
                if header := HEADER.match(line):
                    current = self.computations[header[2]] = []
                    self.entry = header[2] if header[1] else self.entry
            elif match := ASSIGNMENT.match(line):
                current.append(_instruction(match[2], match[3], root=bool(match[1])))
        self.runs: collections.Counter[str] = collections.Counter()
        self.fused: set[str] = set()
        self.uncounted = 0
        self._count(self.entry, 1, fused=False)

    def instructions(self) -> Iterator[tuple[str, Instruction, int]]:
        """Computation, instruction and how often it runs in a step, for all that do."""
        for name, runs in self.runs.items():
            for instruction in self.computations[name]:
                yield name, instruction, runs

    def hbm_bytes(self) -> int:
        """Bytes that the instructions of a step read from and write to main memory, one at a time.

        What a fusion only slices, or updates a slice of, counts as large as the slice. A kernel reads each
        operand once.
        """
        return sum(
            runs * self._traffic(name, instruction)
            for name, instruction, runs in self.instructions()
            if name not in self.fused
        )

    def _traffic(self, computation: str, instruction: Instruction) -> int:
        op = instruction.op
        if op in NO_TRAFFIC or op.endswith(("-done", "-update")):
            return 0
        by_name = self._by_name(computation)
        operands = [by_name[name] for name in instruction.operands if name in by_name]
        if op.startswith(("copy-start", "slice-start", "async-start")):
            return 2 * min((_far(x.shape) for x in operands), default=0)
        if op == "dynamic-slice":
            return 2 * _far(instruction.shape)
        if op == "dynamic-update-slice":
            return 2 * _far(operands[1].shape) if len(operands) > 1 else 0
        called = CALLS.search(instruction.rest) if op == "fusion" else None
        if called is None or called[1] not in self.computations:
            return _far(instruction.shape) + sum(_far(x.shape) for x in operands)
        return self._fusion_traffic(called[1], instruction, operands)

    def _fusion_traffic(self, fused: str, fusion: Instruction, operands: list[Instruction]) -> int:
        body = self.computations[fused]
        by_name = self._by_name(fused)
        users = collections.defaultdict(list)
        for instruction in body:
            for name in instruction.operands:
                users[name].append(instruction)
        total = _far(fusion.shape)
        for update in (x for x in body if x.op == "dynamic-update-slice"):
            # The array is updated in place: it is neither read nor written as a whole.
            whole, part = by_name[update.operands[0]], by_name[update.operands[1]]
            if whole.bytes == update.bytes and _far(fusion.shape):
                total -= max(0, update.bytes - part.bytes)
        parameters = {int(x.rest.strip("()") or 0): x for x in body if x.op == "parameter"}
        for i, operand in enumerate(operands):
            uses = users[parameters[i].name] if i in parameters else []
            if uses and all(_reads_a_slice(use, parameters[i].name) for use in uses):
                parts = [use.bytes for use in uses if use.op != "dynamic-update-slice"]
                total += min(_far(operand.shape), sum(parts))
            else:
                total += _far(operand.shape)
        return max(total, 0)

    def _by_name(self, computation: str) -> dict[str, Instruction]:
        return {x.name: x for x in self.computations[computation]}

    def _count(self, name: str, runs: int, fused: bool) -> None:
        self.runs[name] += runs
        if fused:
            self.fused.add(name)
        for instruction in self.computations[name]:
            inside = fused or instruction.op == "fusion"
            called = CALLS.findall(instruction.rest)
            called += [x.strip().lstrip("%") for x in ",".join(BRANCHES.findall(instruction.rest)).split(",")]
            if instruction.op == "call":
                called += re.findall(r"to_apply=%?([\w.\-]+)", instruction.rest)
            times = self._turns(name, instruction) if instruction.op == "while" else 1
            for callee in called:
                if callee in self.computations and instruction.op not in SCALAR_FUNCTIONS:
                    self._count(callee, runs * times, inside)

    def _turns(self, computation: str, loop: Instruction) -> int:
        """How often a loop's body runs: the compiler's word, else the constant that the counter meets."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = self.computations.get(re.search(r"condition=%?([\w.\-]+)", loop.rest)[1], [])
        by_name = {x.name: x for x in condition}
        root = next((x for x in condition if x.root), None)
        if root is not None and root.op in ("compare", "fusion"):
            for name in root.operands:
                bound = by_name.get(name)
                if bound is not None and bound.op == "constant" and bound.rest.strip("()").isdigit():
                    return int(bound.rest.strip("()"))
        self.uncounted += 1
        return 1


NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
    "after-all", "partition-id", "replica-id", "iota", "opt-barrier",
}  # fmt: skip


def _reads_a_slice(use: Instruction, name: str) -> bool:
    if use.op in ("dynamic-slice", "slice", "gather"):
        return use.operands[0] == name
    return use.op == "dynamic-update-slice" and use.operands[0] == name and use.operands[1] != name


def _far(shape: str) -> int:
    """Bytes of a shape outside of the fast memory."""
    return sum(size for size, layout in arrays(shape) if VMEM not in layout)


def _instruction(name: str, text: str, root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    op, _, _ = rest.partition("(")
    close = _closing(rest, len(op))
    inner = rest[len(op) + 1 : close]
    operands = () if op in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", inner))
    if not operands and op not in ("constant", "parameter", "iota"):  # printed without the sign
        operands = tuple(re.findall(r"(?:^|, )([\w.\-]+)(?=,|$)", inner))
    after = f"({inner})" if op in ("constant", "parameter") else rest[close + 1 :]
    return Instruction(name, shape, op, operands, after, root)


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    return len(text)
