"""Which blocks of a sequence each device holds.

A layout permutes whole blocks, so that a mask's lists stay lists and positions are one number a block; each
device has its own in the order of the sequence, so that ranges stay ranges. Causal attention is balanced by
`zigzag` (each device one early and one late chunk: Llama 3, arXiv:2407.21783, section 3.3.2) and by `striped`
(blocks dealt round: Striped Attention, arXiv:2311.09431). Windows want `contiguous`, whose keys are at most a
neighbour away; `balanced` fits a given mask.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from blockjax.errors import UsageError, nearest
from blockjax.masks import BlockMask, Lists
from blockjax.masks.blocks import split
from blockjax.masks.predicates import is_concrete


@dataclass(frozen=True, eq=False)
class Layout:
    """`order` [P, n] int32: the blocks of each device, of `block` tokens, of a sequence of `length` tokens.

    Blocks past the end of the sequence are padding.
    """

    name: str
    order: np.ndarray
    block: int
    length: int

    @staticmethod
    def of(name: str, length: int, devices: int, block: int, masks: Sequence[BlockMask] = ()) -> "Layout":
        """`contiguous`, `zigzag`, `striped`, or `balanced` for masks of blocks that divide `block`.

        Raises:
            UsageError: the name is unknown, or `balanced` has no masks whose values are known.
        """
        if name not in LAYOUTS:
            raise UsageError(f"Unknown layout {name!r}.{nearest(name, LAYOUTS)}")
        blocks = -(-length // block)
        per_device = -(-blocks // devices)
        per_device += name == "zigzag" and per_device % 2
        order = LAYOUTS[name](devices, per_device, _weights(masks, block, devices * per_device))
        return Layout(name, order.astype(np.int32), block, length)

    @property
    def devices(self) -> int:
        return len(self.order)

    @property
    def tokens(self) -> int:
        """With padding, on all devices."""
        return self.order.size * self.block

    def check(self, mask: BlockMask, devices: int) -> None:
        """Raises UsageError unless arrays of this mask may lie so, without padding."""
        block = math.lcm(mask.bq, mask.bk)
        if not (self.tokens == self.length == mask.T == mask.S) or self.devices != devices:
            raise UsageError(
                f"Arrays that lie on {self.devices} devices as a layout of {self.length} tokens, "
                f"{self.tokens - self.length} of them padding, cannot serve a mask of T={mask.T} and "
                f"S={mask.S} over {devices} devices; give the layout's name to have them laid out."
            )
        if self.block % block:
            raise UsageError(
                f"A layout of blocks of {self.block} tokens would cut through those of the mask, "
                f"{mask.bq} x {mask.bk}."
            )

    @property
    def consecutive(self) -> bool:
        return bool((self.order.ravel() == np.arange(self.order.size)).all())

    @property
    def pieces(self) -> tuple[int, ...]:
        """Its entry of `PIECES`, over which recurrence goes; raises UsageError if it has none."""
        if self.consecutive:
            return PIECES["contiguous"]
        n = self.order.shape[1]
        if n % 2 == 0 and (self.order == LAYOUTS["zigzag"](self.devices, n, None)).all():
            return PIECES["zigzag"]
        raise UsageError(f"Recurrence runs over the layouts {', '.join(PIECES)}, not {self.name!r}.")

    def blocks(self, size: int) -> np.ndarray:
        """`order` in blocks of `size` tokens, a divisor of `block`."""
        return split(self.order, self.block // size)

    def of_blocks(self, size: int) -> "Layout":
        """The same of arrays over blocks of `size` tokens, a divisor of `block`, instead of over tokens."""
        return replace(self, block=self.block // size, length=-(-self.length // size))

    def apply(self, x: jax.Array, axis: int = 1, fill=0) -> jax.Array:
        """An array over the sequence's tokens in the order of the devices, padded with `fill`."""
        if x.shape[axis] != self.length:
            raise UsageError(f"The layout is for {self.length} tokens, but axis {axis} of {x.shape} differs.")
        if self.tokens > self.length:
            widths = [(0, self.tokens - self.length) if i == axis else (0, 0) for i in range(x.ndim)]
            x = jnp.pad(x, widths, constant_values=fill)
        return x if self.consecutive else _permute(self, x, axis, inverse=False)

    def restore(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """The inverse of `apply`."""
        if not self.consecutive:
            x = _permute(self, x, axis, inverse=True)
        return jax.lax.slice_in_dim(x, 0, self.length, axis=axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2, 3))
