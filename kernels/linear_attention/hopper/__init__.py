"""NVIDIA Hopper through Pallas Mosaic GPU: decays that are the same for all channels of a token.

The state of a head stays in registers while its tokens stream by, 64 at a time. One CTA a head would fill few
of 132 multiprocessors, so the sequence is cut into pieces: `summaries.py` sums what each piece adds to the
state, a short chain gives the state that enters each piece, and `sweep.py` walks all pieces at once. The
backward is three walks of that same kernel, with other arrays in the roles of q, k and v:

    dq = sweep(do, v, k), from the states;  dv = sweep(k, q, do) and dk = sweep(v, do, q), backward in time,
    from the gradients of the states

so no gradient is added to in memory, and every run gives the same bits.

Bytes, in tensors of B T N H: the forward must move 4. Pieces add 2 (pieces - 1) / pieces, less what decays
hide. The backward must move 7; three walks of 4 and the summaries make 12 to 14. With N16 H128, T 32768 and
2.92 TB/s a tensor is 0.046 ms: at 90 % of that bandwidth and 5 us a launch that predicts 0.21 to 0.31 ms
forward and 0.65 to 0.75 ms backward. An H100 worked 0.256 ms forward and 0.920 ms forward and backward with
the slopes of Lightning Attention-2, and 0.317 and 1.147 ms with a decay a token.

The delta rule has kernels of its own: `delta.py`.

The kernels import Mosaic GPU, which this module does only when it is called.
"""

import re

import jax
import jax.numpy as jnp
from blockjax.kernels.linear_attention.spec import Inputs, Options, Spec

SHARED_MEMORY = 224 << 10
"""Of the 227 KiB of a multiprocessor, what tiles may take."""

TILE = 64
"""Tokens of a chunk, and channels of a tile."""

COPY_ROWS = 8
"""The copy engine reads swizzled rows in groups of this many; other lengths are padded to a multiple."""

HOPPER = re.compile(r"\b(H100|H200|H800|H20|GH200)\b")
HEAD_DIMS = (64, 128)


def supports(spec: Spec) -> str | None:
    if spec.target.platform != "gpu" or not HOPPER.search(spec.target.device_kind):
        return f"it runs on NVIDIA Hopper GPUs (H100, H200), not on {spec.target.device_kind}"
    if spec.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16, not {spec.dtype}"
    if spec.decay == "channel":
        return "it serves at most one decay a token, not one a channel"
    if spec.Hk not in HEAD_DIMS or spec.Hv not in HEAD_DIMS:
        return f"head dims must be in {HEAD_DIMS}, got {spec.Hk} and {spec.Hv}"
    if spec.N != spec.K:
        return f"it needs as many heads in q as in v, got {spec.N} and {spec.K}"
    if spec.T < TILE:
        return f"it needs at least {TILE} tokens, got {spec.T}"
    if spec.chunk not in (None, TILE):
        return f"its chunks have {TILE} tokens, not {spec.chunk}"
    return None


def forward_pass(inputs: Inputs, options: Options):
    if options.kind == "delta":
        from blockjax.kernels.linear_attention.hopper import delta

        return delta.forward_pass(inputs, options)
    from blockjax.kernels.linear_attention.hopper import pieces, sweep

    plan = pieces.Plan.of(inputs)
    q, k, v = (_whole(x) for x in inputs[:3])
    entries = plan.entries(k, v, plan.initial(inputs))
    call = sweep.Sweep(plan.cut, documents=plan.documents, read=options.scale, pair=options.scale)
    o, state, _ = sweep.sweep(call, sweep.Operands(q, k, v, entries, plan.decays(False)))
    return (o[:, : inputs.q.shape[1]], state), (entries, state)


def backward_pass(inputs: Inputs, residuals, do, dstate, options: Options) -> Inputs:
    if options.kind == "delta":
        from blockjax.kernels.linear_attention.hopper import delta

        return delta.backward_pass(inputs, residuals, do, dstate, options)
    from blockjax.kernels.linear_attention.hopper import pieces
    from blockjax.kernels.linear_attention.hopper.sweep import Operands, Sweep, sweep

    (entries, last), T, scale = residuals, inputs.q.shape[1], options.scale
    plan = pieces.Plan.of(inputs)
    q, k, v, do = (_whole(x) for x in (*inputs[:3], do))
    a_token = inputs.log_decay is not None and inputs.log_decay.ndim == 3
    kept = dict(cut=plan.cut, documents=plan.documents)

    call = Sweep(**kept, read=scale, pair=scale)
    x = q if a_token else None
    dq, _, reads = sweep(call, Operands(do, v, k, _transposed(entries), plan.decays(False), x))

    back = plan.entries(q, do, dstate, reverse=True, write=scale)
    call = Sweep(**kept, reverse=True, pair=scale, write=scale)
    dv, dinitial, _ = sweep(call, Operands(k, q, do, back, plan.decays(True)))
    x = k if a_token else None
    dk, _, writes = sweep(call, Operands(v, do, q, _transposed(back), plan.decays(True), x))

    dlog = None
    if a_token:
        dlog = plan.decay_gradient(reads - writes, entries, last, back)[:, :T]
    elif inputs.log_decay is not None:
        dlog = _gradient_of_rates(inputs, do[:, :T], dstate, options)
    dstate = None if inputs.state is None else dinitial
    return Inputs(dq[:, :T], dk[:, :T], dv[:, :T], dlog, None, None, dstate)


def _gradient_of_rates(inputs: Inputs, do, dstate, options: Options):
    """Of a decay that is the same for all tokens, by XLA; dropped by the compiler where nobody asks for it.

    Sums over products of the kernels would cancel to less than their rounding here.
    """
    from blockjax.kernels.linear_attention import xla

    _, residuals = xla.forward_pass(inputs, options)
    return xla.backward_pass(inputs, residuals, do, dstate, options).log_decay


def _transposed(states: jax.Array) -> jax.Array:
    return states.swapaxes(-1, -2)


def _whole(x):
    """Padded along the tokens, which is a copy, where the copy engine cannot take them as they are."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % COPY_ROWS), (0, 0), (0, 0)))
