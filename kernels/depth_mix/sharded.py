"""`depth_read` and `depth_join` on a mesh: every device calls them on its own tokens.

A mix concerns one token, so nothing is communicated but the gradients of what all tokens share: queries and
gains. Left to the compiler, a kernel would have its arrays gathered onto every device.
"""

import math
from collections.abc import Callable, Sequence

import jax
from blockjax.kernels.depth_mix.api import depth_join, depth_read
from blockjax.kernels.depth_mix.spec import Join, Read
from blockjax.kernels.platforms import Axes, axis_names
from jax.sharding import PartitionSpec as P

from blockjax.errors import UsageError


def sharded_depth_read(
    sources: Sequence[jax.Array],
    queries: jax.Array,
    *,
    tokens: Sequence[Axes] = (),
    width: Axes = None,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
    unstacked: bool = False,
    **options,
) -> Read:
    """As `depth_read`, on a mesh; in the same program without one.

    Args:
        sources, queries, unstacked, options: as there.
        tokens: for each axis of a source but M the mesh axes over which it is cut, None for none.
        width: mesh axes over which M is cut. XLA then serves the call, and devices tell each other two sums
            for each source, query, head and token.
        mesh: default the one in use.

    Raises:
        UsageError: also if an axis of tokens does not divide by the devices along its mesh axes.
    """
    sources = tuple(sources)

    def call(sources, queries, **kernel):
        return depth_read(sources, queries, unstacked=unstacked, **kernel, **options)

    split = _Split.of(mesh, sources[0].shape, tokens, width)
    if split is None:
        return call(sources, queries, **_xla(width, options))
    o = (split(),) * len(queries) if unstacked else split(None)
    specs = ((split(),) * len(sources), P())
    return split.map(call, specs, Read(o, split(None), split(None, None)))(sources, queries)


def sharded_depth_join(
    partial: jax.Array,
    update: jax.Array | None,
    o: jax.Array,
    lse: jax.Array,
    query: jax.Array,
    *,
    norm_gain: jax.Array,
    first: bool | jax.Array = False,
    tokens: Sequence[Axes] = (),
    width: Axes = None,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
    **options,
) -> Join:
    """As `depth_join`, on a mesh; `tokens`, `width`, `mesh` and errors as in `sharded_depth_read`."""

    def call(partial, update, o, lse, query, norm_gain, first, **kernel):
        return depth_join(
            partial, update, o, lse, query, norm_gain=norm_gain, first=first, **kernel, **options
        )

    args = partial, update, o, lse, query, norm_gain, first
    split = _Split.of(mesh, partial.shape, tokens, width)
    if split is None:
        return call(*args, **_xla(width, options))
    each = split()
    specs = (each, None if update is None else each, each, each, P(), P())
    if isinstance(first, bool):
        return split.map(lambda *args: call(*args, first), specs, Join(each, each, each))(*args[:-1])
    return split.map(call, (*specs, P()), Join(each, each, each))(*args)


class _Split:
    """Over which axes of a mesh the tokens are cut; called with leading axes, the partition of an array."""

    def __init__(self, mesh, tokens: tuple[tuple[str, ...] | None, ...]):
        self.mesh, self.tokens = mesh, tokens

    @classmethod
    def of(cls, mesh, shape: tuple[int, ...], tokens: Sequence[Axes], width: Axes):
        """None where every device may compute everything, and where M is cut."""
        mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
        if len(tokens) >= len(shape):
            raise UsageError(f"tokens={tuple(tokens)} names more axes than {shape} has before its last.")
        names = [axis_names(axes) for axes in tokens]
        if mesh.empty or width or not any(names):
            return None
        for size, axes in zip(shape, names, strict=False):
            devices = math.prod(mesh.shape[axis] for axis in axes)
            if size % devices:
                raise UsageError(
                    f"{size} of {shape} do not divide over {'*'.join(axes)}={devices}; "
                    "cut them over fewer devices, or over other axes."
                )
        rest = (None,) * (len(shape) - 1 - len(names))
        return cls(mesh, (*(axes or None for axes in names), *rest))

    def __call__(self, *leading: None) -> P:
        return P(*leading, *self.tokens, None)

    def map(self, call: Callable, in_specs, out_specs) -> Callable:
        return jax.shard_map(call, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)


def _xla(width: Axes, options: dict) -> dict:
    """Kernels see whole rows; if one is asked for by name, it says so itself."""
    return dict(implementation="xla") if width and options.get("implementation") is None else {}
