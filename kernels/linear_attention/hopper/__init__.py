"""NVIDIA Hopper through Pallas Mosaic GPU.

Of decays that are the same for all channels of a token, the state of a head stays in registers while its
tokens stream by, 64 at a time. One CTA a head would fill few of 132 multiprocessors, so the sequence is cut
into pieces: `summaries.py` sums what each piece adds to the state, a short chain gives the state that enters
each piece, and `sweep.py` walks all pieces at once. The backward is three walks of that same kernel, with
other arrays in the roles of q, k and v:

    dq = sweep(do, v, k), from the states;  dv = sweep(k, q, do) and dk = sweep(v, do, q), backward in time,
    from the gradients of the states

so no gradient is added to in memory, and every run gives the same bits.

Bytes, in tensors of B T N H: the forward must move 4. Pieces add 2 (pieces - 1) / pieces, less what decays
hide. The backward must move 7; three walks of 4 and the summaries make 12 to 14. With N16 H128, T 32768 and
2.92 TB/s a tensor is 0.046 ms: at 90 % of that bandwidth and 5 us a launch that predicts 0.21 to 0.31 ms
forward and 0.65 to 0.75 ms backward. An H100 worked 0.256 ms forward and 0.920 ms forward and backward with
the slopes of Lightning Attention-2, and 0.317 and 1.147 ms with a decay a token.

The delta rule has kernels of its own: `delta.py`.

Decays a channel, of both kinds: XLA computes all that is parallel over chunks, as on every device
(`xla/chunks.py`), and `walk.py` walks over the states, in one launch for thousands of tokens where a scan has
several a chunk. With Hk = Hv = 128 a walk reads 80 KiB of a chunk and head, 32 more if gradients, and stores
a float32 state of 64: with N16, T 32768 and 2.92 TB/s at least 0.41 and 0.51 ms, in 512 steps one after the
other. An H100 takes 1.3 ms for either, of 15.4 ms forward and 46.6 ms in both passes: the rest is XLA.

The kernels import Mosaic GPU, which this module does only when it is called.
"""

import functools
import re

import jax
import jax.numpy as jnp
from blockjax.kernels.linear_attention import xla
from blockjax.kernels.linear_attention.hopper import summary as summary  # of a backend, where it has one
from blockjax.kernels.linear_attention.spec import Inputs, Options, Spec, form

SHARED_MEMORY = 224 << 10
"""Of the 227 KiB of a multiprocessor, what tiles may take."""

TILE = 64
"""Tokens of a chunk, and channels of a tile."""

COPY_ROWS = 8
"""The copy engine reads swizzled rows in groups of this many; other lengths are padded to a multiple."""

SPAN_TOKENS = 1 << 17
"""Of all heads together, that a walk over decays a channel covers: what XLA keeps of them meanwhile is a few
GiB."""

HOPPER = re.compile(r"\b(H100|H200|H800|H20|GH200)\b")
HEAD_DIMS = (64, 128)


def supports(spec: Spec) -> str | None:
    if spec.target.platform != "gpu" or not HOPPER.search(spec.target.device_kind):
        return f"it runs on NVIDIA Hopper GPUs (H100, H200), not on {spec.target.device_kind}"
    if spec.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16, not {spec.dtype}"
    if spec.Hk not in HEAD_DIMS or spec.Hv not in HEAD_DIMS:
        return f"head dims must be in {HEAD_DIMS}, got {spec.Hk} and {spec.Hv}"
    if spec.T < TILE:
        return f"it needs at least {TILE} tokens, got {spec.T}"
    if spec.chunk not in (None, TILE):
        return f"its chunks have {TILE} tokens, not {spec.chunk}"
    return None


def forward_pass(inputs: Inputs, options: Options, added=None):
    """`added` as in `summary.forward`, where that was called before."""
    if form(inputs.log_decay) == "channel":
        return xla.forward_pass(inputs, options, *_walk(inputs))
    G = queries(inputs)
    if G == 1:
        return _forward_pass(inputs, options, added)
    (o, state), residuals = _forward_pass(a_query(inputs, G), options, added)
    return (o, state[:, ::G]), residuals


def backward_pass(inputs: Inputs, residuals, do, dstate, options: Options, added=None) -> Inputs:
    """`added` as in `summary.backward`, where that was called before."""
    if form(inputs.log_decay) == "channel":
        return xla.backward_pass(inputs, residuals, do, dstate, options, *_walk(inputs))
    G = queries(inputs)
    if G == 1:
        gradients = _backward_pass(inputs, residuals, do, dstate, options, added)
    else:
        # Of a state's copies the first is the one that was returned.
        own = jnp.repeat(dstate, G, 1) * (jnp.arange(G * dstate.shape[1]) % G == 0)[:, None, None]
        gradients = _backward_pass(a_query(inputs, G), residuals, do, own, options, added)
        gradients = _over_queries(gradients, G)
    if options.shared_decay or form(inputs.log_decay) == "head":
        gradients = gradients._replace(log_decay=gradient_of_decays(inputs, do, dstate, options))
    return gradients


