"""What the devices of a compiled program say to each other, by kind and by axis of the mesh."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np

from blockjax.pods.program import Instruction, Program

# Bytes that a device sends of its operand of b bytes in a group of n, each way around a ring.
SENT: dict[str, Callable[[float, int], float]] = {
    "all-gather": lambda b, n: b * (n - 1),
    "all-reduce": lambda b, n: 2 * b * (n - 1) / n,
    "reduce-scatter": lambda b, n: b * (n - 1) / n,
    "all-to-all": lambda b, n: b * (n - 1) / n,
    "ragged-all-to-all": lambda b, n: b * (n - 1) / n,
    "collective-broadcast": lambda b, n: b,
    "collective-permute": lambda b, n: b,
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of communication between devices along the same axes.

    Attributes:
      kind: a key of `SENT`.
      axes: of the mesh, along which the devices of a group lie.
      size: devices in a group.
      group: one of these groups, as places of its devices in the mesh; of a permutation, who sends to whom.
      count: how often it happens in a step.
      sent: bytes that each device sends in a step.
    """

    kind: str
    axes: tuple[str, ...]
    size: int
    group: tuple[int, ...]
    count: int
    sent: float


def collectives(program: Program, mesh: jax.sharding.Mesh) -> list[Collective]:
    """All communication of a step, summed over loops, what sends most first."""
    groups: dict[tuple, tuple[int, ...]] = {}
    counts: collections.Counter = collections.Counter()
    sent: collections.Counter = collections.Counter()
    for name, instruction, runs in program.instructions():
        kind = _kind(name, instruction)
        group = _group(instruction.rest, mesh.size) if kind else []
        if len(group) > 1:
            key = kind, _axes(group, mesh), len(group)
            groups.setdefault(key, tuple(sorted(group)))
            by_name = {x.name: x for x in program.computations[name]}
            operands = sum(by_name[x].bytes for x in instruction.operands if x in by_name)
            counts[key] += runs
            sent[key] += runs * SENT[kind](operands, len(group))
    found = [Collective(*key, groups[key], counts[key], sent[key]) for key in counts]
    return sorted(found, key=lambda c: -c.sent)


def _kind(computation: str, instruction: Instruction) -> str | None:
    op = instruction.op.removesuffix("-start")
    if op not in SENT:
        return None
    # On TPUs a reduce-scatter is a fusion of an all-reduce and a slice.
    scattered = op == "all-reduce" and computation.startswith("all-reduce-scatter")
    return "reduce-scatter" if scattered else op


def _group(rest: str, devices: int) -> list[int]:
    """One group of devices, from any of the ways in which groups are printed."""
    if permutation := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest):
        pairs = (pair.split(",") for pair in re.findall(r"\{(\d+,\d+)\}", permutation[1]))
        return next(([int(a), int(b)] for a, b in pairs if a != b), [])
    if explicit := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return [int(i) for i in explicit[1].split(",")]
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        order = np.arange(devices).reshape([int(n) for n in tiled[3].split(",")])
        if tiled[4]:
            order = order.transpose([int(n) for n in tiled[4].split(",")])
        return order.reshape(int(tiled[1]), int(tiled[2]))[0].tolist()
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[2])
        return _along(sizes, parts)
    return list(range(devices))


def _along(sizes: dict[str, int], parts: Sequence[tuple[str, str, str]]) -> list[int]:
    """The first group along some axes of a mesh; of an axis possibly a part, `'x':(before)size`."""
    group = np.zeros(1, int)
    stride_of = {}
    stride = 1
    for name, n in reversed(sizes.items()):
        stride_of[name] = stride
        stride *= n
    for name, before, size in parts:
        n = int(size) if size else sizes[name]
        step = stride_of[name] * (sizes[name] // (int(before) * n) if size else 1)
        group = (group[:, None] + step * np.arange(n)).ravel()
    return group.tolist()


def _axes(group: Sequence[int], mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    shape = tuple(mesh.shape.values())
    places = np.array(np.unravel_index(group, shape))
    return tuple(name for name, along in zip(mesh.shape, places, strict=True) if len(set(along.tolist())) > 1)
