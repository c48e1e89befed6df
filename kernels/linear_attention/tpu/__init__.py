"""Pallas Mosaic TPU: chunks one after the other, the states of a few heads in vector memory.

The backward pass first walks over the states again, writing the one before each chunk, then from the last
chunk to the first with the gradients of states. Of the delta rule the inverses are kept for it, else nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blockjax.kernels.linear_attention import gates
from blockjax.kernels.linear_attention.spec import Inputs, Options, Spec, form

INTERPRET = None
"""True, or `pltpu.InterpretParams`, to run the kernels on CPU: for tests."""

CHUNKS = {"decay": 128, "delta": 64, "channel": 64}
"""Tokens of a chunk by kind, or by form of the decays: inverting a matrix of 128 takes more products than all
that follows, and of decays a channel a chunk has log2 C products where others have one.
"""
LANES, SUBLANES, ROWS = 128, 8, 16
HEADS = 8
"""States a grid step, at most: their products do not wait for each other."""
MIB = 2**20
VECTOR_MEMORY = 56 * MIB
"""Bytes that a kernel may take of the 64 MiB or more a core has."""


def supports(spec: Spec) -> str | None:
    if spec.target.platform != "tpu" and INTERPRET is None:
        return f"it runs on TPUs, not on {spec.target.device_kind}"
    if spec.dtype not in (jnp.bfloat16, jnp.float32):
        return f"its kernels are for bfloat16 and float32, not {spec.dtype}"
    if spec.T < ROWS:
        return f"its kernels are for {ROWS} tokens or more, not {spec.T}"
    C = chunk_of(spec.kind, spec.decay, spec.chunk)
    if not ROWS <= C <= gates.LONGEST:
        return f"its chunks are of {ROWS} to {gates.LONGEST} tokens, not {C}"
    if (spec.Hk % 64 or spec.Hv % 64) and INTERPRET is None:
        return f"head sizes must be multiples of 64, not Hk={spec.Hk}, Hv={spec.Hv}"
    sizes = Sizes(spec.kind, spec.decay, C, spec.N // spec.K, spec.K, spec.Hk, spec.Hv, jnp.dtype(spec.dtype))
    if sizes.heads is None:
        needed = sizes.vector_memory(sizes.allowed[0])
        return (
            f"Hk={spec.Hk}, Hv={spec.Hv} with N={spec.N}, K={spec.K} need {needed / MIB:.1f} MiB of vector "
            f"memory, of {VECTOR_MEMORY / MIB:.0f}, in chunks of {C} tokens"
        )
    return None


def chunk_of(kind: str, decay: str, asked: int | None = None) -> int:
    """Tokens of a chunk."""
    return asked or CHUNKS.get(decay, CHUNKS[kind])


@dataclass(frozen=True)
class Sizes:
    """What is static about all kernels of a call."""

    kind: str
    decay: str
    C: int
    G: int
    K: int
    Hk: int
    Hv: int
    dtype: jnp.dtype

    @property
    def allowed(self) -> list[int]:
        """How many heads a block may hold, least first: it is whole registers wide, or the whole array."""
        return [
            heads
            for heads in range(1, self.K + 1)
            if self.K % heads == 0
            and (heads == self.K or not (heads * self.Hk % LANES or heads * self.Hv % LANES))
        ]

    @property
    def heads(self) -> int | None:
        """States a grid step; None if even the fewest do not fit."""
        fit = [n for n in self.allowed if self.vector_memory(n) <= VECTOR_MEMORY]
        return max((n for n in fit if n <= HEADS), default=min(fit, default=None))

    def vector_memory(self, heads: int) -> int:
        """Bytes for two buffers of each block of the backward pass, its states and its temporaries."""
        k, v = (-(-heads * H // LANES) * LANES for H in (self.Hk, self.Hv))
        tokens = self.C * (2 * self.G + 2) * (k + v) * self.dtype.itemsize
        states = heads * self.Hk * -(-self.Hv // LANES) * LANES
        tokens += (self.kind == "delta") * heads * self.C * max(self.C, LANES) * self.dtype.itemsize
        temporaries = 4 * self.C * (4 * self.C + 4 * (self.Hk + self.Hv)) * min(heads, 2)
        if self.decay == "channel":
            # Log-decays and their gradients; the factors of each level of the tree, and keys times them.
            tokens += self.C * 2 * k * 4
            temporaries += self.C.bit_length() * self.C * self.Hk * (4 + 4) * min(heads, 2)
        return 2 * tokens + states * (2 * self.dtype.itemsize + 5 * 4) + temporaries


def forward_pass(inputs: Inputs, options: Options):
    """Of the delta rule the residuals are the inverses [B, K, chunks, C, C] of each chunk's matrix."""
    launch = _Launch(inputs, options)
    q, k, v = launch.tokens(inputs.q, inputs.k, inputs.v)
    inverses = None
    if options.kind == "delta":
        (inverses,) = launch("inverse", (k, launch.gates), (launch.inverses,))
    o, state = launch(
        "forward",
        (q, k, v, launch.gates, inverses, inputs.state),
        (launch.per_token(inputs.q.shape[2], launch.sizes.Hv), launch.state),
    )
    return (launch.whole(o, launch.sizes.Hv), state), inverses