def queries(inputs: Inputs) -> int:
    """Heads of q that read one state."""
    return inputs.q.shape[2] // inputs.k.shape[2]


def a_query(inputs: Inputs, G: int) -> Inputs:
    """With a state for each head of q: G alike, which costs their bytes and keeps one kind of walk."""
    return inputs._replace(**{name: jnp.repeat(x, G, axis) for name, x, axis in _of_states(inputs)})


def _over_queries(gradients: Inputs, G: int) -> Inputs:
    """Sums, in float32, over the states that were made of one."""

    def total(x, axis):
        parts = x.reshape(*x.shape[:axis], -1, G, *x.shape[axis + 1 :])
        return parts.sum(axis + 1, dtype=jnp.float32).astype(x.dtype)

    return gradients._replace(**{name: total(x, axis) for name, x, axis in _of_states(gradients)})


def _of_states(inputs: Inputs):
    """(name, array, axis of the K heads) of what a state has for itself."""
    axes = dict(k=2, v=2, log_decay=0 if form(inputs.log_decay) == "head" else 2, beta=2, state=1)
    named = ((name, getattr(inputs, name), axis) for name, axis in axes.items())
    return [x for x in named if x[1] is not None]


def _forward_pass(inputs: Inputs, options: Options, added):
    if options.kind == "delta":
        from blockjax.kernels.linear_attention.hopper import delta

        return delta.forward_pass(inputs, options)
    from blockjax.kernels.linear_attention.hopper import pieces, sweep

    plan = pieces.Plan.of(inputs)
    q, k, v = (whole(x) for x in inputs[:3])
    entries = plan.entries(k, v, plan.initial(inputs), added=added)
    call = sweep.Sweep(plan.cut, documents=plan.documents, read=options.scale, pair=options.scale)
    o, state, _ = sweep.sweep(call, sweep.Operands(q, k, v, entries, plan.decays(False)))
    return (o[:, : inputs.q.shape[1]], state), (entries, state)


def _backward_pass(inputs: Inputs, residuals, do, dstate, options: Options, added) -> Inputs:
    if options.kind == "delta":
        from blockjax.kernels.linear_attention.hopper import delta

        return delta.backward_pass(inputs, residuals, do, dstate, options)
    from blockjax.kernels.linear_attention.hopper import pieces
    from blockjax.kernels.linear_attention.hopper.sweep import Operands, Sweep, sweep

    (entries, last), T, scale = residuals, inputs.q.shape[1], options.scale
    plan = pieces.Plan.of(inputs)
    q, k, v, do = (whole(x) for x in (*inputs[:3], do))
    # Where tokens share it the gradient is not made of sums.
    a_token = form(inputs.log_decay) == "token" and not options.shared_decay
    kept = dict(cut=plan.cut, documents=plan.documents)

    call = Sweep(**kept, read=scale, pair=scale)
    x = q if a_token else None
    dq, _, reads = sweep(call, Operands(do, v, k, _transposed(entries), plan.decays(False), x))

    back = plan.entries(q, do, dstate, reverse=True, write=scale, added=added)
    call = Sweep(**kept, reverse=True, pair=scale, write=scale)
    dv, dinitial, _ = sweep(call, Operands(k, q, do, back, plan.decays(True)))
    x = k if a_token else None
    dk, _, writes = sweep(call, Operands(v, do, q, _transposed(back), plan.decays(True), x))

    dlog = None
    if a_token:
        dlog = plan.decay_gradient(reads - writes, entries, last, back)[:, :T]
    dstate = None if inputs.state is None else dinitial
    return Inputs(dq[:, :T], dk[:, :T], dv[:, :T], dlog, None, None, dstate)


def _walk(inputs: Inputs):
    """For decays a channel: how states are walked over, and the most tokens of a span."""
    from blockjax.kernels.linear_attention.hopper.walk import walk

    B, _, K, _ = inputs.k.shape
    return functools.partial(walk, dtype=inputs.q.dtype), max(TILE, SPAN_TOKENS // (B * K))


def gradient_of_decays(inputs: Inputs, do, dstate, options: Options):
    """Of log-decays that all tokens share, by XLA; dropped by the compiler where nobody asks for it.

    The sum over tokens of what the kernels make of rounded products would cancel to less than its rounding.
    """
    _, residuals = xla.forward_pass(inputs, options)
    return xla.backward_pass(inputs, residuals, do, dstate, options).log_decay


def _transposed(states: jax.Array) -> jax.Array:
    return states.swapaxes(-1, -2)


def whole(x):
    """Padded along the tokens, which is a copy, where the copy engine cannot take them as they are."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % COPY_ROWS), (0, 0), (0, 0)))
