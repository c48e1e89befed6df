"""`attention`: `block_sparse_attention` with the sequence shared out over a mesh axis."""

import contextlib
import functools
import logging
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from blockjax.errors import UsageError, nearest
from blockjax.kernels.block_sparse_attention import RESIDUAL, DistanceBias, Tiles
from blockjax.kernels.block_sparse_attention.api import checked, merge_sinks
from blockjax.kernels.block_sparse_attention.passes import delta
from blockjax.kernels.block_sparse_attention.sharded import sharded_block_sparse_attention
from blockjax.kernels.block_sparse_attention.spec import Cotangents
from blockjax.kernels.platforms import Axes, axis_names, target
from blockjax.masks import BlockMask, Lists, lengthen
from blockjax.masks.predicates import is_concrete
from blockjax.parallel.circulate import Ring
from blockjax.parallel.layouts import Layout, work
from blockjax.parallel.schedules import SCHEDULES
from blockjax.parallel.shards import Job, Keys, Queries
from blockjax.parallel.traffic import choose, exchanged


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: BlockMask,
    *,
    mesh: jax.sharding.Mesh | None = None,
    axis: str | None = "seq",
    schedule: str = "auto",
    layout: str | Layout = "contiguous",
    ulysses: int = 0,
    batch: Axes = None,
    heads: Axes = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    bias: DistanceBias | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    config: Tiles | None = None,
):
    """As `block_sparse_attention`, with the tokens cut over a mesh axis.

    Args:
        q, k, v, mask: as there, in the order of the sequence; likewise all arrays of tokens.
        mesh: default the mesh in use.
        axis: the mesh axis over which T and S are cut; None where tokens are whole on every device.
        schedule: what moves where, a key of `SCHEDULES`; or `auto`: of those that keep the sequence cut, the
            one that sends least in each pass, which is logged with the counts.
        layout: which blocks each device holds, a key of `LAYOUTS`; or, if arrays of tokens already lie so, a
            `Layout`, in whose order outputs are then, too. The mask speaks of the sequence in any case.
        ulysses: this many consecutive devices first exchange tokens for heads (arXiv:2309.14509), and the
            schedule runs over groups of them; the size of the axis for nothing but that. 0: with `auto`, what
            sends least of the numbers that the heads allow, else 1.
        batch, heads: mesh axes over which B, and query and key heads, are cut.
        others: as there.

    Returns:
        What `block_sparse_attention` returns, with its gradients.

    Raises:
        UsageError: what does not divide, or a schedule that cannot serve the call, with the reason.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if axis is not None and axis not in mesh.axis_names:
        axes = ", ".join(mesh.axis_names) or "none"
        raise UsageError(f"The mesh has no axis {axis!r}; its axes are: {axes}.")
    devices = 1 if axis is None else mesh.shape[axis]
    options = dict(scale=scale, soft_cap=soft_cap, implementation=implementation, config=config)
    if devices == 1:
        return sharded_block_sparse_attention(
            q, k, v, mask, mesh=mesh, batch=batch, heads=heads, q_segment_ids=q_segment_ids,
            kv_segment_ids=kv_segment_ids, q_positions=q_positions, kv_positions=kv_positions,
            bias=bias, sinks=sinks, return_lse=return_lse, **options,
        )  # fmt: skip
    if schedule not in ("auto", *SCHEDULES):
        raise UsageError(f"Unknown schedule {schedule!r}.{nearest(schedule, ('auto', *SCHEDULES))}")
    inputs, sinks = checked(
        q, k, v, mask, q_segment_ids, kv_segment_ids, q_positions, kv_positions, bias, sinks
    )
    cut = _Cut.of(mesh, axis, ulysses or 1, batch, heads, inputs)
    choices = cut.choices(inputs) if schedule == "auto" and not ulysses else [cut]
    arranged = isinstance(layout, Layout)
    if arranged:
        layout.check(mask, devices)
        q_layout = kv_layout = layout
    else:
        block = math.lcm(mask.bq, mask.bk)
        q_layout = Layout.of(layout, mask.T, devices, block, [mask])
        kv_layout = q_layout if mask.S == mask.T else Layout.of(layout, mask.S, devices, block)
        inputs = _lay(inputs, q_layout, kv_layout)
    uses = work(mask, q_layout, kv_layout)
    uses = np.ones((devices, devices)) if uses is None else uses
    o, lse = _shard(choices, schedule, q_layout, kv_layout, uses > 0, inputs, options)
    if not arranged:
        o, lse = q_layout.restore(o), q_layout.restore(lse, axis=2)
    if sinks is not None:
        o, lse = merge_sinks(o, lse, sinks)
    return (o, lse) if return_lse else o


class _Cut(NamedTuple):
    """How arrays lie on the mesh."""

    mesh: Any
    axis: str
    ulysses: int
    batch: Axes
    heads: Axes

    @staticmethod
    def of(mesh, axis, ulysses, batch, heads, inputs) -> "_Cut":
        B, _, N, _ = inputs.q.shape
        K, devices = inputs.k.shape[2], mesh.shape[axis]
        if devices % ulysses:
            raise UsageError(f"ulysses={ulysses} does not divide the {devices} devices of {axis!r}.")
        per_device = [n // math.prod(mesh.shape[a] for a in axis_names(heads)) for n in (N, K)]
        if per_device[0] % ulysses or (per_device[1] % ulysses and ulysses % per_device[1]):
            raise UsageError(
                f"ulysses={ulysses} needs query heads that divide by it, and key heads that divide by it or "
                f"it by them; there are {per_device[0]} and {per_device[1]}."
            )
        for what, n, axes in (("batch entries", B, batch), ("key heads", K, heads)):
            size = math.prod(mesh.shape[a] for a in axis_names(axes))
            if n % size:
                raise UsageError(f"{n} {what} do not divide over {'*'.join(axis_names(axes))}={size}.")
        return _Cut(mesh, axis, ulysses, axis_names(batch) or None, axis_names(heads) or None)

    def choices(self, inputs) -> "list[_Cut]":
        """With each number of `ulysses` that the heads allow."""
        found = []
        for n in range(1, self.mesh.shape[self.axis] + 1):
            with contextlib.suppress(UsageError):
                found.append(_Cut.of(self.mesh, self.axis, n, self.batch, self.heads, inputs))
        return found


def _lay(inputs, q_layout: Layout, kv_layout: Layout):
    """The arrays of tokens in the order of the devices, padded."""
    layouts = dict(q=q_layout, kv=kv_layout, k=kv_layout, v=kv_layout)
    laid = {}
    for name, x in inputs._asdict().items():
        layout = layouts.get(name.partition("_")[0])
        if layout is not None and x is not None:
            laid[name] = layout.apply(x, fill=-1 if name.endswith("segment_ids") else 0)
    return inputs._replace(**laid)


def _shard(cuts: list[_Cut], schedule, q_layout: Layout, kv_layout: Layout, uses, inputs, options):
    """Calls `_local` on each device's part of arrays in the order of the devices, in one of these cuts."""
    cut = cuts[0]
    q_layout, kv_layout = (replace(x, length=x.tokens) for x in (q_layout, kv_layout))
    mask = lengthen(inputs.mask, q_layout.tokens, kv_layout.tokens)
    queries = Queries(inputs.q, inputs.q_segment_ids, inputs.q_positions, _lay_lists(mask, q_layout))
    keys = Keys(inputs.k, inputs.v, inputs.kv_segment_ids, inputs.kv_positions)
    if isinstance(mask, Lists):
        mask = replace(mask, index=None, tag=None, counts=None)
    leaves, tree = jax.tree.flatten(mask)
    known = tuple(x if is_concrete(x) else None for x in leaves)
    traced = tuple(jnp.asarray(x) for x in leaves if not is_concrete(x))

    def static_of(cut: _Cut) -> _Static:
        places = len(uses) // cut.ulysses
        pairs = uses.reshape(places, cut.ulysses, places, cut.ulysses).any((1, 3))
        return _Static(
            (schedule, schedule), cut.ulysses, Ring(cut.axis, places, cut.ulysses, pairs), tree, known,
            q_layout, kv_layout, options,
        )  # fmt: skip

    rows = P(cut.batch, cut.axis, cut.heads)

    def per_token(x):
        return None if x is None else P(cut.batch if x.shape[0] > 1 else None, cut.axis)

    lists = None
    if queries.lists is not None:
        b, h = queries.lists[2].shape[:2]
        lists = (P(cut.batch if b > 1 else None, cut.heads if h > 1 else None, cut.axis),) * 3
    in_specs = (
        Queries(rows, per_token(queries.ids), per_token(queries.positions), lists),
        Keys(rows, rows, per_token(keys.ids), per_token(keys.positions)),
        None if inputs.slope is None else P(cut.heads),
        P(),
    )
    if schedule == "auto":
        arrays = queries, keys, inputs.slope, ()
        static = _choose([(static_of(cut), _shapes(cut, arrays, in_specs)) for cut in cuts], traced)
    else:
        static = static_of(cut)
    local = jax.shard_map(
        functools.partial(_local, static), mesh=cut.mesh, in_specs=in_specs,
        out_specs=(rows, P(cut.batch, cut.heads, cut.axis)), check_vma=False,
    )  # fmt: skip
    return local(queries, keys, inputs.slope, traced)


