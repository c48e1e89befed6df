"""Plain XLA: runs anywhere, also where M is cut over devices.

Arrays keep their axes of tokens, so that the compiler may cut each of them. Sums over M are the only thing
that devices which share out M have to tell each other.
"""

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
)

from blockjax.partials import wide


def supports(spec: Spec) -> str | None:
    return None


def read_forward(inputs: ReadInputs, options: ReadOptions):
    sources, queries = inputs
    w = _split(queries, options.heads)
    norms, logits = [], []
    for source in sources:
        v = wide(source)
        norms.append(jax.lax.rsqrt(jnp.mean(v * v, axis=-1) + options.eps))
        logits.append(norms[-1][..., None] * _products(_split(v, options.heads), w))
    logits, norms = jnp.stack(logits), jnp.stack(norms)
    top = logits.max(0)
    lse = top + jnp.log(jnp.exp(logits - top).sum(0))
    weights = jnp.exp(logits - lse)
    rows = weights.swapaxes(0, 1) if options.unstacked else [weights]
    means = [_mean(p, sources, options.heads) for p in rows]
    return Read(tuple(means) if options.unstacked else means[0], lse, logits), norms


def read_backward(inputs: ReadInputs, read: Read, norms, do, dlse, options: ReadOptions) -> ReadInputs:
    """With c[i, r] = <do_r, v_i>: ds = p (c - sum_i p c + dlse), as o is the mean of the sources.

    dv_i = sum_r p do_r + r_i sum_r ds w_r - v_i r_i^2 / M sum_r ds s; dw_r = sum_i ds r_i v_i of all tokens.
    """
    sources, queries = inputs
    w, M = _split(queries, options.heads), queries.shape[-1]
    weights = jnp.exp(read.logits - read.lse)  # [n, R, ..., h]
    # A stack is worked on at once: the program does not grow with R.
    do = [_split(wide(d), options.heads) for d in (do if options.unstacked else [do])]
    whole = jnp.stack if options.unstacked else lambda rows: rows[0]
    c = jnp.stack([whole([jnp.sum(d * _split(wide(v), options.heads), -1) for d in do]) for v in sources])
    ds = weights * (c - jnp.sum(weights * c, 0) + dlse)
    gradients, dw = [], jnp.zeros_like(w)
    for v, norm, s, p, d in zip(sources, norms, read.logits, weights, ds, strict=True):
        v = _split(wide(v), options.heads)
        scaled = norm[..., None] * d  # [R, ..., h]
        back = norm * norm / M * jnp.sum(d * s, axis=(0, -1))
        mixed = sum(q[..., None] * d for q, d in zip(p if options.unstacked else [p], do, strict=True))
        mixed = mixed if options.unstacked else mixed.sum(0)
        dv = (
            mixed + jnp.einsum("R...h,Rhd->...hd", scaled, w, precision="highest") - back[..., None, None] * v
        )
        dw += jnp.einsum("R...h,...hd->Rhd", scaled, v, precision="highest")
        gradients.append(_whole(dv).astype(sources[0].dtype))
    return ReadInputs(tuple(gradients), dw.reshape(queries.shape))


def join_forward(inputs: JoinInputs, options: JoinOptions):
    partial, update, o, lse, query, norm_gain = inputs
    total = partial if update is None else partial + update
    if options.first:
        total = jnp.where(lse[..., :1] == jnp.inf, 0, total)
    s = wide(total)
    norm = jax.lax.rsqrt(jnp.mean(s * s, axis=-1) + options.eps)
    logit = norm[..., None] * _products(_split(s, options.heads), _split(query[None], options.heads))[0]
    h = _merged(s, wide(o), logit, lse, options.heads)
    rms = jax.lax.rsqrt(jnp.mean(h * h, axis=-1) + options.norm_eps)
    x = (rms[..., None] * h * norm_gain).astype(o.dtype)
    return Join(total, x, jnp.where(lse == jnp.inf, -jnp.inf, logit)), (norm, rms)


def join_backward(inputs: JoinInputs, join: Join, norms, dpartial, dx, options: JoinOptions) -> JoinInputs:
    """The norm's backward gives dh; with g the weight of the running sum, a = g (1 - g) <dh, s - o>:

    do = (1 - g) dh, dlse = -a, ds = g dh + a r w - s r^2 / M sum_h a logit, dw = sum over tokens of a r s.
    """
    _, update, o, lse, query, norm_gain = inputs
    heads, M, (norm, rms) = options.heads, query.shape[-1], norms
    s, mean, dx = wide(join.partial), wide(o), wide(dx)
    g = jax.nn.sigmoid(join.logit - lse)
    h = _merged(s, mean, join.logit, lse, heads) * rms[..., None]  # normalised
    dy = dx * norm_gain
    dh = rms[..., None] * (dy - h * jnp.mean(dy * h, axis=-1, keepdims=True))
    tokens = tuple(range(dx.ndim - 1))
    dgain = jnp.sum(dx * h, axis=tokens)

    a = g * (1 - g) * jnp.sum(_split(dh * (s - mean), heads), -1)  # [..., h]
    logit = jnp.where(lse == jnp.inf, 0, join.logit)
    back = norm * norm / M * jnp.sum(a * logit, -1)
    scaled = norm[..., None] * a
    weighted = g[..., None] * _split(dh, heads)
    ds = _whole(weighted + scaled[..., None] * _split(query, heads)) - back[..., None] * s + wide(dpartial)
    ds = jnp.where(lse[..., :1] == jnp.inf, 0, ds).astype(o.dtype)
    do = _whole(_split(dh, heads) - weighted).astype(o.dtype)
    dquery = jnp.sum(scaled[..., None] * _split(s, heads), axis=tokens).reshape(M)
    return JoinInputs(ds, None if update is None else ds, do, -a, dquery, dgain)


def _merged(s, mean, logit, lse, heads: int):
    """mean + g (s - mean), wide [..., M]."""
    g = jax.nn.sigmoid(logit - lse)[..., None]
    return _whole(_split(mean, heads) + g * _split(s - mean, heads))


def _mean(weights, sources, heads: int):
    """Of n sources [..., M] with weights n x [..., h] or n x [R, ..., h]. Elementwise: n is tiny."""
    parts = (p[..., None] * _split(wide(v), heads) for p, v in zip(weights, sources, strict=True))
    return _whole(sum(parts)).astype(sources[0].dtype)


def _products(v, w):
    """Of sources [..., h, d] with queries [R, h, d]: [R, ..., h]."""
    return jnp.einsum("...hd,Rhd->R...h", v, w, precision="highest")


def _split(x, heads: int):
    """[..., M] as [..., h, M / h]."""
    return x.reshape(*x.shape[:-1], heads, -1)


def _whole(x):
    return x.reshape(*x.shape[:-2], -1)
