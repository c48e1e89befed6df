"""Pallas Mosaic TPU: tiles of tokens of all arrays stream through vector memory, each array once."""

import jax
import jax.numpy as jnp
from blockjax.kernels.depth_mix.spec import (
    Join,
    JoinInputs,
    JoinOptions,
    Read,
    ReadInputs,
    ReadOptions,
    Spec,
    tokens,
)

INTERPRET = None
"""True, or `pltpu.InterpretParams`, to run the kernels on CPU: for tests."""

MIB = 2**20
VECTOR_MEMORY = 56 * MIB
"""Bytes that a kernel may take of the 64 MiB or more a core has."""
LANES, SUBLANES = 128, 8
PIECE = 1024
"""Columns of M that are worked on at once, at most: 16 of 64 registers for a group of rows. In the static
schedules that libtpu makes for v5e, sums over lanes take longer with 512, and 2048 spill registers."""
TILES = 256, 128, 64, 32, 16
"""Tokens of a tile, largest first."""


def supports(spec: Spec) -> str | None:
    if spec.target.platform != "tpu" and INTERPRET is None:
        return f"it runs on TPUs, not on {spec.target.device_kind}"
    if spec.dtype not in (jnp.bfloat16, jnp.float32):
        return f"its kernels are for bfloat16 and float32, not {spec.dtype}"
    if not spec.tokens:
        return "it needs at least one token"
    sizes = spec.n, spec.R, spec.M, spec.heads, spec.dtype
    for kernel in (f"{spec.op}_forward", f"{spec.op}_backward"):
        needed = vector_memory(kernel, TILES[-1], *sizes)
        if needed > VECTOR_MEMORY:
            return (
                f"n={spec.n}, R={spec.R}, M={spec.M} and {spec.heads} heads need {needed / MIB:.1f} MiB of "
                f"vector memory, of {VECTOR_MEMORY / MIB:.0f}, even in tiles of {TILES[-1]} tokens"
            )
    return None


def vector_memory(kernel: str, tile: int, n: int, R: int, M: int, heads: int, dtype) -> int:
    """Bytes for two buffers of each block and the temporaries of a kernel."""
    width, size = _up(M, LANES), jnp.dtype(dtype).itemsize
    streamed = dict(read_forward=n + R, read_backward=2 * n + R, join_forward=5, join_backward=6)[kernel]
    columns = _up((n + 1) * R * heads + n, LANES) + _up(R * heads, LANES)
    # Queries and gains, and in the backward what their gradients are added up in.
    shared = (1 if "read" in kernel else 2) * (_up(R, SUBLANES) + R * SUBLANES)
    temporaries = 8 * (n + R) * PIECE * 32
    return 2 * tile * (streamed * width * size + 4 * columns) + 8 * shared * width + temporaries


def tile_of(kernel: str, n: int, R: int, M: int, heads: int, dtype, rows: int) -> int:
    """The largest tile that fits vector memory, no larger than so many rows need."""
    fits = (t for t in TILES if vector_memory(kernel, t, n, R, M, heads, dtype) <= VECTOR_MEMORY)
    return min(next(fits), _up(rows, TILES[-1]))


def read_forward(inputs: ReadInputs, options: ReadOptions):
    """Beside `Read` the numbers of each token, as they lie in `kernels.Columns`."""
    launch = _Launch("read_forward", inputs.sources[0], len(inputs.queries), options, len(inputs.sources))
    n, R, heads, M = launch.n, launch.R, options.heads, launch.M
    columns = (n + 1) * R * heads + n
    means = [launch.like(M)] * R if options.unstacked else launch.like(M, lead=(R,))
    (means, stats), _ = launch(
        [launch.flat(v) for v in inputs.sources],
        inputs.queries,
        (means, launch.like(columns, dtype=jnp.float32)),
    )
    o = tuple(map(launch.whole, means)) if options.unstacked else means.reshape(R, *launch.shape)
    numbers = stats[:, : (n + 1) * R * heads].reshape(launch.rows, n + 1, R, heads)
    numbers = jnp.moveaxis(numbers, 0, 2).reshape(n + 1, R, *launch.shape[:-1], heads)
    return Read(o, numbers[n], numbers[:n]), stats


def read_backward(inputs: ReadInputs, read: Read, norms, do, dlse, options: ReadOptions) -> ReadInputs:
    launch = _Launch("read_backward", inputs.sources[0], len(inputs.queries), options, len(inputs.sources))
    R, heads, rows, M = launch.R, options.heads, launch.rows, launch.M
    do = [launch.flat(x) for x in do] if options.unstacked else do.reshape(R, rows, M)
    dlse = jnp.moveaxis(dlse.reshape(R, rows, heads), 0, 1).reshape(rows, R * heads)
    dsources, dw = launch(
        ([launch.flat(v) for v in inputs.sources], do, dlse, norms),
        inputs.queries,
        [launch.like(M)] * launch.n,
        sums=launch.total(R),
    )
    return ReadInputs(tuple(map(launch.whole, dsources)), dw)


def join_forward(inputs: JoinInputs, options: JoinOptions):
    """Beside `Join` the numbers of each token: logits, norm, rms."""
    partial, update, o, lse, query, norm_gain = inputs
    launch = _Launch("join_forward", partial, 1, options)
    M, heads = launch.M, options.heads
    streamed = launch.flat(partial), None if update is None else launch.flat(update), launch.flat(o)
    same = update is None and not options.first
    (total, x, stats), _ = launch(
        (*streamed, launch.flat(lse)),
        (query[None], norm_gain[None]),
        (None if same else launch.like(M), launch.like(M), launch.like(heads + 2, dtype=jnp.float32)),
    )
    logit = stats[:, :heads].reshape(lse.shape)
    return Join(partial if same else launch.whole(total), launch.whole(x), logit), stats