def backward_pass(inputs: Inputs, inverses, do, dstate, options: Options) -> Inputs:
    launch = _Launch(inputs, options)
    sizes, N = launch.sizes, inputs.q.shape[2]
    q, k, v, do = launch.tokens(inputs.q, inputs.k, inputs.v, do)
    (states,) = launch("states", (k, v, launch.gates, inverses, inputs.state), (launch.states,))
    dq, dk, dv, dgates, first = launch(
        "backward",
        (q, k, v, do, launch.gates, inverses, states, dstate),
        (
            launch.per_token(N, sizes.Hk),
            launch.per_token(sizes.K, sizes.Hk),
            launch.per_token(sizes.K, sizes.Hv),
            launch.dgates,
            launch.state,
        ),
        reverse=True,
    )
    dq, dk, dv = (launch.whole(x, H) for x, H in ((dq, sizes.Hk), (dk, sizes.Hk), (dv, sizes.Hv)))
    parts = [] if dgates.rows is None else launch.unpacked(dgates.rows)
    dbeta = gates.whole(parts.pop(), launch.T) if sizes.kind == "delta" else None
    if sizes.decay == "channel":
        dlog = gates.with_starts(inputs, launch.whole(dgates.log_decay, sizes.Hk), 0.0)
    else:
        dlog = gates.gradient(inputs, parts.pop())
    return Inputs(dq, dk, dv, dlog, dbeta, None, None if inputs.state is None else first)


class Gates(NamedTuple):
    """What kernels take of decays and beta, or their gradients; None for what a call has not.

    Attributes:
      rows: [B, groups, chunks, parts * heads and more, C] float32, numbers per token.
      log_decay: [B, chunks * C, K * Hk] float32, decays a channel.
    """

    rows: Any
    log_decay: Any


