"""How the parts of a sequence move over devices, and how what is computed on the way comes home.

Everything here runs inside `shard_map`. A part *circulates*: it visits other devices one after the other, and
at each its holder computes something with what stays there. What belongs to the holder is folded there; what
belongs to the part follows it one step behind, or is sent home at once. Forward and backward of attention,
with keys or queries on the move, are this loop (Ring Attention, arXiv:2310.01889; TokenRing, 2412.20501).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from blockjax.partials import wide

Tree = Any


def step(x: Tree, axis: str, size: int, by: int) -> Tree:
    """Sends x `by` places on along an axis of `size`; zeros arrive where it would have come from beyond."""
    pairs = [(d, d + by) for d in range(size) if 0 <= d + by < size]
    return jax.tree.map(lambda a: lax.ppermute(a, axis, pairs), x)


@dataclass(frozen=True, eq=False)
class Ring:
    """`size` places along a mesh axis, each `stride` devices from the next.

    `uses` [size, size] bool: whether the queries of place i need the keys of place j.
    """

    axis: str
    size: int
    stride: int
    uses: np.ndarray
    loops = True

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
        B, S, *rest = x.shape
        # Of any other shape XLA makes an all-reduce of it for TPUs, which sends twice as much.
        rows = x.reshape(B, self.size, S // self.size, -1).swapaxes(0, 1).reshape(B * S, -1)
        own = lax.psum_scatter(rows, self.axis, scatter_dimension=0, tiled=True, **self._groups())
        return own.reshape(B, S // self.size, *rest)

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


@dataclass(frozen=True, eq=False)
class Journey:
    """A trip and what happens on it.

    `visit(part, offset) -> (here, back)` is given the part whose home is `offset` places behind; either
    result may be None. `fold` is of two results, here or back, in float32, and `empty` what a result that has
    met nothing is.
    """

    trip: Trip
    part: Tree
    visit: Callable
    fold: Callable
    empty: Tree = 0


LONG = 16
"""Hops beyond which those in the middle are one loop: a kernel of each would take minutes to compile."""


def circulate(ring: Ring, journeys: Sequence[Journey]) -> list[tuple[Tree, Tree]]:
    """Sends parts around, all at the same time.

    Returns:
        Of each journey, what this device folded, and what came back for its own part.
    """
    walks = [_Walk(ring, journey) for journey in journeys]
    hops = max(len(walk.offsets) for walk in walks)
    middle = range(1, min(len(walk.offsets) for walk in walks) - 1)
    if not (ring.loops and len(middle) > LONG and all(walk.even for walk in walks)):
        middle = range(0)
    for i in range(hops):
        if i not in middle:
            for walk, state in zip(walks, in_turn([walk.state for walk in walks]), strict=True):
                walk.state = state
                walk.hop(i)
        elif i == middle.start:

            def body(states, offsets):
                for walk, state, offset in zip(walks, in_turn(states), offsets, strict=True):
                    walk.state = state
                    walk.step(offset, 1 if walk.offsets[0] > 0 else -1)
                return [walk.state for walk in walks], None

            offsets = [jnp.asarray(walk.offsets[middle.start : middle.stop]) for walk in walks]
            states, _ = lax.scan(body, [walk.state.widened() for walk in walks], offsets)
            for walk, state in zip(walks, states, strict=True):
                walk.state = state
    return [walk.results() for walk in walks]


def in_turn(x: Tree) -> Tree:
    """x, whose parts are all there before anything is done with one of them.

    What has arrived waits for the work on what came before it: so the next transfer hides behind that work.
    Left to itself the compiler may do all transfers first.
    """
    return lax.optimization_barrier(x)


class _State(NamedTuple):
    """`moving` has arrived for the next visit; `following` is what belongs to the part that was here last."""

    moving: Tree
    following: Tree
    here: Tree
    back: Tree

    def widened(self) -> "_State":
        """With results as they are once folded: a loop's carry has one type."""
        results = jax.tree.map(wide, (self.following, self.here, self.back))
        return _State(self.moving, *results)


class _Walk:
    """A journey on its way."""

    def __init__(self, ring: Ring, journey: Journey):
        self.ring, self.journey, self.trip = ring, journey, journey.trip
        self.offsets = journey.trip.offsets
        self.live = [ring.live(offset, self.trip.moving) for offset in self.offsets]
        # Which places' parts have work at this offset or a later one.
        self.needed = [np.any(self.live[i:], axis=0) for i in range(len(self.offsets))]
        self.met = np.zeros(ring.size, bool)
        here = back = None
        if self.trip.local == "first":
            here, back = journey.visit(journey.part, 0)
        moving = self.send(journey.part, 0, 0) if self.offsets else None
        self.state = _State(moving, None, here, back)

    @property
    def even(self) -> bool:
        """Whether all hops are alike: to the next place, from all, with results that follow."""
        steps = np.diff((0, *self.offsets))
        alike = len(set(steps)) == 1 and abs(steps[0]) == 1
        return alike and self.trip.home == "follow" and all(live.all() for live in self.live)

    def send(self, moving: Tree, at: int, i: int) -> Tree:
        """To the i-th visit, from offset `at`."""
        return self.ring.shift(moving, self.offsets[i] - at, np.roll(self.needed[i], at))

    def hop(self, i: int) -> None:
        """The i-th visit, while the part is sent on to the next one."""
        if i >= len(self.offsets):
            return
        offset, before = self.offsets[i], self.offsets[i - 1] if i else 0
        ahead = self.send(self.state.moving, offset, i + 1) if i + 1 < len(self.offsets) else None
        following = self.state.following
        if following is not None:
            following = self.ring.shift(
                following, offset - before, np.roll(self.met, before), self.journey.empty
            )
        here, back = self.journey.visit(self.state.moving, offset)
        if back is not None and self.trip.home == "direct":
            senders = np.roll(self.live[i], offset)
            arrived = self.ring.shift(back, -offset, senders, self.journey.empty)
            self.state = self.state._replace(moving=ahead, back=self.fold(self.state.back, arrived))
        else:
            self.met = self.met | self.live[i]
            self.state = self.state._replace(moving=ahead, following=self.fold(following, back))
        self.state = self.state._replace(here=self.fold(self.state.here, here))

    def step(self, offset: jax.Array, by: int) -> None:
        """`hop` of an even walk, at an offset that is traced."""
        everyone = np.ones(self.ring.size, bool)
        ahead = self.ring.shift(self.state.moving, by, everyone)
        following = self.state.following
        if following is not None:
            following = self.ring.shift(following, by, everyone)
        here, back = self.journey.visit(self.state.moving, offset)
        here, following = self.fold(self.state.here, here), self.fold(following, back)
        self.state = _State(ahead, following, here, self.state.back)

    def results(self) -> tuple[Tree, Tree]:
        (_, following, here, back), part = in_turn((self.state, self.journey.part))
        if following is not None:
            at = self.offsets[-1]
            home = self.ring.shift(following, -at, np.roll(self.met, at), self.journey.empty)
            back = self.fold(back, home)
        if self.trip.local == "last":
            own = self.journey.visit(part, 0)
            here, back = self.fold(here, own[0]), self.fold(back, own[1])
        return here, back

    def fold(self, a: Tree, b: Tree) -> Tree:
        """Of two results, either of which may not be there."""
        return b if a is None else a if b is None else self.journey.fold(a, b)
