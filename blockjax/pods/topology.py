"""TPU pods by name: their chips, their shape, and devices to compile for."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import topologies

from blockjax.errors import UsageError, nearest
from blockjax.parallel.mesh import MESH_AXES
from blockjax.pods import libtpu
from blockjax.pods.chips import CHIPS, Chip, chip


@dataclasses.dataclass(frozen=True)
class Topology:
    """A pod, or a part of one.

    Attributes:
      chip: of which family it is.
      shape: chips along each direction of the torus.
      devices: to compile for; programs cannot run on them.
    """

    chip: Chip
    shape: tuple[int, ...]
    devices: Sequence[jax.Device]

    @property
    def name(self) -> str:
        """Such as `v5p:8x8x8`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def links(self, group: Sequence[jax.Device]) -> int:
        """Links over which each device of a group sends to the next ones, at least 1.

        For each direction of the torus in which the group extends, two if it goes around as a ring, else one.
        """
        coords = np.array([device.coords[: len(self.shape)] for device in group])
        count = 0
        for along, extent in zip(coords.T, self.shape, strict=True):
            met = len(set(along.tolist()))
            ring = met == extent and extent > 2 and extent % self.chip.wrap == 0
            count += 0 if met == 1 else 2 if ring else 1
        return max(count, 1)


def parse(name: str) -> tuple[Chip, tuple[int, ...]]:
    """Family and shape of a topology such as `v5p:8x8x8`.

    Raises:
      UsageError: it is not of this form, or there is no such family.
    """
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*){1,2})", name)
    if not match:
        raise UsageError(
            f"--topology={name!r} must be a chip and its shape, such as v5p:8x8x8 or v6e:16x16. "
            f"Chips: {', '.join(CHIPS)}."
        )
    return chip(match[1]), tuple(map(int, match[2].split("x")))


def open_topology(name: str) -> Topology:
    """The topology of this name. Call it before anything else asks JAX for devices.

    Raises:
      UsageError: libtpu is missing, or does not know this chip or this shape.
    """
    family, shape = parse(name)
    path = libtpu.find()
    if path is None:
        raise UsageError(
            "Compiling for TPUs needs libtpu, which runs on any x86 Linux machine: pip install libtpu, "
            "or set TPU_LIBRARY_PATH to libtpu.so."
        )
    for key, value in libtpu.variables(path, family.name).items():
        os.environ.setdefault(key, value)
    jax.config.update("jax_platforms", "cpu")  # with libtpu installed JAX would look for TPUs
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{family.name}:{'x'.join(map(str, shape))}", **family.options
        )
    except Exception as error:
        reason = str(error).partition("\n")[0].partition(": ")[2] or str(error)
        raise UsageError(f"libtpu does not take --topology={name}: {reason.rstrip('.')}.") from error
    return Topology(family, shape, description.devices)


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of mesh axes from `data:8,fsdp:16,seq:4`; those not named are 1.

    Raises:
      UsageError: it is not of this form.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    seen = set()
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition(":"))
        if not re.fullmatch(r"-1|\d+", size):
            raise UsageError(f"--mesh={text!r}: write axes with their sizes, such as data:8,fsdp:16,seq:4.")
        if axis not in sizes:
            raise UsageError(f"--mesh={text}: unknown axis {axis!r}.{nearest(axis, MESH_AXES)}")
        if axis in seen:
            raise UsageError(f"--mesh={text}: {axis!r} is there twice.")
        seen.add(axis)
        sizes[axis] = int(size)
    return sizes
