"""What a run of tokens does to the state, as an affine map, without its outputs.

Where a sequence is cut over devices each summarises its own run, the maps are composed, and each calls the
op on the state that enters. Likewise for gradients, from the last device to the first.
"""

import jax
import jax.numpy as jnp
from blockjax.kernels.linear_attention import xla
from blockjax.kernels.linear_attention.spec import Inputs, Options, log_decays, wide

from blockjax.affine import Affine


def forward(inputs: Inputs, options: Options) -> Affine:
    """The map of the state, float32; `inputs.state` is not looked at."""
    if options.kind == "delta":
        return xla.summary(inputs, options)
    with xla.precision(inputs.q.dtype):
        g, dtype = log_decays(inputs), wide(inputs.q.dtype)
        last = None if inputs.documents is None else inputs.documents[:, -1:]
        after = jnp.pad(g, ((0, 0), (0, 1), (0, 0), (0, 0)))[:, 1:]
        leave = _where(inputs, last, jnp.exp(jax.lax.cumsum(after, 1, reverse=True)))
        N = jnp.einsum("BTKi,BTKj->BKij", leave * inputs.k.astype(dtype), inputs.v.astype(dtype))
        M = jnp.exp(jnp.sum(g, axis=1))
        M = M if last is None else jnp.where((last == 0)[..., None], M, 0)
    return Affine(M[..., None], N)


def backward(inputs: Inputs, do: jax.Array, options: Options) -> jax.Array:
    """The gradient [B, K, Hk, Hv] of the state that enters, if nothing depends on the one that leaves."""
    if options.kind == "delta":
        return xla.summary_back(inputs, do, options)
    with xla.precision(inputs.q.dtype):
        dtype, (B, T, K, Hk) = wide(inputs.q.dtype), inputs.k.shape
        enter = _where(inputs, 0, jnp.exp(jnp.cumsum(log_decays(inputs), axis=1)))
        q = enter[..., None, :] * inputs.q.reshape(B, T, K, -1, Hk).astype(dtype)
        do = do.reshape(*q.shape[:-1], -1).astype(dtype)
        return options.scale * jnp.einsum("BTKGi,BTKGj->BKij", q, do)


def _where(inputs: Inputs, document, weights: jax.Array) -> jax.Array:
    """Weights [B, T, K, 1 | Hk] where a token is of this document, else 0."""
    if inputs.documents is None:
        return weights
    return jnp.where((inputs.documents == document)[..., None, None], weights, 0)
