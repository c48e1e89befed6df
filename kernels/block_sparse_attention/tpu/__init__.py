"""Pallas Mosaic TPU: the kernels of `kernels.py` called on arrays laid out for them.

Heads that share their lists are packed into one tile of rows where blocks of queries are small; heads move
before tokens and ragged lengths are padded in the same copy.
"""

import jax
import jax.numpy as jnp
import numpy as np
from blockjax.kernels.block_sparse_attention import plan
from blockjax.kernels.block_sparse_attention.spec import Cotangents, Gradients, Inputs, Options, Spec, Tiles
from blockjax.kernels.block_sparse_attention.tpu import layout
from blockjax.kernels.block_sparse_attention.tpu.layout import (
    MIB,
    SCALAR_MEMORY,
    VECTOR_MEMORY,
    Side,
    Stream,
    list_window,
    scalar_memory,
)
from blockjax.kernels.platforms import vary, varying_axes

from blockjax.errors import UsageError
from blockjax.masks.predicates import is_concrete

INTERPRET = None
"""True, or `pltpu.InterpretParams`, to run the kernels on CPU: for tests."""

KERNELS = Tiles._fields
ROWS = (256, 512, 1024, 2048)
CHOICES = {kernel: [(a, s) for a in ROWS for s in ROWS] for kernel in KERNELS}
"""What `tune.py` tries."""

ALONG_LANES = "stats", "stream_ids"
"""Streamed arrays of numbers per token."""

PER_ROW = None, jnp.float32
"""An output of one number per row, along lanes, instead of (width, dtype)."""


