"""How the parts of a sequence move over devices, and how what is computed on the way comes home.

Everything here runs inside `shard_map`. A part *circulates*: it visits other devices one after the other, and
at each its holder computes something with what stays there. What belongs to the holder is folded there; what
belongs to the part follows it one step behind, or is sent home at once. Forward and backward of attention,
with keys or queries on the move, are this loop (Ring Attention, arXiv:2310.01889; TokenRing, 2412.20501).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Tree = Any


@dataclass(frozen=True, eq=False)
class Ring:
    """`size` places along a mesh axis, each `stride` devices from the next.

    `uses` [size, size] bool: whether the queries of place i need the keys of place j.
    """

    axis: str
    size: int
    stride: int
    uses: np.ndarray

    @property
    def place(self):
        """Of this device."""
        return lax.axis_index(self.axis) // self.stride

    def live(self, offset: int, moving: str) -> np.ndarray:
        """For each part: whether it has work at `offset` places from home."""
        here = np.arange(self.size)
        there = (here + offset) % self.size
        return self.uses[there, here] if moving == "keys" else self.uses[here, there]

    def shift(self, x: Tree, by: int, senders: np.ndarray, empty: Tree = 0) -> Tree:
        """Sends x `by` places on, from the places of `senders` [size] bool; `empty` arrives elsewhere."""
        P = self.size * self.stride
        devices = np.repeat(senders, self.stride)
        pairs = [(d, (d + by * self.stride) % P) for d in range(P) if devices[d]]
        arrived = np.roll(senders, by)
        x = jax.tree.map(lambda a: lax.ppermute(a, self.axis, pairs), x)
        if arrived.all():
            return x
        some = jnp.asarray(arrived)[self.place]
        fills = jax.tree.map(lambda _: empty, x) if not isinstance(empty, tuple) else empty
        return jax.tree.map(lambda a, fill: a if fill == 0 else jnp.where(some, a, fill), x, fills)

    def gather(self, x: jax.Array) -> jax.Array:
        """What all places hold, one after the other along axis 1."""
        return lax.all_gather(x, self.axis, axis=1, tiled=True, **self._groups())

    def scatter(self, x: jax.Array) -> jax.Array:
        """The sum over places of each one's part of x along axis 1: the transpose of `gather`."""
        return lax.psum_scatter(x, self.axis, scatter_dimension=1, tiled=True, **self._groups())

    def _groups(self) -> dict:
        if self.stride == 1:
            return {}
        groups = [[place * self.stride + i for place in range(self.size)] for i in range(self.stride)]
        return dict(axis_index_groups=groups)


@dataclass(frozen=True)
class Trip:
    """Which side moves, the offsets it visits in their order, and how its results come home.

    `follow`: they travel along, one step behind. `direct`: from each visit straight home.
    """

    moving: Literal["keys", "queries"]
    offsets: tuple[int, ...]
    home: Literal["follow", "direct"] = "follow"
    local: Literal["first", "last"] | None = "first"


def circulate(
    ring: Ring,
    trip: Trip,
    part: Tree,
    visit: Callable,
    fold: Callable,
    empty: Tree = 0,
    narrow: Callable = lambda x: x,
):
    """Sends `part` around; returns what this device folded, and what came back for its own part.

    Args:
        visit: `visit(part, offset) -> (here, back)`, with the part whose home is `offset` places behind;
            either result may be None.
        fold: of two results, here or back.
        empty: what a result that has met nothing is.
        narrow: makes of a result what goes straight home, where it is widened again.
    """
    results: list[Tree] = [None, None]

    def take(*new):
        for i, x in enumerate(new):
            if x is not None:
                results[i] = x if results[i] is None else fold(results[i], x)

    live = [ring.live(offset, trip.moving) for offset in trip.offsets]
    moving, at, following, met = part, 0, None, np.zeros(ring.size, bool)
    if trip.local == "first":
        take(*visit(part, 0))
    for i, offset in enumerate(trip.offsets):
        needed = np.any(live[i:], axis=0)
        moving = ring.shift(moving, offset - at, np.roll(needed, at))
        here, back = visit(moving, offset)
        take(here)
        if back is not None and trip.home == "direct":
            arrived = ring.shift(narrow(back), -offset, np.roll(live[i], offset), empty)
            take(None, jax.tree.map(lambda a, b: a.astype(b.dtype), arrived, back))
        elif back is not None:
            if following is not None:
                arrived = ring.shift(following, offset - at, np.roll(met, at), empty)
                back = fold(arrived, back)
            following, met = back, met | live[i]
        at = offset
    if following is not None:
        take(None, ring.shift(following, -at, np.roll(met, at), empty))
    if trip.local == "last":
        take(*visit(part, 0))
    return tuple(results)
