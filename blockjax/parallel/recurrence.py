"""`linear_attention` with the sequence shared out over a mesh axis: affine maps of the state, composed.

Each device summarises its run of tokens as a map of the state: `kernels/linear_attention/xla/summary.py`, or
what its backend has in that place.
What all runs before it do is a scan of the monoid `blockjax.affine` over devices, in log P rounds (Hillis and
Steele 1986) in which each sends one map; then every device calls the op on the state that enters its run.
Gradients of states take the same way back. Nothing grows with the number of devices.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from blockjax.affine import Affine
from blockjax.errors import UsageError
from blockjax.kernels.linear_attention import RESIDUAL, Inputs, summary
from blockjax.kernels.linear_attention import linear_attention as on_one_device
from blockjax.kernels.linear_attention.api import (
    checked,
    checked_ids,
    count_documents,
    select,
    without_padding,
)
from blockjax.kernels.linear_attention.gates import starts
from blockjax.kernels.linear_attention.spec import form
from blockjax.kernels.platforms import Axes, axis_names
from blockjax.parallel.circulate import step
from blockjax.parallel.layouts import PIECES, Layout


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mesh: jax.sharding.Mesh | None = None,
    axis: str | None = "seq",
    layout: str | Layout = "contiguous",
    batch: Axes = None,
    heads: Axes = None,
    log_decay: jax.Array | None = None,
    beta: jax.Array | None = None,
    kind: str = "decay",
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    return_state: bool = False,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
):
    """As `blockjax.linear_attention`, with the tokens cut over a mesh axis.

    Args:
        q, k, v: as there, in the order of the sequence; likewise all arrays of tokens.
        mesh: default the mesh in use; without one, in the same program.
        axis: the mesh axis over which T is cut; None where tokens are whole on every device.
        layout: which tokens each device holds, a key of `PIECES`; or, if arrays of tokens already lie so, a
            `Layout` of that name, in whose order `o` is then, too.
        batch, heads: mesh axes over which B, and the heads of states, are cut.
        others: as there.

    Returns:
        What `linear_attention` returns, with its gradients.

    Raises:
        UsageError: as there; what does not divide over the mesh, or another layout.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    options = dict(kind=kind, scale=scale, chunk_size=chunk_size, implementation=implementation)
    if mesh.empty:
        return on_one_device(
            q, k, v, log_decay=log_decay, beta=beta, initial_state=initial_state,
            return_state=return_state, segment_ids=segment_ids, **options,
        )  # fmt: skip
    if axis is not None and axis not in mesh.axis_names:
        axes = ", ".join(mesh.axis_names) or "none"
        raise UsageError(f"The mesh has no axis {axis!r}; its axes are: {axes}.")
    inputs = checked(q, k, v, log_decay, beta, kind, initial_state, None)
    (B, T, K, _), devices = inputs.v.shape, 1 if axis is None else mesh.shape[axis]
    for what, n, axes in (("batch entries", B, batch), ("heads", K, heads)):
        size = math.prod(mesh.shape[a] for a in axis_names(axes))
        if n % size:
            raise UsageError(
                f"{n} {what} do not divide over {'*'.join(axis_names(axes))}={size}; "
                "cut them over fewer devices, or over other axes."
            )
    ids = None if segment_ids is None else checked_ids(segment_ids, B, T)
    laid = isinstance(layout, Layout)
    if not laid:
        layout = _layout(layout, T, devices)
        apply = lambda x: x if x is None or x.ndim < 3 else layout.apply(x)  # noqa: E731
        inputs = Inputs(*map(apply, inputs[:5]), None, inputs.state)
        if ids is not None:
            ids = layout.apply(ids, fill=-1)
        elif layout.tokens > T:
            ids = layout.apply(jnp.zeros((B, T), jnp.int32), fill=-1)
    pieces = _pieces(layout, devices, inputs.v.shape[1])
    if ids is not None:
        # Documents are counted along the sequence.
        documents = count_documents(layout.restore(ids))
        inputs = without_padding(inputs, ids >= 0)._replace(documents=layout.apply(starts(documents)))
    options |= dict(shared_decay=form(log_decay) == "head")
    static = _Static(axis, devices, pieces, tuple(options.items()))
    o, state = _shard(static, mesh, (axis_names(batch) or None, axis, axis_names(heads) or None), inputs)
    o = o if laid else layout.restore(o)
    return (o, state) if return_state else o


