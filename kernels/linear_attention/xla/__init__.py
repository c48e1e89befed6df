"""Plain XLA: runs anywhere. Chunks within spans: a scan over spans, kept in memory only where they begin.

Everything is computed in float32 (float64 stays float64). Formulas: `chunks.py`.
"""

import jax
import jax.numpy as jnp
from blockjax.kernels.linear_attention.spec import Inputs, Options, Spec, form, log_decays, wide
from blockjax.kernels.linear_attention.xla import chunks
from blockjax.kernels.linear_attention.xla.chunks import Chunks, Walk
from blockjax.kernels.platforms import vary, varying_axes
from jax import lax

CHUNK = 64
SPAN = 1024
"""Tokens of a span, at most: the backward pass recomputes the states within."""
LONGEST = 512
"""Tokens of a chunk, at most: see `running_sums`."""


def supports(spec: Spec) -> str | None:
    if spec.chunk is not None and spec.chunk > LONGEST:
        return f"chunks have at most {LONGEST} tokens, not {spec.chunk}"
    return None


def forward_pass(inputs: Inputs, options: Options, walk: Walk = chunks.walk, span: int = SPAN):
    """The residuals are the states [spans, B, K, 1, Hk, Hv] before each span of at most `span` tokens."""
    cut = Cut.of(inputs, options, span)

    def step(state, x):
        o, after = chunks.forward(x, state, walk)
        return after, (o, state)

    with precision(inputs.q.dtype):
        state, (o, entries) = lax.scan(step, cut.state(inputs), cut.chunks(inputs))
    return (cut.tokens(o).astype(inputs.q.dtype), state[:, :, 0]), entries


def backward_pass(
    inputs: Inputs, entries, do, dstate, options: Options, walk: Walk = chunks.walk, span: int = SPAN
) -> Inputs:
    cut = Cut.of(inputs, options, span)

    def step(dstate, xs):
        x, state, do = xs
        gradients, dstate = chunks.backward(x, state, do, dstate, walk)
        return dstate, gradients

    with precision(inputs.q.dtype):
        xs = cut.chunks(inputs), entries, cut.cut(do, heads=inputs.k.shape[2])
        dstate, gradients = lax.scan(step, dstate[:, :, None], xs, reverse=True)
    return cut.gradients(inputs, gradients, dstate[:, :, 0])


def precision(dtype):
    """Products of what was bfloat16 need not be exact; the states' digits count."""
    return jax.default_matmul_precision("high" if dtype.itemsize < 4 else "highest")


class Cut:
    """How T tokens are cut into spans of n chunks of C tokens, padded with zeros."""

    def __init__(self, T: int, C: int, n: int, scale: float, dtype):
        self.T, self.C, self.n, self.scale, self.dtype = T, C, n, scale, dtype
        self.spans = -(-T // (C * n))

    @classmethod
    def of(cls, inputs: Inputs, options: Options, span: int = SPAN) -> "Cut":
        T = inputs.q.shape[1]
        C = options.chunk or CHUNK
        C = min(C, 1 << (T - 1).bit_length())
        count = -(-T // C)
        spans = -(-count * C // max(span, C))
        return cls(T, C, -(-count // spans), options.scale, inputs.q.dtype)

    def cut(self, x: jax.Array, heads: int) -> jax.Array:
        """[B, T, heads * G, H] as [spans, n, B, heads, G, C, H], wide."""
        B, T, _, H = x.shape
        x = jnp.pad(x, ((0, 0), (0, self.padded - T), (0, 0), (0, 0))).astype(wide(x.dtype))
        x = x.reshape(B, self.spans, self.n, self.C, heads, -1, H)
        return x.transpose(1, 2, 0, 4, 5, 3, 6)

    def tokens(self, x: jax.Array) -> jax.Array:
        """The inverse of `cut`."""
        x = x.transpose(2, 0, 1, 5, 3, 4, 6)
        return x.reshape(x.shape[0], self.padded, -1, x.shape[-1])[:, : self.T]

    @property
    def padded(self) -> int:
        return self.spans * self.n * self.C

    def chunks(self, inputs: Inputs) -> Chunks:
        K = inputs.k.shape[2]
        q, k, v = (self.cut(x, K) for x in inputs[:3])
        beta = None if inputs.beta is None else self.cut(inputs.beta[..., None], K)
        documents = before = None
        if inputs.documents is not None:
            documents = jnp.pad(inputs.documents, ((0, 0), (0, self.padded - self.T)), mode="edge")
            documents = documents.reshape(-1, self.spans, self.n, 1, 1, self.C)
            documents = documents.transpose(1, 2, 0, 3, 4, 5)
            last = documents[..., -1:].reshape(-1, *documents.shape[2:5], 1)
            before = jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]]).reshape(*documents.shape[:5], 1)
        return Chunks(q * self.scale, k, v, self.cut(log_decays(inputs), K), beta, documents, before)

    def state(self, inputs: Inputs) -> jax.Array:
        """[B, K, 1, Hk, Hv]."""
        state = inputs.state
        if state is None:
            (B, _, K, Hk), Hv = inputs.k.shape, inputs.v.shape[-1]
            state = vary(jnp.zeros((B, K, Hk, Hv), wide(self.dtype)), varying_axes(inputs))
        return state[:, :, None]

    def gradients(self, inputs: Inputs, x: Chunks, dstate: jax.Array) -> Inputs:
        dq, dk, dv = self.tokens(x.q * self.scale), self.tokens(x.k), self.tokens(x.v)
        dq, dk, dv = (d.astype(self.dtype) for d in (dq, dk, dv))
        dlog = dbeta = None
        if inputs.log_decay is not None:
            dlog = self.tokens(x.log_decay)
            dlog = dlog if form(inputs.log_decay) == "channel" else dlog[..., 0]
            dlog = dlog.sum((0, 1)) if form(inputs.log_decay) == "head" else dlog
        if inputs.beta is not None:
            dbeta = self.tokens(x.beta)[..., 0]
        return Inputs(dq, dk, dv, dlog, dbeta, None, None if inputs.state is None else dstate)
