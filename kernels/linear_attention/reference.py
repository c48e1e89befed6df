"""The oracle: the recurrence token by token, as it is defined in `spec.py`. Its gradients are JAX's own."""

import jax
import jax.numpy as jnp
from blockjax.kernels.linear_attention.spec import Inputs, Options, Spec, form, wide
from blockjax.kernels.platforms import vary, varying_axes
from jax import lax


def supports(spec: Spec) -> str | None:
    return None


def forward_pass(inputs: Inputs, options: Options):
    B, T, K, Hk = inputs.k.shape
    dtype = wide(inputs.q.dtype)
    q = inputs.q.reshape(B, T, K, -1, Hk).astype(dtype)
    k, v = inputs.k.astype(dtype), inputs.v.astype(dtype)
    log_decay = jnp.zeros((K,), dtype) if inputs.log_decay is None else inputs.log_decay
    if form(log_decay) == "head":
        log_decay = jnp.broadcast_to(log_decay, (B, T, K))
    if form(log_decay) == "token":
        log_decay = log_decay[..., None]
    documents = jnp.zeros((B, T), jnp.int32) if inputs.documents is None else inputs.documents
    before = jnp.concatenate([jnp.zeros((B, 1), jnp.int32), documents[:, :-1]], axis=1)
    beta = jnp.ones((B, T, K), dtype) if inputs.beta is None else inputs.beta
    zeros = vary(jnp.zeros((B, K, Hk, v.shape[-1]), dtype), varying_axes(inputs))
    state = zeros if inputs.state is None else inputs.state

    def token(S, x):
        q, k, v, log_decay, beta, starts = x
        S = jnp.where(starts[:, None, None, None], 0, S)
        S = jnp.exp(log_decay)[..., None] * S
        if options.kind == "delta":
            v = beta[..., None] * (v - jnp.einsum("BKij,BKi->BKj", S, k, precision="highest"))
        S = S + k[..., None] * v[..., None, :]
        return S, options.scale * jnp.einsum("BKij,BKGi->BKGj", S, q, precision="highest")

    xs = q, k, v, log_decay, beta, documents != before
    state, o = lax.scan(token, state, jax.tree.map(lambda x: x.swapaxes(0, 1), xs))
    o = o.swapaxes(0, 1).reshape(B, T, -1, v.shape[-1])
    return (o.astype(inputs.q.dtype), state), None