def _layout(name: str, T: int, devices: int) -> Layout:
    """With one block for each run of tokens."""
    if name not in PIECES:
        raise UsageError(f"Recurrence runs over the layouts {', '.join(PIECES)}, not {name!r}.")
    pieces = len(PIECES[name]) if devices > 1 else 1
    return Layout.of(name if devices > 1 else "contiguous", T, devices, -(-T // (devices * pieces)))


def _pieces(layout: Layout, devices: int, tokens: int) -> tuple[int, ...]:
    """The entry of `PIECES` that this is."""
    if layout.devices != devices or layout.tokens != tokens:
        raise UsageError(
            f"The layout is for {layout.tokens} tokens on {layout.devices} devices, but there are {tokens} "
            f"on {devices}; give its name to have arrays laid out."
        )
    return layout.pieces


@dataclass(frozen=True)
class _Static:
    """What the devices know of a call before it is traced: `pieces` are those of each, see `PIECES`."""

    axis: str | None
    devices: int
    pieces: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    def select(self, inputs: Inputs):
        options = dict(self.options)
        names = "kind", "scale", "chunk_size", "implementation", "shared_decay"
        return select(inputs, *(options[x] for x in names))

    @property
    def last(self) -> int:
        """The device that holds the end of the sequence."""
        return self.devices - 1 if self.pieces[-1] > 0 else 0

    def cut(self, x: jax.Array) -> list[jax.Array]:
        return jnp.split(x, len(self.pieces), axis=1)

    def inputs(self, whole: Inputs) -> list[Inputs]:
        """Of each piece, without the states that enter."""
        per_token = [x is not None and x.ndim > 1 for x in whole[:6]]
        parts = [
            self.cut(x) if cut else [x] * len(self.pieces) for x, cut in zip(whole, per_token, strict=False)
        ]
        pieces = [Inputs(*arrays) for arrays in zip(*parts, strict=True)]
        if whole.documents is None:
            return pieces
        return [x._replace(documents=jnp.cumsum(x.documents, axis=1, dtype=jnp.int32)) for x in pieces]

    def entries(self, maps: list[Affine], directions, state: jax.Array) -> list[jax.Array]:
        """The states before each of this device's runs, for the one before all runs of all devices."""
        found = []
        for i, (one, direction) in enumerate(zip(maps, directions, strict=True)):
            found.append(self.before(one, direction)(state))
            if i + 1 < len(maps):
                state = self.tell(one(found[-1]), self.devices - 1 if direction > 0 else 0)
        return found

    def before(self, one: Affine, direction: int) -> Affine:
        """What the runs of all devices before this one do, or after it if `direction` is -1."""
        if self.devices == 1:
            return one.identity()
        place = lax.axis_index(self.axis)
        rank = place if direction > 0 else self.devices - 1 - place

        def shift(x, by):
            return step(x, self.axis, self.devices, by * direction)

        def choose(some, a, b):
            return jax.tree.map(lambda x, y: jnp.where(some, x, y), a, b)

        total = choose(rank >= 1, shift(one, 1), one.identity())
        by = 1
        while by < self.devices - 1:
            total = choose(rank > by, total.after(shift(total, by)), total)
            by *= 2
        return total

    def tell(self, x: jax.Array, place: int) -> jax.Array:
        """What the device at this place has."""
        if self.devices == 1:
            return x
        return lax.psum(jnp.where(lax.axis_index(self.axis) == place, x, 0), self.axis)


def _summary(backend):
    """The backend's own way to summarise a run, or that of XLA."""
    return getattr(backend, "summary", summary)


def _summaries(found) -> tuple[list, list[dict]]:
    """Those of all runs, and what the passes of these take in addition."""
    summaries, added = zip(*found, strict=True)
    return list(summaries), [{} if x is None else {"added": x} for x in added]


def _shard(static: _Static, mesh, rows, inputs: Inputs):
    batch, axis, heads = rows
    per_head = None if inputs.log_decay is None or inputs.log_decay.ndim > 1 else P(heads)
    specs = Inputs(
        *[P(batch, axis, heads)] * 3,
        log_decay=per_head or P(batch, axis, heads),
        beta=P(batch, axis, heads),
        documents=P(batch, axis),
        state=P(batch, heads),
    )
    specs = Inputs(*(None if x is None else spec for x, spec in zip(inputs, specs, strict=True)))
    local = jax.shard_map(
        lambda inputs: _run(static, inputs), mesh=mesh, in_specs=(specs,),
        out_specs=(P(batch, axis, heads), P(axis, batch, heads)), check_vma=False,
    )  # fmt: skip
    # Each device has a last state of its own: to take one of them leaves its gradient to that device.
    o, states = local(inputs)
    return o, states[static.last]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(static: _Static, inputs: Inputs):
    return _forward(static, inputs)[0]


def _forward(static: _Static, whole: Inputs):
    pieces = static.inputs(whole)
    backend, options = static.select(pieces[0])
    if static.devices * len(pieces) == 1:
        maps, states, known = [None], [whole.state], [{}]
    else:
        maps, known = _summaries(_summary(backend).forward(x, options) for x in pieces)
        first = jnp.zeros_like(maps[0].N) if whole.state is None else whole.state
        states = static.entries(maps, static.pieces, first)
    pieces = [x._replace(state=state) for x, state in zip(pieces, states, strict=True)]
    runs = [backend.forward_pass(x, options, **more) for x, more in zip(pieces, known, strict=True)]
    o = jnp.concatenate([o for (o, _), _ in runs], axis=1)
    (_, last), _ = runs[-1]
    kept = (
        whole,
        [None if one is None else one.M for one in maps],
        states,
        [residuals for _, residuals in runs],
    )
    return (o, last[None]), jax.tree.map(lambda x: checkpoint_name(x, RESIDUAL), kept)


def _backward(static: _Static, kept, cotangents):
    whole, Ms, states, residuals = kept
    do, dlast = cotangents
    pieces = [x._replace(state=state) for x, state in zip(static.inputs(whole), states, strict=True)]
    backend, options = static.select(pieces[0])
    dlast, do = static.tell(dlast[0], static.last), static.cut(do)
    if Ms[0] is None:
        dstates, known = [dlast], [{}]
    else:
        summaries = (_summary(backend).backward(x, d, options) for x, d in zip(pieces, do, strict=True))
        own, known = _summaries(summaries)
        backs = [Affine(M, S).back(N) for M, S, N in zip(Ms, states, own, strict=True)]
        directions = [-direction for direction in static.pieces[::-1]]
        dstates = static.entries(backs[::-1], directions, dlast)[::-1]
    parts = [
        backend.backward_pass(*arrays, options, **more)
        for *arrays, more in zip(pieces, residuals, do, dstates, known, strict=True)
    ]
    shared = form(whole.log_decay) == "head"

    def join(name, x):
        if x[0] is None:
            return None
        return sum(x) if name == "log_decay" and shared else jnp.concatenate(x, axis=1)

    joined = {name: join(name, [getattr(part, name) for part in parts]) for name in Inputs._fields[:5]}
    dfirst = None
    if whole.state is not None:
        begins = static.axis is None or lax.axis_index(static.axis) == 0
        dfirst = jnp.where(begins, parts[0].state, 0)
    return (Inputs(**joined, state=dfirst),)


_run.defvjp(_forward, _backward)
