"""What is static about a TPU call: the layout of each side, tiles per chip, and the fast memory they need."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from blockjax.kernels.block_sparse_attention.spec import Tiles
from blockjax.kernels.platforms import target

TILES = {
    "v5e": Tiles(forward=(1024, 512), dq=(1024, 2048), dkv=(1024, 2048)),
    "v5p": Tiles(forward=(1024, 512), dq=(1024, 1024), dkv=(1024, 1024)),
    "v6e": Tiles(forward=(2048, 512), dq=(1024, 2048), dkv=(1024, 2048)),
}
"""By chip; chosen by `experiments/tpu_schedule.py`."""

GATHERED = 1024
"""Most rows gathered from smaller blocks: a row of a walk ends in a tile that is half empty on average."""

WIDE = ("v6e",)
"""Chips whose matrix units have 256 columns."""

LANES = 128
MIB = 2**20
SCALAR_MEMORY = int(0.7 * MIB)
"""Bytes that walks may take of the 1 MiB a core has."""
VECTOR_MEMORY = 56 * MIB
"""Bytes that a kernel may take of the 64 MiB or more a core has."""
LIST_ALIGNMENT = 1024
"""Lists that stay in HBM are copied from multiples of this: the tile of a one-dimensional int32 array."""


def chip() -> str | None:
    """The key in `TILES` of the device that is compiled for; the first off TPUs, None for others of them."""
    platform, kind = target()
    if platform != "tpu":
        return next(iter(TILES))
    names = {"v5 lite": "v5e", "v5e": "v5e", "v5": "v5p", "v6": "v6e"}
    return next((chip for name, chip in names.items() if name in kind.lower()), None)


def fitting(tiles: Tiles, H: int, Hv: int, dtype) -> Tiles | None:
    """The tiles, halved until they fit vector memory; None if none do."""
    fit = [_fitting(kernel, *rows, H, Hv, dtype) for kernel, rows in tiles._asdict().items()]
    return None if None in fit else Tiles(*fit)


def _fitting(kernel: str, anchor: int, stream: int, H: int, Hv: int, dtype) -> tuple[int, int] | None:
    while vector_memory(kernel, anchor, stream, H, Hv, dtype) > VECTOR_MEMORY:
        if max(anchor, stream) <= LANES:
            return None
        anchor, stream = (anchor // 2, stream) if anchor > stream else (anchor, stream // 2)
    return anchor, stream


def vector_memory(kernel: str, anchor: int, stream: int, H: int, Hv: int, dtype) -> int:
    """Bytes for the buffers, accumulators and temporaries of a kernel."""
    H, Hv = (-(-x // LANES) * LANES for x in (H, Hv))
    size = jnp.dtype(dtype).itemsize
    pipelined = dict(forward=H + Hv, dq=2 * H + Hv, dkv=2 * (H + Hv))[kernel]
    kept = dict(forward=Hv + 3 * LANES, dq=H + 3 * LANES, dkv=H + Hv)[kernel]
    return 2 * size * (anchor * pipelined + stream * (H + Hv)) + 4 * anchor * (kept + 4 * stream)


def scalar_memory(rows: int, entries: int) -> int:
    """Bytes for the table of a walk, for two windows of it that are double-buffered, and for entries."""
    return 4 * (4 * 4 * rows + entries)


def lists_fit(rows: int, entries: int) -> bool:
    """Whether all entries of all lists lie in scalar memory; else they stay in HBM."""
    return scalar_memory(rows, entries) <= SCALAR_MEMORY


def list_window(longest: int) -> int:
    """Entries to copy for a row of at most `longest` that begins anywhere."""
    return (-(-longest // LIST_ALIGNMENT) + 1) * LIST_ALIGNMENT


@dataclass(frozen=True)
class Side:
    """The tokens of one side as a kernel stores them: `[B, heads, blocks * rows, D]`.

    A block of `block` tokens is padded to `padded`; `pack` heads that share their lists lie in it one after
    the other. Kernels take it in `parts` units of `part` rows.
    """

    length: int
    block: int
    padded: int
    pack: int
    heads: int
    part: int

    @staticmethod
    def of(length: int, block: int, heads: int, sharing: int, limit: int) -> "Side":
        """`heads` heads in groups of `sharing` that may be packed; tiles of at most about `limit` rows."""
        block = min(block, length)
        padded = max(16, 1 << (block - 1).bit_length()) if block <= LANES else -(-block // LANES) * LANES
        pack = max(g for g in range(1, sharing + 1) if _packs(g, sharing, padded, limit))
        part = pack * padded
        if part > max(limit, LANES):
            # Longer than 128, so a multiple of it.
            part = max(x for x in range(LANES, max(limit, LANES) + 1, LANES) if part % x == 0)
        return Side(length, block, padded, pack, heads // pack, part)

    @property
    def blocks(self) -> int:
        return -(-self.length // self.block)

    @property
    def rows(self) -> int:
        return self.pack * self.padded

    @property
    def parts(self) -> int:
        return self.rows // self.part

    @property
    def units(self) -> int:
        return self.blocks * self.parts

    @property
    def piece(self) -> int:
        """Rows of a unit that are consecutive tokens of one head."""
        return self.part // self.pack

    def lay(self, x, fill=0):
        """[B, length, heads, D] -> [B, heads / pack, blocks * rows, D]"""
        x = jnp.pad(
            x, [(0, 0), (0, self.blocks * self.block - self.length), (0, 0), (0, 0)], constant_values=fill
        )
        x = x.reshape(x.shape[0], self.blocks, self.block, -1, self.pack, x.shape[-1])
        x = jnp.pad(x, [(0, 0)] * 2 + [(0, self.padded - self.block)] + [(0, 0)] * 3, constant_values=fill)
        x = x.transpose(0, 3, 1, 4, 2, 5)
        return x.reshape(*x.shape[:2], self.blocks * self.rows, x.shape[-1])

    def unlay(self, x):
        """The inverse of `lay`."""
        x = x.reshape(*x.shape[:2], self.blocks, self.pack, self.padded, x.shape[-1])
        x = x.transpose(0, 2, 4, 1, 3, 5)[:, :, : self.block]
        return x.reshape(x.shape[0], self.blocks * self.block, -1, x.shape[-1])[:, : self.length]

    def lanes(self, *rows):
        """Numbers per token along lanes, [B, heads / pack | 1, units, n, lanes], from n pairs of [B, length,
        heads | 1] and what pads it.

        Units of fewer than 128 rows repeat to fill the lanes.
        """
        laid = []
        for x, fill in rows:
            x = jnp.broadcast_to(x[..., None], (*x.shape[:2], max(x.shape[2], self.pack), 1))
            laid.append(self.lay(x, fill)[..., 0].reshape(x.shape[0], -1, self.units, 1, self.part))
        return jnp.tile(jnp.concatenate(laid, axis=3), max(1, LANES // self.part))


def _packs(g, sharing, padded, limit):
    """Whether g heads may be packed: rows of a tile are a power of two, or a multiple of 128."""
    fits = g == 1 or g * padded <= limit
    return fits and sharing % g == 0 and (g & (g - 1) == 0 or g * padded % LANES == 0)


@dataclass(frozen=True)
class Stream:
    """A streamed side: `slots` units a tile, one copy for all of them where they are always consecutive."""

    side: Side
    slots: int
    consecutive: bool

    @staticmethod
    def of(side: Side, limit: int, consecutive: bool) -> "Stream":
        limit = limit if side.part >= limit else min(limit, GATHERED)
        whole = math.lcm(side.part, LANES) // side.part
        slots = max(whole, limit // side.part // whole * whole)
        slots = min(slots, -(-side.units // whole) * whole)
        return Stream(side, slots, consecutive and slots > 1)

    @property
    def rows(self) -> int:
        return self.slots * self.side.part

    def extend(self, x):
        """[B, heads, rows | units, ...] with room behind: a tile may begin at the last unit."""
        if not self.consecutive:
            return x
        room = (self.slots - 1) * (self.side.part if x.ndim == 4 else 1)
        return jnp.pad(x, [(0, 0), (0, 0), (0, room)] + [(0, 0)] * (x.ndim - 3))


class Route(NamedTuple):
    """Which shards of keys a place visits, and how they get there.

    `axis` is the mesh axis of the ring, `size` its places, `stride` the devices from one to the next;
    `visits` are the offsets `t` of the places `t` before this one, negative ones behind, the own shard first.
    `halves`: the shard from the opposite place comes by both ways, half of its heads each.
    """

    axis: str
    size: int
    stride: int
    visits: tuple[int, ...]
    halves: bool

    @staticmethod
    def of(axis: str, size: int, stride: int, offsets, heads: int) -> "Route":
        """To the places `offsets` before this one, of 1 .. size - 1, by the shorter way."""
        near = [t if 2 * t <= size else t - size for t in offsets]
        halves = heads % 2 == 0 and 2 * max(near, default=0) == size
        return Route(axis, size, stride, (0, *sorted(near, key=lambda t: (abs(t), -t))), halves)

    @property
    def copies(self) -> tuple[int, int]:
        """How often this place sends to the next one, and to the one before."""
        there, back = max(0, *self.visits), max(0, *(-t for t in self.visits))
        return (there, there) if self.halves else (there, back)

    @property
    def shards(self) -> tuple[float, float]:
        """How many shards that are."""
        there, back = self.copies
        return there - self.halves / 2, back - self.halves / 2
