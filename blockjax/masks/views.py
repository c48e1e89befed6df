"""What a mask looks like: exact pair counts and the picture. Concrete masks, one row of tiles at a time."""

import jax
import numpy as np

from blockjax.errors import UsageError
from blockjax.masks.predicates import EMPTY, FULL, FULL_TAG, PARTIAL, is_concrete


def visible_pairs_of_tiles(mask) -> float:
    """Visible query-key pairs, mean over the mask's lists; evaluates each distinct partial tile once."""
    tags = mask.tags()
    b, h, nq, _ = tags.shape
    total = 0
    for row in range(nq):
        rows = min(mask.bq, mask.T - row * mask.bq)
        full = tags[:, :, row] >= FULL_TAG
        total += rows * mask.bk * int(full.sum())
        partial = np.argwhere((tags[:, :, row] > 0) & ~full)
        keys, times = np.unique(
            [(j, tags[i, k, row, j]) for i, k, j in partial] or np.zeros((0, 2), int),
            axis=0,
            return_counts=True,
        )
        for (j, tag), n in zip(keys, times, strict=True):
            total += int(n) * int(
                _tile(mask, lambda pq, pk, tag=tag: mask.visible(tag, pq, pk), row, j).sum()
            )
    return total / (b * h)


def refine(predicate, kind, mask):
    """`kind` `[nq, nk]` with every PARTIAL tile settled by evaluating its tokens."""
    kind = kind.copy()
    for row, j in np.argwhere(kind == PARTIAL):
        tile = _tile(mask, predicate.visible, row, j)
        if not tile.any():
            kind[row, j] = EMPTY
        elif tile.all() and tile.shape == (mask.bq, mask.bk):
            kind[row, j] = FULL
    return kind


def plot(mask, *, batch: int, head: int, ax=None):
    """Draws one head of one batch entry; returns the figure."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    require_concrete(mask, "plot()")
    b, h = mask.lists_shape
    if not (0 <= batch < b and 0 <= head < h):
        raise UsageError(
            f"The mask has lists for {b} batch entries and {h} heads, got batch={batch}, head={head}."
        )
    tags = mask.tags()[batch, head]
    kind = np.where(tags >= FULL_TAG, FULL, np.where(tags > 0, PARTIAL, EMPTY))
    colours = ("#f4f1ea", "#f2a65a", "#2f4b7c")
    if ax is None:
        figure, ax = plt.subplots(figsize=(6.0, 5.4), layout="constrained")
    else:
        figure = ax.figure
    extent = (0, mask.nk * mask.bk, mask.nq * mask.bq, 0)
    ax.imshow(
        kind, cmap=ListedColormap(colours), vmin=0, vmax=2, extent=extent, aspect="auto", interpolation="none"
    )
    if max(mask.nq, mask.nk) <= 64:
        ax.set_xticks(np.arange(0, extent[1], mask.bk), minor=True)
        ax.set_yticks(np.arange(0, extent[2], mask.bq), minor=True)
        ax.grid(which="minor", color="white", linewidth=0.6)
        ax.tick_params(which="minor", length=0)
    ax.set_xlim(0, mask.S)
    ax.set_ylim(mask.T, 0)
    ax.set_xlabel("key token")
    ax.set_ylabel("query token")
    which = f", batch {batch}, head {head}" if b * h > 1 else ""
    ax.set_title(f"{(kind != EMPTY).mean():.1%} of {mask.bq}x{mask.bk} blocks visited{which}")
    shares = [(kind == k).mean() for k in (EMPTY, PARTIAL, FULL)]
    labels = [f"{n} {s:.1%}" for n, s in zip(("empty", "partial", "full"), shares, strict=True)]
    handles = [Patch(facecolor=c, edgecolor="#999999", label=n) for c, n in zip(colours, labels, strict=True)]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)
    return figure


def _tile(mask, visible, row, block) -> np.ndarray:
    """`visible(pq, pk)` on the real tokens of one tile."""
    pq = mask.q_start(row) + np.arange(min(mask.bq, mask.T - row * mask.bq))
    pk = mask.kv_start(block) + np.arange(min(mask.bk, mask.S - block * mask.bk))
    with jax.ensure_compile_time_eval():
        return np.broadcast_to(np.asarray(visible(pq[:, None], pk)), (len(pq), len(pk)))


def require_concrete(mask, what: str):
    if not is_concrete(mask):
        raise UsageError(f"{what} needs a mask whose values are known; call it outside jit.")
