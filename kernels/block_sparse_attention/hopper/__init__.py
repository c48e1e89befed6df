"""NVIDIA Hopper through Pallas Mosaic GPU: what it serves, its tiles, and its two passes.

The kernels import Mosaic GPU, which this module does only when it is called.
"""

import functools
import re

import jax.numpy as jnp
from blockjax.kernels.block_sparse_attention.spec import Cotangents, Gradients, Inputs, Options, Spec, Tiles

from blockjax.masks import Ranges
from blockjax.masks.predicates import Everything

SHARED_MEMORY = 224 << 10
"""Of the 227 KiB of a multiprocessor, what tiles may take."""

WG_ROWS = 64
"""Rows of one warpgroup: the M of a `wgmma` instruction."""

WGS = 2
"""Warpgroups that multiply in a CTA."""

COPY_ROWS = 8
"""The copy engine reads swizzled rows in groups of this many; other lengths are padded to a multiple."""

TILE = 128
"""Blocks of this size or a multiple of it fill a thread block."""

HOPPER = re.compile(r"\b(H100|H200|H800|H20|GH200)\b")
BLOCKS = (16, 32, 64, 128, 256, 512)
HEAD_DIMS = (64, 128, 192, 256)


TILES = {
    64: Tiles((128, 3), (128, 2), (64, 4)),
    128: Tiles((128, 2), (128, 2), (64, 4)),
    192: Tiles((64, 2), (64, 2), (64, 2)),
    256: Tiles((64, 2), (64, 1), (64, 2)),
}
"""By the larger head dim; for 64 and 128 the fastest of a few that were timed on an H100."""

CHOICES = {
    "forward": [(n, s) for n in (64, 128, 192) for s in (2, 3, 4)],
    "dq": [(n, s) for n in (64, 128) for s in (1, 2, 3, 4)],
    "dkv": [(n, s) for n in (64, 128) for s in (2, 3, 4)],
}
"""What `tune.py` tries."""


def supports(spec: Spec) -> str | None:
    if spec.target.platform != "gpu" or not HOPPER.search(spec.target.device_kind):
        return f"it runs on NVIDIA Hopper GPUs (H100, H200), not on {spec.target.device_kind}"
    if spec.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16, not {spec.dtype}"
    if spec.H not in HEAD_DIMS or spec.Hv not in HEAD_DIMS:
        return f"head dims must be in {HEAD_DIMS}, got {spec.H} and {spec.Hv}"
    for name, block in (("bq", spec.bq), ("bk", spec.bk)):
        if block not in BLOCKS:
            return f"block sizes must be in {BLOCKS}, got {name}={block}"
    return None


def default_tiles(spec: Spec) -> Tiles:
    return TILES[max(spec.H, spec.Hv)]


def tiles_fit(spec: Spec, tiles: Tiles) -> str | None:
    """A reason why they do not, with the bytes of shared memory that are needed, or None."""
    for kernel, (tokens, steps) in tiles._asdict().items():
        if tokens % WG_ROWS or steps < 1:
            return f"{kernel} needs a multiple of 64 tokens and at least one step, got {tokens} and {steps}"
        rows = WG_ROWS if kernel == "dkv" and splits_keys(spec.H, spec.Hv) else WGS * WG_ROWS
        apart = kernel == "forward" and spec.Hv != spec.H
        needed = tile_bytes(kernel, tokens * steps, rows, spec.H, spec.Hv, apart)
        if needed > SHARED_MEMORY:
            return (
                f"{kernel} needs {needed / 1024:.0f} KiB of shared memory, of "
                f"{SHARED_MEMORY / 1024:.0f}, for {steps} steps of {tokens} tokens"
            )
    return None


def tile_bytes(kernel: str, moving: int, rows: int, H: int, Hv: int, apart: bool) -> int:
    """Shared memory of a CTA that holds `rows` rows, with `moving` tokens in flight.

    `apart` if results do not take the place of what is held.
    """
    held, results = dict(forward=(H, Hv), dq=(H + Hv, H), dkv=(H + Hv, H + Hv))[kernel]
    return 2 * (moving * (H + Hv) + rows * (held + results * apart))


def splits_keys(H: int, Hv: int) -> bool:
    """Whether the sums dk and dv of 64 keys are too wide for the registers of one warpgroup."""
    return H + Hv > 256


def forward_pass(inputs: Inputs, options: Options):
    """`o` [B, T, N, Hv] in q's dtype and `lse` [B, N, T] float32."""
    from blockjax.kernels.block_sparse_attention.hopper.forward import forward
    from blockjax.kernels.block_sparse_attention.hopper.tiles import Steps

    T = inputs.q.shape[1]
    call, operands = _prepare(inputs, options)
    steps = Steps(*options.tiles.forward, call.bk)
    o, lse = forward(call, operands(steps), steps)
    return o[:, :T], lse[..., :T]


def backward_pass(inputs: Inputs, cotangents: Cotangents, options: Options) -> Gradients:
    from blockjax.kernels.block_sparse_attention.hopper.call import LaidCotangents
    from blockjax.kernels.block_sparse_attention.hopper.key_gradients import key_gradients
    from blockjax.kernels.block_sparse_attention.hopper.query_gradient import query_gradient
    from blockjax.kernels.block_sparse_attention.hopper.tiles import LOG2_E, Steps

    (_, T, *_), (_, S, *_) = inputs.q.shape, inputs.k.shape
    call, operands = _prepare(inputs, options)
    do, lse, delta = cotangents
    do = _whole(do)
    # A row that saw nothing, and a padded one, get lse = +inf here: every p is then exactly 0.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2_E)

    steps = Steps(*options.tiles.dq, call.bk)
    held = LaidCotangents(do, call.held.arrange(lse, jnp.inf), call.held.arrange(delta))
    dq, dslope = query_gradient(call, operands(steps), held, steps)

    steps = Steps(*options.tiles.dkv, call.bq)
    moving = LaidCotangents(do, steps.pad(lse, jnp.inf), steps.pad(delta))
    dk, dv = key_gradients(call, operands(steps, transposed=True), moving, steps)
    if dslope is not None:
        dslope = dslope.sum((0, 2))
    return Gradients(dq[:, :T], dk[:, :S], dv[:, :S], dslope)


def _prepare(inputs: Inputs, options: Options):
    """The call, and a function that gives a kernel's operands from its steps."""
    from blockjax.kernels.block_sparse_attention.hopper.call import Call, operands

    mask = inputs.mask
    if isinstance(mask, Ranges):
        # Nothing is stored, so the finest tiles are free.
        inputs = inputs._replace(mask=mask.finer(min(mask.bq, TILE), min(mask.bk, TILE)))
    if inputs.slope is None and all(isinstance(x, Everything) for x in mask.predicates):
        # Nothing asks where tokens are, and the compiler finds no layout for what nobody uses.
        inputs = inputs._replace(q_positions=None, kv_positions=None)
    inputs = inputs._replace(q=_whole(inputs.q), k=_whole(inputs.k), v=_whole(inputs.v))
    call = Call.of(inputs, options.scale, options.soft_cap)
    return call, functools.partial(operands, call, inputs)


def _whole(x):
    """Padded along the tokens, which is a copy, where the copy engine cannot take them as they are."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % COPY_ROWS), (0, 0), (0, 0)))
