"""The oracle: softmax over stacked sources, written as the definition. Its gradients are JAX's own."""

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
    wide,
)


def supports(spec: Spec) -> str | None:
    return None


def read_forward(inputs: ReadInputs, options: ReadOptions):
    dtype = inputs.sources[0].dtype
    v = _heads(jnp.stack(inputs.sources), options.heads)  # [n, ..., h, d]
    logits = jnp.stack([_logits(v, w, options) for w in inputs.queries], axis=1)  # [n, R, ..., h]
    weights = jax.nn.softmax(logits, axis=0)
    o = jnp.sum(weights[..., None] * v[:, None], axis=0)
    o = o.reshape(*o.shape[:-2], -1).astype(dtype)
    lse = jax.nn.logsumexp(logits, axis=0)
    return Read(tuple(o) if options.unstacked else o, lse, logits), None


def join_forward(inputs: JoinInputs, options: JoinOptions):
    partial, update, o, lse, query, norm_gain = inputs
    total = partial if update is None else partial + update
    absent = lse == jnp.inf
    total = jnp.where(absent.any(-1, keepdims=True), 0, total)
    s, mean = _heads(total, options.heads), _heads(o, options.heads)
    logit = jnp.where(absent, -jnp.inf, _logits(s, query, options))
    # With nothing to merge with, o keeps all of the weight.
    pair = jnp.stack([jnp.where(absent, 0, lse), logit])
    weights = jax.nn.softmax(pair, axis=0)[..., None]
    h = weights[0] * mean + weights[1] * s
    h = h.reshape(*h.shape[:-2], -1)
    x = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + options.norm_eps) * norm_gain
    return Join(total, x.astype(o.dtype), logit), None


def _heads(x, heads: int):
    """[..., M] as [..., h, M / h], wide."""
    return x.astype(wide(x.dtype)).reshape(*x.shape[:-1], heads, -1)


def _logits(v, query, options):
    """Of sources [..., h, d] for a query [M]: [..., h]. The key is normalised over all heads."""
    r = jax.lax.rsqrt(jnp.mean(v * v, axis=(-2, -1)) + options.eps)
    return r[..., None] * jnp.sum(v * query.reshape(options.heads, -1), axis=-1)