class _Launch:
    """The kernels of one call, over a grid of batch, groups of heads and chunks."""

    def __init__(self, inputs: Inputs, options: Options):
        self.B, self.T, self.K, Hk = inputs.k.shape
        decay, G = form(inputs.log_decay), inputs.q.shape[2] // self.K
        C = chunk_of(options.kind, decay, options.chunk)
        self.sizes = Sizes(options.kind, decay, C, G, self.K, Hk, inputs.v.shape[-1], inputs.q.dtype)
        self.heads, self.chunks, self.scale = self.sizes.heads, -(-self.T // C), options.scale
        self.manual = jax.typeof(inputs.q).manual_axis_type
        if decay == "channel":
            (log_decay,) = self.tokens(gates.with_starts(inputs, inputs.log_decay))
            beta = inputs.beta
            beta = None if beta is None else self.packed([gates.cut(beta, self.chunks, C)])
            self.gates = Gates(beta, log_decay)
        else:
            self.gates = Gates(self.packed(gates.Rows.of(inputs, self.chunks, C)), None)

    def tokens(self, *arrays: jax.Array) -> list[jax.Array]:
        """[B, T, N, H] as [B, chunks * C, N * H]: heads side by side, as they lie in memory."""
        pad = self.chunks * self.sizes.C - self.T
        flat = (x.reshape(*x.shape[:2], -1) for x in arrays)
        return [jnp.pad(x, ((0, 0), (0, pad), (0, 0))) if pad else x for x in flat]

    def whole(self, x: jax.Array, H: int) -> jax.Array:
        return x[:, : self.T].reshape(self.B, self.T, -1, H)

    def packed(self, rows: Iterable[jax.Array | None]) -> jax.Array:
        """[B, groups, chunks, parts * heads and more, C]: what `decays.Chunk` takes apart."""
        x = jnp.stack([part for part in rows if part is not None], axis=2)  # [B, K, parts, chunks, C]
        x = x.reshape(self.B, -1, self.heads, *x.shape[2:]).transpose(0, 1, 4, 3, 2, 5)
        x = x.reshape(*x.shape[:3], -1, self.sizes.C)
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -x.shape[3] % SUBLANES), (0, 0)))

    def unpacked(self, rows: jax.Array) -> list[jax.Array]:
        """Of [B, groups, chunks, heads * parts and more, C] the parts, each [B, K, chunks, C]."""
        x = rows[:, :, :, : self.heads * self.parts]
        x = x.reshape(*x.shape[:3], self.heads, self.parts, -1).transpose(4, 0, 1, 3, 2, 5)
        return [*x.reshape(self.parts, self.B, self.K, self.chunks, self.sizes.C)]

    def per_token(self, n: int, H: int, dtype=None) -> jax.ShapeDtypeStruct:
        return self.array(self.B, self.chunks * self.sizes.C, n * H, dtype=dtype or self.sizes.dtype)

    @property
    def state(self) -> jax.ShapeDtypeStruct:
        return self.array(self.B, self.K, self.sizes.Hk, self.sizes.Hv, dtype=jnp.float32)

    @property
    def states(self) -> jax.ShapeDtypeStruct:
        """Those before each chunk, as products take them."""
        shape = self.B, self.K, self.chunks, self.sizes.Hk, self.sizes.Hv
        return self.array(*shape, dtype=self.sizes.dtype)

    @property
    def inverses(self) -> jax.ShapeDtypeStruct:
        shape = self.B, self.K, self.chunks, self.sizes.C, self.sizes.C
        return self.array(*shape, dtype=self.sizes.dtype)

    @property
    def parts(self) -> int:
        """Gradients that are a number a token: of the running sum of decays a token, and of beta."""
        return (self.sizes.decay != "channel") + (self.sizes.kind == "delta")

    @property
    def dgates(self) -> Gates:
        rows = log_decay = None
        if self.sizes.decay == "channel":
            log_decay = self.per_token(self.K, self.sizes.Hk, jnp.float32)
        if self.parts:
            count = -(-self.heads * self.parts // SUBLANES) * SUBLANES
            shape = self.B, self.K // self.heads, self.chunks, count, self.sizes.C
            rows = self.array(*shape, dtype=jnp.float32)
        return Gates(rows, log_decay)

    def array(self, *shape: int, dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=self.manual)

    def __call__(self, kernel: str, arrays, out, reverse: bool = False):
        """Runs a kernel of `kernels.py`, from the last chunk to the first if `reverse`; None is passed on."""
        from blockjax.kernels.linear_attention.tpu import kernels
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        sizes, last = self.sizes, self.chunks - 1

        def spec(x):
            at = (lambda c: last - c) if reverse else (lambda c: c)
            if x.ndim == 3:
                width = x.shape[2] * self.heads // self.K
                return pl.BlockSpec((1, sizes.C, width), lambda b, h, c: (b, at(c), h))
            if x.ndim == 4:
                return pl.BlockSpec((1, self.heads, *x.shape[2:]), lambda b, h, c: (b, h, 0, 0))
            heads = x.shape[1] * self.heads // self.K
            return pl.BlockSpec((1, heads, 1, *x.shape[3:]), lambda b, h, c: (b, h, at(c), 0, 0))

        outs, tree = jax.tree.structure(out), jax.tree.structure((arrays, out), is_leaf=lambda x: x is None)
        given = [x is not None for x in jax.tree.leaves((arrays, out), is_leaf=lambda x: x is None)]

        def body(*refs):
            *refs, scratch = refs
            refs = iter(refs)
            arrays, out = jax.tree.unflatten(tree, [next(refs) if there else None for there in given])
            call = kernels.Call(sizes.G, self.heads, sizes.Hk, sizes.Hv, self.scale)
            getattr(kernels, kernel)(call, *arrays, *out, scratch)

        arrays, out = jax.tree.leaves(arrays), jax.tree.leaves(out)
        products = dict(inverse=12, forward=6, states=3, backward=14)[kernel] * sizes.G
        if sizes.decay == "channel":
            products += dict(inverse=3, forward=1, states=0, backward=3)[kernel] * sizes.C.bit_length()
        tokens = self.B * self.chunks * sizes.C * self.K
        run = pl.pallas_call(
            body,
            grid=(self.B, self.K // self.heads, self.chunks),
            in_specs=[spec(x) for x in arrays],
            out_specs=[spec(x) for x in out],
            out_shape=out,
            scratch_shapes=[pltpu.VMEM((self.heads, sizes.Hk, sizes.Hv), jnp.float32)],
            compiler_params=pltpu.CompilerParams(
                vmem_limit_bytes=VECTOR_MEMORY, dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * products * tokens * sizes.Hk * sizes.Hv,
                transcendentals=tokens * sizes.C,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *out)),
            ),
            interpret=INTERPRET or False,
            name=f"linear_attention_{kernel}",
        )
        return jax.tree.unflatten(outs, run(*arrays))
