"""What a checkpoint must hold: its files with their sizes, and a digest of every array.

`manifest.json` is written into the folder of a step after everything else, so a step without one was never
finished. Orbax alone restores arrays with a flipped bit, and takes a step without its commit file for a
whole one.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from blockjax.train.folder import replace_text

NAME = "manifest.json"
FORMAT = 1


class Damaged(Exception):
    """Why a step cannot be used: the end of a sentence."""


def leaf_names(tree: Any) -> list[str]:
    """Names of the leaves, `params/embedding`, in the order of `jax.tree.leaves`."""
    paths = (path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0])
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]


@jax.jit
def digests(tree: Any) -> jax.Array:
    """[leaves, 2] uint32 of the bits of every leaf, the same on every mesh.

    Sums, modulo 2^32, over the elements of a hash of their bits and their position (the finalizer of
    MurmurHash3, twice, with other constants). The hash is a bijection of the bits, so any change of a single
    element changes the sum.
    """
    return jnp.stack([_digest(leaf) for leaf in jax.tree.leaves(tree)])


def _digest(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    else:
        width = jnp.dtype(x.dtype).itemsize
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[width]
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(bits.ndim)):
        step = jnp.uint32(stride % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * step
        stride *= bits.shape[axis]
    lanes = [
        jnp.sum(_mix(bits ^ (place * jnp.uint32(weight) + jnp.uint32(offset))), dtype=jnp.uint32)
        for weight, offset in ((0x9E3779B1, 0x7F4A7C15), (0x85EBCA77, 0xC2B2AE3D))
    ]
    return jnp.stack(lanes)


def _mix(h: jax.Array) -> jax.Array:
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def describe(tree: Any, found: np.ndarray) -> dict[str, dict]:
    """Shape, dtype and digest of every leaf, by name.

    Args:
      tree: of arrays or `jax.ShapeDtypeStruct`.
      found: [leaves, 2] uint32, from `digests`.
    """
    return {
        name: {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "digest": "".join(f"{x:08x}" for x in row),
        }
        for name, leaf, row in zip(leaf_names(tree), jax.tree.leaves(tree), found.tolist(), strict=True)
    }


def write(folder: epath.Path, step: int, leaves: dict[str, dict], time: float) -> None:
    """Writes the manifest of a step whose files all lie in `folder`; atomically.

    Args:
      leaves: from `describe`.
      time: seconds since 1970.
    """
    content = {"format": FORMAT, "step": step, "time": time, "files": _files(folder), "leaves": leaves}
    replace_text(folder / NAME, json.dumps(content, indent=1))


def read(folder: epath.Path, step: int) -> dict:
    """The manifest of a step whose files are all there, as long as they were.

    Raises:
      Damaged: there is none, or a file is missing or of another size.
    """
    file = folder / NAME
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise Damaged("it has no manifest, so it was never finished") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"its manifest cannot be read ({error})") from error
    if not _well_formed(content):
        raise Damaged("its manifest is not one that this version writes")
    if content["step"] != step:
        raise Damaged(f"its manifest is of step {content['step']}")
    there = _files(folder)
    for name, size in content["files"].items():
        if name not in there:
            raise Damaged(f"{name} is missing")
        if there[name] != size:
            raise Damaged(f"{name} has {there[name]} bytes instead of {size}")
    return content


def check_tree(content: dict, like: Any, below: str = "") -> None:
    """Checks that the leaves of a manifest whose names begin with `below` are those of `like`.

    Raises:
      Damaged: names every leaf that does not match, with both shapes.
    """
    saved = {name: leaf for name, leaf in content["leaves"].items() if name.startswith(below)}
    words = lambda shape, dtype: f"{dtype}[{','.join(map(str, shape))}]"  # noqa: E731
    old = {name: words(leaf["shape"], leaf["dtype"]) for name, leaf in saved.items()}
    leaves = zip(leaf_names(like), jax.tree.leaves(like), strict=True)
    new = {name: words(leaf.shape, leaf.dtype) for name, leaf in leaves}
    differs = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if differs:
        nothing = "nothing"
        changes = (f"{n} is {old.get(n, nothing)} there, {new.get(n, nothing)} here" for n in differs)
        raise Damaged(f"its arrays are others: {'; '.join(changes)}")


def check_digests(content: dict, tree: Any) -> None:
    """Checks restored arrays bit by bit.

    Raises:
      Damaged: names the leaves that are not what was saved.
    """
    now = describe(tree, np.asarray(digests(tree)))
    wrong = [n for n, leaf in now.items() if content["leaves"][n]["digest"] != leaf["digest"]]
    if wrong:
        raise Damaged(f"{', '.join(wrong)} holds other bits than were saved")


def _files(folder: epath.Path, prefix: str = "") -> dict[str, int]:
    """Sizes of all files below a folder but its manifest, by relative name."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            found |= _files(path, f"{prefix}{path.name}/")
        elif prefix or path.name not in (NAME, f".{NAME}"):
            found[prefix + path.name] = path.stat().length
    return found


def _well_formed(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and content.get("format") == FORMAT
        and type(content.get("step")) is int
        and isinstance(content.get("time"), (int, float))
        and isinstance(content.get("files"), dict)
        and isinstance(content.get("leaves"), dict)
        and all(
            isinstance(leaf, dict)
            and isinstance(leaf.get("shape"), list)
            and isinstance(leaf.get("dtype"), str)
            and isinstance(leaf.get("digest"), str)
            for leaf in content["leaves"].values()
        )
    )
