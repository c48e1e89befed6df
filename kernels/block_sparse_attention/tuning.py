"""Which tiles a call gets: those given, else tuned ones from a file, else the backend's own table.

`tune.py` writes the file. Set `BLOCKJAX_TUNING` to its path, or leave it at `DEFAULT_PATH`; an empty
`BLOCKJAX_TUNING` turns it off.
"""

import functools
import json
import logging
import math
import os
import pathlib

import jax
import numpy as np
from blockjax.kernels.block_sparse_attention.spec import Spec, Tiles

from blockjax.errors import UsageError
from blockjax.masks import BlockMask
from blockjax.masks.predicates import is_concrete

DEFAULT_PATH = pathlib.Path.home() / ".cache" / "blockjax" / "block_sparse_attention.json"


def choose_tiles(name: str, backend, spec: Spec, mask: BlockMask, config: Tiles | None) -> Tiles | None:
    """The tiles of a call, logged once with where they come from; None where there is nothing to choose.

    Raises:
        UsageError: `config` is given and does not fit, or there is nothing to choose.
    """
    tiles, source = backend.default_tiles(spec), "the table"
    if tiles is None:
        if config is not None:
            raise UsageError(f"implementation={name!r} has nothing to configure; leave config out.")
        return None
    if config is not None:
        tiles, source = Tiles(*map(tuple, config)), "config"
        reason = backend.tiles_fit(spec, tiles)
        if reason is not None:
            raise UsageError(f"config={tiles} does not fit implementation={name!r}: {reason}")
    elif (path := tuned_path()) is not None:
        tuned = tuned_tiles(path).get(key(name, spec, mask))
        if tuned is not None and backend.tiles_fit(spec, tuned) is None:
            tiles, source = tuned, str(path)
    _log_choice(name, tiles, source)
    return tiles


def tuned_path() -> pathlib.Path | None:
    """Of the file with tuned tiles, or None if there is none."""
    named = os.environ.get("BLOCKJAX_TUNING")
    if named is None:
        return DEFAULT_PATH if DEFAULT_PATH.exists() else None
    if named and not os.path.exists(named):
        raise UsageError(f"BLOCKJAX_TUNING={named} does not exist; unset it, or tune into it.")
    return pathlib.Path(named) if named else None


@functools.cache
def tuned_tiles(path: pathlib.Path) -> dict[str, Tiles]:
    """Tiles by `key`."""
    entries = json.loads(path.read_text())
    return {key: Tiles(*(tuple(entry[kernel]) for kernel in Tiles._fields)) for key, entry in entries.items()}


def key(name: str, spec: Spec, mask: BlockMask) -> str:
    """What tiles depend on: device, backend, sizes, the mask's form and how much of it is listed.

    Lengths and density count in powers of two; the density of a traced mask is not known.
    """
    known = all(is_concrete(x) for x in jax.tree.leaves(mask))
    options = [x for x in ("soft_cap", "segments", "positions", "bias") if getattr(spec, x)]
    parts = dict(
        device=spec.target.device_kind,
        backend=name,
        dtype=np.dtype(spec.dtype).name,
        H=f"{spec.H}/{spec.Hv}",
        G=spec.N // spec.K,
        tokens="2^{}/2^{}".format(*(round(math.log2(n)) for n in (spec.T, spec.S))),
        blocks=f"{spec.bq}x{spec.bk}",
        lists="none" if spec.form == "ranges" else "shared" if spec.lists[1] == 1 else "each head",
        density=f"2^{round(math.log2(max(mask.density(), 2**-20)))}" if known else "traced",
        options="+".join(options) or "none",
    )
    return ", ".join(f"{k} {v}" for k, v in parts.items())


@functools.cache
def _log_choice(name: str, tiles: Tiles, source: str) -> None:
    """Cached, so that each choice is said once."""
    text = ", ".join(f"{kernel} {a}x{b}" for kernel, (a, b) in tiles._asdict().items())
    logging.getLogger(__name__).info("block_sparse_attention: %s with %s, from %s", name, text, source)
