"""Where a program will run: its platform, and the mesh axes its values vary over."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax import lax

Axes = str | Sequence[str] | None
"""Mesh axes over which a dimension is cut, None for none."""


def axis_names(axes: Axes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


class Target(NamedTuple):
    """What a program is compiled for: `"cpu"`, `"gpu"` or `"tpu"`, and the device's own name."""

    platform: str
    device_kind: str


def target() -> Target:
    """Of the mesh in use, else of the first device.

    The mesh comes first so that compiling for a TPU pod on a CPU host chooses the TPU kernels.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None or device.platform is None:
        device = jax.devices()[0]
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return Target(platform, device.device_kind)


def varying_axes(tree) -> frozenset[str]:
    """Mesh axes over which any of the arrays differs, inside `shard_map`; empty elsewhere."""
    return frozenset().union(*(_varying(jax.typeof(x)) for x in jax.tree.leaves(tree)))


def vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """`x` typed as varying over these axes: a loop's carry must have one type before and after."""
    missing = axes - varying_axes(x)
    return lax.pcast(x, tuple(missing), to="varying") if missing else x


def _varying(aval) -> frozenset[str]:
    # `vma` became `mat.varying` in jax 0.12.
    return aval.mat.varying if hasattr(aval, "mat") else aval.vma