def join_backward(inputs: JoinInputs, join: Join, norms, dpartial, dx, options: JoinOptions) -> JoinInputs:
    _, update, o, lse, query, norm_gain = inputs
    launch = _Launch("join_backward", o, 1, options)
    M, heads, flat = launch.M, options.heads, launch.flat
    (ds, do, dlse), (dquery, dgain) = launch(
        (flat(join.partial), flat(o), flat(lse), norms, flat(dpartial), flat(dx)),
        (query[None], norm_gain[None]),
        (launch.like(M), launch.like(M), launch.like(heads, dtype=jnp.float32)),
        sums=(launch.total(1), launch.total(1)),
    )
    ds = launch.whole(ds)
    gradients = launch.whole(do), dlse.reshape(lse.shape), dquery[0], dgain[0]
    return JoinInputs(ds, None if update is None else ds, *gradients)


class _Launch:
    """One kernel over all tokens of arrays like `x` [..., M], which it sees as [rows, M]."""

    def __init__(self, kernel: str, x: jax.Array, R: int, options: ReadOptions | JoinOptions, n: int = 1):
        self.kernel, self.shape, self.dtype = kernel, x.shape, x.dtype
        self.n, self.R, self.rows, self.M = n, R, tokens(x.shape), x.shape[-1]
        self.options, self.manual = options, jax.typeof(x).manual_axis_type
        self.tile = tile_of(kernel, n, R, self.M, options.heads, x.dtype, self.rows)
        tiles = -(-self.rows // self.tile)
        # Chips with two cores share out the first axis; sums go over the second.
        self.grid = (2, tiles // 2) if tiles % 2 == 0 else (1, tiles)

    def flat(self, x: jax.Array) -> jax.Array:
        return x.reshape(self.rows, x.shape[-1])

    def whole(self, x: jax.Array) -> jax.Array:
        return x.reshape(self.shape)

    def like(self, columns: int, lead: tuple[int, ...] = (), dtype=None) -> jax.ShapeDtypeStruct:
        """An array of so many columns a token."""
        return self.array(*lead, self.rows, columns, dtype=dtype or self.dtype)

    def total(self, rows: int) -> jax.ShapeDtypeStruct:
        """A float32 sum [rows, M] over tokens, in eight parts a core."""
        return self.array(self.grid[0], SUBLANES * rows, self.M, dtype=jnp.float32)

    def array(self, *shape: int, dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=self.manual)

    def __call__(self, streamed, shared, out, sums=()):
        """Runs the kernel on trees of arrays.

        Args:
          streamed, out: have tokens as their last axis but one.
          shared: every tile sees them whole, [rows, M].
          sums: what `total` gives.

        Returns:
          Arrays for `out`, and for `sums` with their parts added up.
        """
        from blockjax.kernels.depth_mix.tpu import kernels
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        call = kernels.Call(
            **dict(n=self.n, R=self.R, M=self.M, heads=self.options.heads, tokens=self.rows, tile=self.tile),
            group=32 // self.dtype.itemsize,
            eps=self.options.eps,
            norm_eps=getattr(self.options, "norm_eps", 0.0),
        )
        steps = self.grid[1]

        def tiled(x):
            lead = x.shape[:-2]
            block = (*lead, self.tile, x.shape[-1])
            return pl.BlockSpec(block, lambda core, step: (*[0] * len(lead), core * steps + step, 0))

        def whole(x):
            return pl.BlockSpec(x.shape, lambda core, step: (0, 0))

        def per_core(x):
            return pl.BlockSpec((None, *x.shape[1:]), lambda core, step: (core, 0, 0))

        tree = jax.tree.structure((streamed, shared, out, sums))

        def body(*refs):
            getattr(kernels, self.kernel)(call, *jax.tree.unflatten(tree, refs))

        arrays = jax.tree.leaves((streamed, shared))
        outputs = jax.tree.leaves((out, sums))
        run = pl.pallas_call(
            body,
            grid=self.grid,
            in_specs=jax.tree.leaves((jax.tree.map(tiled, streamed), jax.tree.map(whole, shared))),
            out_specs=jax.tree.leaves((jax.tree.map(tiled, out), jax.tree.map(per_core, sums))),
            out_shape=outputs,
            compiler_params=pltpu.CompilerParams(
                vmem_limit_bytes=VECTOR_MEMORY, dimension_semantics=("parallel", "arbitrary")
            ),
            cost_estimate=self.cost(arrays, outputs),
            interpret=INTERPRET or False,
            name=f"depth_mix_{self.kernel}",
        )
        out, sums = jax.tree.unflatten(jax.tree.structure((out, sums)), run(*arrays))
        return out, jax.tree.map(lambda x: x.reshape(len(x), -1, SUBLANES, self.M).sum((0, 2)), sums)

    def cost(self, arrays, outputs):
        """For XLA, which hides transfers behind kernels of which it knows that they take long."""
        from jax.experimental import pallas as pl

        size = sum(x.size * x.dtype.itemsize for x in (*arrays, *outputs))
        flops = 8 * self.n * self.R * self.rows * self.M
        return pl.CostEstimate(
            flops=flops, transcendentals=2 * self.n * self.R * self.rows, bytes_accessed=size
        )


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
