"""What the makers of TPUs publish about them; everything is of one device, as JAX counts devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from blockjax.errors import UsageError, nearest
from blockjax.train.flops import PEAK_FLOPS

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A family of TPUs.

    Attributes:
      name: as libtpu calls it in names of topologies.
      kind: `device_kind` of its devices.
      hbm_bytes: what libtpu lets a program have.
      hbm_rate: bytes/s.
      link_rate: bytes/s of one link to a neighbour, in one direction.
      wrap: extents that are a multiple of this are closed to a ring.
      options: what `get_topology_desc` must be told.
    """

    name: str
    kind: str
    hbm_bytes: int
    hbm_rate: float
    link_rate: float
    wrap: int
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16, FLOP/s."""
        return PEAK_FLOPS[self.kind]


# hbm_bytes: the limit that libtpu 0.0.52 names when a program is too large. Rates: cloud.google.com/tpu/docs
# (v4, v5e, v5p, v6e, tpu7x; there the interconnect of a chip, over all its links), and for v2 and v3 Jouppi
# et al., CACM 63(7), 2020. v2, v3 and tpu7x have two devices a chip, which share its memory and its links.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v2", "TPU v2", int(7.48 * GIB), 350e9, 31e9, 16),
        Chip("v3", "TPU v3", int(15.48 * GIB), 450e9, 41e9, 32),
        Chip("v4", "TPU v4", int(30.75 * GIB), 1228e9, 50e9, 4, {"chip_config_name": "megacore"}),
        Chip("v5e", "TPU v5 lite", int(15.75 * GIB), 819e9, 50e9, 16),
        Chip("v5p", "TPU v5", int(95.73 * GIB), 2765e9, 100e9, 4),
        Chip("v6e", "TPU v6 lite", int(31.24 * GIB), 1640e9, 100e9, 16),
        Chip("tpu7x", "TPU7x", int(94.74 * GIB), 3690e9, 50e9, 4),
    )
}


def chip(name: str) -> Chip:
    """The family of this name.

    Raises:
      UsageError: there is none.
    """
    if name not in CHIPS:
        raise UsageError(f"Unknown chip {name!r}.{nearest(name, CHIPS)}")
    return CHIPS[name]