def _lay_lists(mask: BlockMask, layout: Layout):
    """Rows of the lists in the order of the devices."""
    if not isinstance(mask, Lists):
        return None
    lists = map(jnp.asarray, (mask.index, mask.tag, mask.counts))
    return tuple(layout.of_blocks(mask.bq).apply(x, axis=2) for x in lists)


@dataclass(frozen=True, eq=False)
class _Static:
    """What the devices know of a call before it is traced."""

    schedules: tuple[str, str]  # forward and backward
    ulysses: int
    ring: Ring
    tree: Any
    known: tuple
    q_layout: Layout  # of padded arrays, both
    kv_layout: Layout
    options: dict

    @property
    def whole(self) -> bool:
        """Whether a device has all tokens of some heads, which it then puts in the order of the sequence.

        In another order a mask of ranges becomes lists of larger blocks, and rows share fewer keys.
        """
        return self.ring.size == 1

    def restore(self, queries: Queries, keys: Keys) -> tuple[Queries, Keys]:
        *tokens, lists = queries
        if lists is not None:
            rows = self.q_layout.of_blocks(self.q_layout.tokens // lists[2].shape[2])
            lists = tuple(rows.restore(x, axis=2) for x in lists)
        tokens, keys = jax.tree.map(self.q_layout.restore, tokens), jax.tree.map(self.kv_layout.restore, keys)
        return Queries(*tokens, lists), keys

    def job(self, slope, traced) -> Job:
        traced = iter(traced)
        mask = jax.tree.unflatten(self.tree, [next(traced) if x is None else x for x in self.known])
        blocks = [self.q_layout.blocks(mask.bq), self.kv_layout.blocks(mask.bk)]
        blocks = [x.reshape(self.ring.size, -1) for x in blocks]
        blocks = [np.sort(x) for x in blocks] if self.whole else blocks
        job = Job(self.ring, mask, *blocks, slope, self.options)
        for name in set(self.schedules) - {"auto"}:
            if (reason := SCHEDULES[name].refuses(job)) is not None:
                raise UsageError(f"schedule={name!r} cannot serve this call: {reason}.")
        return job


def _choose(candidates: list[tuple[_Static, Any]], traced) -> _Static:
    """The one that sends least in both passes, with a schedule for each pass; the first of equals."""
    linked, found = target().platform == "gpu", []
    for static, (queries, keys, slope, _) in candidates:
        devices = static.ring.size * static.ulysses
        ways = choose(static.job(slope, traced), queries, keys, linked)
        extra = exchanged(queries, keys, static.ulysses, devices, linked)
        counts = {way: {name: size + extra for name, size in sizes.items()} for way, sizes in ways.items()}
        names = tuple(next(iter(sizes)) for sizes in counts.values())
        sent = sum(next(iter(sizes.values())) for sizes in counts.values())
        found.append((sent, replace(static, schedules=names), counts))
    least = min(found, key=lambda choice: choice[0])
    static, said = least[1], []
    for _, other, counts in found:
        several = other.ulysses == 1 or len(found) == 1
        for way, sizes in counts.items():
            sizes = sizes if several else {f"with ulysses={other.ulysses}": next(iter(sizes.values()))}
            said.append(f"{way} " + ", ".join(f"{name} {size / 2**20:.3g}" for name, size in sizes.items()))
    _log_choice(static.ring.size * static.ulysses, static.ulysses, static.schedules, "; ".join(said))
    return static


@functools.cache
def _log_choice(devices: int, ulysses: int, names: tuple[str, str], counts: str) -> None:
    """Cached, so that each choice is said once."""
    chosen = "{} forward, {} backward".format(*names)
    if ulysses > 1:
        chosen = f"ulysses={ulysses}" + f", {chosen}" * (ulysses < devices)
    logging.getLogger(__name__).info(
        "attention over %d devices: %s; MiB a device sends: %s", devices, chosen, counts
    )


def _shapes(cut: _Cut, arrays, specs):
    """Of one device's parts, once heads are exchanged for tokens."""

    def shape(x, spec):
        parts = [math.prod(cut.mesh.shape[a] for a in axis_names(entry)) for entry in spec]
        sizes = [n // (parts[i] if i < len(parts) else 1) for i, n in enumerate(x.shape)]
        if x.ndim == 4 and jnp.issubdtype(x.dtype, jnp.floating):
            sizes[1], sizes[2] = sizes[1] * cut.ulysses, max(1, sizes[2] // cut.ulysses)
        elif x.ndim == 2:
            sizes[1] *= cut.ulysses
        return jax.ShapeDtypeStruct(tuple(sizes), x.dtype)

    return jax.tree.map(shape, arrays, (*specs[:-1], ()))


def _local(static: _Static, queries: Queries, keys: Keys, slope, traced):
    """One device's part: heads for tokens among `ulysses` devices, then the schedule among groups of them."""
    if static.ulysses == 1:
        return _attend(static, queries, keys, slope, traced)
    exchange = _Exchange(static.ring.axis, static.ulysses, lax.axis_size(static.ring.axis))
    queries, keys, slope = exchange.there(queries, keys, slope)
    if static.whole:
        o, lse = _attend(static, *static.restore(queries, keys), slope, traced)
        o, lse = static.q_layout.apply(o), static.q_layout.apply(lse, axis=2)
    else:
        o, lse = _attend(static, queries, keys, slope, traced)
    return exchange.swap(o, 1, 2), exchange.swap(lse, 2, 1)


class _Exchange(NamedTuple):
    """Tokens for heads among `size` consecutive devices of an axis."""

    axis: str
    size: int
    devices: int

    @property
    def groups(self):
        return np.arange(self.devices).reshape(-1, self.size).tolist()

    def swap(self, x, split: int, concat: int):
        return lax.all_to_all(
            x, self.axis, split_axis=split, concat_axis=concat, tiled=True, axis_index_groups=self.groups
        )

    def gather(self, x, axis: int):
        return lax.all_gather(x, self.axis, axis=axis, tiled=True, axis_index_groups=self.groups)

    def there(self, queries: Queries, keys: Keys, slope):
        q, ids, positions, lists = queries
        K = keys.k.shape[2]

        def gathered(x):
            return None if x is None else self.gather(x, 1)

        def heads(x):
            return self.swap(jnp.repeat(x, max(1, self.size // K), axis=2), 2, 1)

        if lists is not None:
            h = lists[2].shape[1]
            if h == K < self.size:
                lists = tuple(jnp.repeat(x, self.size // K, axis=1) for x in lists)
            lists = tuple(self.gather(x, 2) if h == 1 else self.swap(x, 1, 2) for x in lists)
        if slope is not None:
            n = slope.size // self.size
            slope = lax.dynamic_slice_in_dim(slope, lax.axis_index(self.axis) % self.size * n, n)
        k, v = heads(keys.k), heads(keys.v)
        queries = Queries(self.swap(q, 2, 1), gathered(ids), gathered(positions), lists)
        return queries, Keys(k, v, gathered(keys.ids), gathered(keys.positions)), slope


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, queries: Queries, keys: Keys, slope, traced):
    return _forward(static, queries, keys, slope, traced)[0]


def _forward(static, queries, keys, slope, traced):
    job = static.job(slope, traced)
    o, lse = SCHEDULES[static.schedules[0]].forward(job, queries, keys)
    o, lse = o.astype(queries.q.dtype), lse.swapaxes(1, 2)
    q, k, v, o, lse = (checkpoint_name(x, RESIDUAL) for x in (queries.q, keys.k, keys.v, o, lse))
    kept = queries._replace(q=q), keys._replace(k=k, v=v), slope, traced, o, lse
    return (o, lse), kept


def _backward(static, kept, cotangents):
    queries, keys, slope, traced, o, lse = kept
    do, dlse = cotangents
    statistics = Cotangents(do, lse, delta(do, o, dlse))
    schedule = SCHEDULES[static.schedules[1]]
    (dq, dslope), (dk, dv) = schedule.backward(static.job(slope, traced), queries, keys, statistics)
    dq, dk, dv = (d.astype(x.dtype) for d, x in ((dq, queries.q), (dk, keys.k), (dv, keys.v)))
    nothing = functools.partial(jax.tree.map, lambda _: None)
    dqueries = Queries(dq, *nothing(queries[1:]))
    dslope = None if slope is None else dslope.astype(slope.dtype)
    return dqueries, Keys(dk, dv, *nothing(keys[2:])), dslope, nothing(traced)


_attend.defvjp(_forward, _backward)