def supports(spec: Spec) -> str | None:
    if spec.target.platform != "tpu" and INTERPRET is None:
        return f"it runs on TPUs, not on {spec.target.device_kind}"
    if layout.chip() is None:
        return f"it has tiles for {', '.join(layout.TILES)} and no other TPU"
    if spec.dtype not in (jnp.bfloat16, jnp.float32):
        return f"TPUs multiply bfloat16 and float32, not {spec.dtype}"
    if default_tiles(spec) is None:
        least = max(layout.vector_memory(kernel, 128, 128, spec.H, spec.Hv, spec.dtype) for kernel in KERNELS)
        return (
            f"head sizes {spec.H} and {spec.Hv} need {least / MIB:.1f} MiB of vector memory, of "
            f"{VECTOR_MEMORY / MIB:.0f}, even in tiles of 128x128"
        )
    nq, nk = -(-spec.T // spec.bq), -(-spec.S // spec.bk)
    entries = 2 * list_window(max(nq, nk)) if spec.form == "lists" else 0
    needed = scalar_memory(max(nq, nk), entries)
    if needed > SCALAR_MEMORY:
        return (
            f"walks of {nq} by {nk} blocks need {needed / MIB:.2f} MiB of scalar memory, of "
            f"{SCALAR_MEMORY / MIB:.2f}; larger blocks need less"
        )
    return None


def default_tiles(spec: Spec) -> Tiles | None:
    """Those of the table, halved for float32: its products take six passes, large tiles compile slowly."""
    tiles = layout.TILES[layout.chip()]
    if jnp.dtype(spec.dtype).itemsize > 2:
        tiles = Tiles(*((anchor // 2, stream // 2) for anchor, stream in tiles))
    return layout.fitting(tiles, spec.H, spec.Hv, spec.dtype)


def tiles_fit(spec: Spec, tiles: Tiles) -> str | None:
    """A reason why they do not, with the bytes of vector memory that are needed, or None."""
    for kernel, rows in tiles._asdict().items():
        needed = layout.vector_memory(kernel, *rows, spec.H, spec.Hv, spec.dtype)
        if any(n % layout.LANES for n in rows) or needed > VECTOR_MEMORY:
            return (
                f"{kernel} in tiles of {rows[0]}x{rows[1]} needs {needed / MIB:.1f} MiB of vector memory, of "
                f"{VECTOR_MEMORY / MIB:.0f}; rows come in multiples of {layout.LANES}"
            )
    return None


def forward_pass(inputs: Inputs, options: Options):
    """`o` [B, T, N, Hv] in q's dtype and `lse` [B, N, T] float32."""
    launch = Launch("forward", options, inputs, plan.rows(inputs))
    out = launch(
        anchors=dict(q=launch.queries(inputs.q)),
        streams=dict(k=launch.keys(inputs.k), v=launch.keys(inputs.v)),
        outputs=dict(o=(inputs.v.shape[-1], inputs.q.dtype), lse=PER_ROW),
    )
    return launch.q.unlay(out["o"]), launch.per_token(out["lse"])


def backward_pass(inputs: Inputs, cotangents: Cotangents, options: Options) -> Gradients:
    do, lse, delta = cotangents
    # A row that saw nothing, and a padded one, get lse = +inf here: every p is then exactly 0.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse / np.log(2))
    stats = (lse.swapaxes(1, 2), jnp.inf), (delta.swapaxes(1, 2), 0)
    H, Hv = inputs.q.shape[-1], inputs.v.shape[-1]

    launch = Launch("dq", options, inputs, plan.rows(inputs))
    out = launch(
        anchors=dict(q=launch.queries(inputs.q), do=launch.queries(do), stats=launch.q.lanes(*stats)),
        streams=dict(k=launch.keys(inputs.k), v=launch.keys(inputs.v)),
        outputs=dict(dq=(H, inputs.q.dtype), **({} if inputs.slope is None else dict(dslope=PER_ROW))),
    )
    dq = launch.q.unlay(out["dq"])
    dslope = None if inputs.slope is None else launch.per_token(out["dslope"]).sum((0, 2))

    launch = Launch("dkv", options, inputs, plan.columns(inputs))
    out = launch(
        anchors=dict(k=launch.keys(inputs.k), v=launch.keys(inputs.v)),
        streams=dict(q=launch.queries(inputs.q), do=launch.queries(do), stats=launch.q.lanes(*stats)),
        outputs=dict(dk=(H, inputs.k.dtype), dv=(Hv, inputs.v.dtype)),
    )
    return Gradients(dq, launch.k.unlay(out["dk"]), launch.k.unlay(out["dv"]), dslope)


class Launch:
    """One kernel on one call's arrays, and its walk: or one for each place of an outer axis of the grid."""

    lead: tuple[int, ...] = ()
    """Sizes of the grid's axes before those of batch entries, heads, tiles and turns."""

    def __init__(self, name: str, options: Options, inputs: Inputs, *walks: plan.Walk):
        from blockjax.kernels.block_sparse_attention.tpu import kernels

        axes = varying_axes(inputs)
        self.walks = jax.tree.map(lambda x: vary(jnp.asarray(x), axes), walks)
        self.name, self.inputs, walk = name, inputs, self.walks[0]
        self.kernel = dict(forward=kernels.Forward, dq=kernels.QueryGradient, dkv=kernels.KeyGradient)[name]
        mask, ranges, keys_stay = inputs.mask, isinstance(walk, plan.RangeWalk), name == "dkv"
        B, T, N, H = inputs.q.shape
        _, S, K, Hv = inputs.v.shape
        share = sum(_share(x, mask.nq if keys_stay else mask.nk) for x in walks)
        self.pairs = B * N * T * S * share
        self.products = dict(forward=H + Hv, dq=2 * H + Hv, dkv=2 * H + 2 * Hv)[name] * self.pairs
        rows = getattr(options.tiles, name)
        own_lists = mask.lists_shape[1] == N
        self.q = Side.of(T, mask.bq, N, 1 if own_lists else N // K, rows[keys_stay])
        self.k = Side.of(S, mask.bk, K, 1, rows[not keys_stay])
        self.anchor, stream = (self.k, self.q) if keys_stay else (self.q, self.k)
        self.stream = Stream.of(stream, rows[1], consecutive=ranges)
        self.numbers, where = scalars(mask, inputs.slope)
        near = ranges or layout.lists_fit(self.anchor.blocks, len(walks) * walk.entries.size)
        longest = 0 if ranges else min(walk.entries.shape[-1], stream.blocks)
        self.call = kernels.Call(
            anchor=self.anchor,
            stream=self.stream,
            anchor_is_keys=keys_stay,
            inner=self.q.heads // K if keys_stay else 1,
            rows=self.anchor.blocks,
            ranges=ranges,
            window=0 if near else list_window(longest),
            lists=(walk.bounds.shape[0], 1) if ranges else walk.start.shape[:2],
            list_length=0 if ranges else walk.entries.shape[-1],
            predicates=jax.tree.structure(mask.predicates),
            scalars=where,
            scale=options.scale,
            soft_cap=options.soft_cap,
            bias=inputs.slope is not None,
            positions=inputs.q_positions is not None,
            segments=inputs.q_segment_ids is not None,
            sum_in_product=layout.chip() in layout.WIDE and Hv % 256 == 128,
        )

    def queries(self, x):
        return self.q.lay(x)

    def keys(self, x):
        return self.k.lay(x)

    def per_token(self, x):
        """From one number per row, `[B, heads, units, 1, lanes]`, to `[B, N, T]`."""
        x = x[..., 0, : self.q.part]
        x = x.reshape(*x.shape[:2], self.q.blocks * self.q.rows, 1)
        return self.q.unlay(x)[..., 0].swapaxes(1, 2)

    def ids(self, inputs: Inputs):
        """Positions and segment ids of the anchor and of the stream, along lanes; None if there are none."""
        x, fills = inputs, (0, -1)
        sides = (self.q, x.q_positions, x.q_segment_ids), (self.k, x.kv_positions, x.kv_segment_ids)
        if x.q_positions is None and x.q_segment_ids is None:
            return None, None

        def laid(side, *ids):
            ids = [(i, fill) for i, fill in zip(ids, fills, strict=True) if i is not None]
            B = max(len(i) for i, _ in ids)
            return side.lanes(*((jnp.broadcast_to(i, (B, side.length))[..., None], fill) for i, fill in ids))

        q, k = (laid(*side) for side in sides)
        return (k, q) if self.call.anchor_is_keys else (q, k)

    def table(self):
        """[walks * lists, 1, fields * rows] int32."""
        return jnp.concatenate([self.fields(walk) for walk in self.walks])

    def fields(self, walk: plan.Walk):
        n = self.call.rows
        padded = self.k.block != self.k.padded
        if self.call.ranges:
            lo, full_lo, full_hi, hi = jnp.moveaxis(walk.bounds, 1, 0)
            fields = (lo, hi, hi, hi) if padded else (lo, full_lo, full_hi, hi)
        else:
            _, start, partial, total = walk
            fields = start, total if padded else partial, total
        return jnp.stack(fields, -2).reshape(-1, 1, len(fields) * n)

    def __call__(self, anchors: dict, streams: dict, outputs: dict) -> dict:
        here, there = self.ids(self.inputs)
        if here is not None:
            anchors, streams = dict(anchors, anchor_ids=here), dict(streams, stream_ids=there)
        streams = {name: self.stream.extend(x) for name, x in streams.items()}
        shapes = {name: self.output(*x) for name, x in outputs.items()}
        out_specs = {name: self.block(x) for name, x in shapes.items()}
        semantics = "parallel", "parallel", "arbitrary", "arbitrary"
        return self.run(*self.operands(anchors, streams), shapes, out_specs, dimension_semantics=semantics)

    def output(self, width: int | None, dtype) -> jax.ShapeDtypeStruct:
        """Of so many numbers per row of the anchor, or of one along lanes; see `PER_ROW`."""
        anchor = self.anchor
        rows = (anchor.blocks * anchor.rows, width)
        if width is None:
            rows = (anchor.units, 1, max(anchor.part, 128))
        return self.shape((self.inputs.q.shape[0], anchor.heads, *rows), dtype)

    def shape(self, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
        manual = jax.typeof(self.inputs.q).manual_axis_type
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=manual)

    def block(self, x):
        """The anchor's rows, `[B | 1, heads | 1, rows, D]`, or its unit, `[.., units, n, lanes]`."""
        from jax.experimental import pallas as pl

        tile = (self.anchor.part,) if x.ndim == 4 else (None, x.shape[3])
        batches, heads = x.shape[:2]

        def index(*place):
            b, h, tile, _ = place[len(self.lead) :]
            return b if batches > 1 else 0, h if heads > 1 else 0, tile, *[0] * (x.ndim - 3)

        return pl.BlockSpec((None, None, *tile, x.shape[-1]), index)

    def table_block(self, table, ahead: int):
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        call, (b_lists, h_lists) = self.call, self.call.lists
        heads = self.anchor.heads * call.inner if call.anchor_is_keys else self.anchor.heads

        def index(*place):
            b, h, _, turn = place[len(self.lead) :]
            turn = (turn + ahead) % call.inner
            head = h * call.inner + turn if call.anchor_is_keys else h
            first = place[0] * b_lists * h_lists if self.lead else 0
            return first + (b if b_lists > 1 else 0) * h_lists + head * h_lists // heads, 0, 0

        return pl.BlockSpec((None, 1, table.shape[-1]), index, memory_space=pltpu.SMEM)

    def operands(self, anchors: dict, streams: dict):
        """All inputs and their specs, and the scratch memory, by name."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        call, table = self.call, self.table()
        scalar = pl.BlockSpec(memory_space=pltpu.SMEM)
        far = pl.BlockSpec(memory_space=pltpu.HBM)
        arrays = dict(table=table, following=table, **self.numbers, **anchors, **streams)
        specs = dict(table=self.table_block(table, 0), following=self.table_block(table, 1))
        specs |= {name: scalar for name in self.numbers}
        specs |= {name: self.block(x) for name, x in anchors.items()} | {name: far for name in streams}
        scratch = dict(phase=pltpu.SMEM((1,), jnp.int32), sems=pltpu.SemaphoreType.DMA((2,)))
        if not call.ranges:
            arrays["entries"] = jnp.concatenate([walk.entries.reshape(-1) for walk in self.walks])
            specs["entries"] = scalar
            if call.window:
                arrays["entries"] = jnp.pad(arrays["entries"], (0, call.window))
                specs["entries"] = far
                scratch["window"] = pltpu.SMEM((2 * call.window,), jnp.int32)
                scratch["list_sems"] = pltpu.SemaphoreType.DMA((2,))
        for name, x in streams.items():
            tile = (self.stream.slots, x.shape[-2]) if name in ALONG_LANES else (self.stream.rows,)
            scratch[f"{name}_buffers"] = pltpu.VMEM((2, *tile, x.shape[-1]), x.dtype)
        if "anchor_ids" in anchors:
            rows = anchors["anchor_ids"].shape[3], self.anchor.part, 128
            scratch["columns"] = pltpu.VMEM(rows, jnp.int32)
        scratch |= {name: pltpu.VMEM(*x) for name, x in self.kernel.scratch(call, *self.widths()).items()}
        return arrays, specs, scratch

    def run(self, arrays: dict, specs: dict, scratch: dict, shapes: dict, out_specs: dict, **params) -> dict:
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        def kernel(*refs):
            self.kernel(self.call, dict(zip([*arrays, *shapes, *scratch], refs, strict=True))).run()

        run = pl.pallas_call(
            kernel,
            grid=(*self.lead, self.inputs.q.shape[0], self.anchor.heads, self.anchor.units, self.call.inner),
            in_specs=[specs[name] for name in arrays],
            out_specs=[out_specs[name] for name in shapes],
            out_shape=[*shapes.values()],
            scratch_shapes=[*scratch.values()],
            compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VECTOR_MEMORY, **params),
            cost_estimate=self.cost(arrays, shapes),
            interpret=INTERPRET or False,
            name=f"block_sparse_attention_{self.name}",
        )
        # Scalars, and arrays that stay in HBM, have no batching rule.
        return dict(zip(shapes, jax.custom_batching.sequential_vmap(run)(*arrays.values()), strict=True))

    def cost(self, arrays: dict, shapes: dict):
        """For XLA, which hides transfers behind kernels of which it knows that they take long."""
        from jax.experimental import pallas as pl

        size = sum(x.size * x.dtype.itemsize for x in (*arrays.values(), *shapes.values()))
        return pl.CostEstimate(
            flops=int(2 * self.products), transcendentals=int(self.pairs), bytes_accessed=size
        )

    def widths(self):
        return self.inputs.q.shape[-1], self.inputs.v.shape[-1]


def _share(walk: plan.Walk, length: int) -> float:
    """Of rows of so many tiles, how much a walk visits; 1 where it is not known before the program runs."""
    if not is_concrete(walk):
        return 1.0
    if isinstance(walk, plan.ListWalk):
        return float(np.mean(walk.total)) / length
    return float(np.mean(np.maximum(walk.bounds[:, 3] - walk.bounds[:, 0], 0))) / length


def scalars(mask, slope):
    """Offsets and the predicates' values as int32 and float32 vectors, and where each leaf lies."""
    ints, floats, where = [mask.q_offset, mask.kv_offset], [], []
    first = 0 if slope is None else slope.size
    for leaf in jax.tree.leaves(mask.predicates):
        if np.shape(leaf) != ():
            raise UsageError(f"A predicate's values must be scalars on TPU, got shape {np.shape(leaf)}.")
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            where.append(("floats", first + len(floats)))
            floats.append(leaf)
        else:
            where.append(("ints", len(ints)))
            ints.append(leaf)
    numbers = dict(ints=jnp.stack([jnp.asarray(x, jnp.int32) for x in ints]))
    if floats or slope is not None:
        floats = [jnp.asarray(x, jnp.float32).reshape(1) for x in floats]
        numbers["floats"] = jnp.concatenate(
            [*([] if slope is None else [slope.astype(jnp.float32)]), *floats]
        )
    return numbers, tuple(where)