def _permute(layout: Layout, x, axis: int, inverse: bool):
    """The gradient is the other permutation: JAX would add up at its indices."""
    shape, axis, order = x.shape, axis % x.ndim, layout.order.ravel()
    x = x.reshape(*shape[:axis], -1, layout.block, *shape[axis + 1 :])
    return jnp.take(x, np.argsort(order) if inverse else order, axis=axis).reshape(shape)


_permute.defvjp(
    lambda layout, x, axis, inverse: (_permute(layout, x, axis, inverse), None),
    lambda layout, axis, inverse, _, dx: (_permute(layout, dx, axis, not inverse),),
)


def _contiguous(P: int, n: int, weights) -> np.ndarray:
    return np.arange(P * n).reshape(P, n)


def _zigzag(P: int, n: int, weights) -> np.ndarray:
    chunks = np.arange(P * n).reshape(2 * P, n // 2)
    return np.concatenate([chunks[:P], chunks[: P - 1 : -1]], 1)


def _striped(P: int, n: int, weights) -> np.ndarray:
    return np.arange(P * n).reshape(n, P).T


def _balanced(P: int, n: int, weights: np.ndarray | None) -> np.ndarray:
    """The heaviest block left goes to the device with the least work that has room."""
    if weights is None:
        raise UsageError("The layout 'balanced' needs masks whose values are known; 'striped' does not.")
    held, load = [[] for _ in range(P)], np.zeros(P)
    for block in np.argsort(-weights, kind="stable"):
        least = min((p for p in range(P) if len(held[p]) < n), key=lambda p: load[p])
        held[least].append(block)
        load[least] += weights[block]
    return np.sort(np.array(held), 1)


def _weights(masks: Sequence[BlockMask], block: int, blocks: int) -> np.ndarray | None:
    """Pairs of a query and a key in what each of the layout's blocks lists, [blocks]; None if not known."""
    if not masks or not all(map(is_concrete, masks)):
        return None
    weights = np.zeros(blocks)
    for mask in masks:
        rows = np.asarray(mask.counts_per_row(), float).mean((0, 1)) * mask.bq * mask.bk
        per_block = block // mask.bq
        rows = np.pad(rows, (0, blocks * per_block - len(rows)))
        weights += rows.reshape(blocks, per_block).sum(1)
    return weights


LAYOUTS: dict[str, Callable] = {
    "contiguous": _contiguous,
    "zigzag": _zigzag,
    "striped": _striped,
    "balanced": _balanced,
}


PIECES = {"contiguous": (1,), "zigzag": (1, -1)}
"""By layout: the runs of consecutive tokens on each device, and whether later devices hold later ones.

Each begins on the device on which the one before ends.
"""


def work(mask: BlockMask, q: Layout, kv: Layout) -> np.ndarray | None:
    """Listed blocks of each shard of queries and shard of keys, [P, P], mean over the lists.

    None for a mask whose values are not known.
    """
    if not is_concrete(mask):
        return None
    P = kv.devices
    shard = np.empty(mask.nk, np.int64)
    for j, blocks in enumerate(kv.blocks(mask.bk)):
        shard[blocks[blocks < mask.nk]] = j
    per_row = np.zeros((mask.nq, P))
    if isinstance(mask, Lists):
        b, h, nq, W = np.shape(mask.index)
        listed = np.arange(W) < np.asarray(mask.counts)[..., None]
        rows = np.broadcast_to(np.arange(nq)[:, None], listed.shape)
        np.add.at(per_row, (rows[listed], shard[np.asarray(mask.index)[listed]]), 1 / (b * h))
    else:
        lo, _, _, hi = mask.bounds(np.arange(mask.nq))
        for j in range(P):
            before = np.concatenate([[0], np.cumsum(shard == j)])
            per_row[:, j] = before[hi] - before[lo]
    rows = np.zeros((q.blocks(mask.bq).size, P))
    rows[: mask.nq] = per_row
    return np.stack([rows[blocks].sum(0) for blocks in q.blocks(mask.bq)])


def lockstep(table: np.ndarray) -> float:
    """Efficiency of a ring on this work: all devices wait for the slowest of each hop."""
    P = len(table)
    hops = [table[np.arange(P), (np.arange(P) - s) % P].max() for s in range(P)]
    return float(table.sum() / (P * sum(hops))) if table.any() else 1.0
