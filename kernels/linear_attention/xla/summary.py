"""What a run of tokens does to the state, as an affine map, without its outputs.

Where a sequence is cut over devices each summarises its own run, the maps are composed, and each calls the
op on the state that enters. Likewise for gradients, from the last device to the first.

A backend may have a module of this name in its place, whose functions also return what its passes take as
`added`: here None, since these passes take nothing.
"""

import jax
import jax.numpy as jnp
from blockjax.kernels.linear_attention.spec import Inputs, Options, log_decays, wide
from blockjax.kernels.linear_attention.xla import Cut, chunks, precision
from jax import lax

from blockjax.affine import Affine


def forward(inputs: Inputs, options: Options) -> tuple[Affine, None]:
    """The map of the state, float32; `inputs.state` is not looked at."""
    if options.kind == "delta":
        return _delta(inputs, options), None
    with precision(inputs.q.dtype):
        g, dtype = log_decays(inputs), wide(inputs.q.dtype)
        last = None if inputs.documents is None else inputs.documents[:, -1:]
        after = jnp.pad(g, ((0, 0), (0, 1), (0, 0), (0, 0)))[:, 1:]
        leave = _where(inputs, last, jnp.exp(lax.cumsum(after, 1, reverse=True)))
        N = jnp.einsum("BTKi,BTKj->BKij", leave * inputs.k.astype(dtype), inputs.v.astype(dtype))
        M = jnp.exp(jnp.sum(g, axis=1))
        M = M if last is None else jnp.where((last == 0)[..., None], M, 0)
    return Affine(M[..., None], N), None


def backward(inputs: Inputs, do: jax.Array, options: Options) -> tuple[jax.Array, None]:
    """The gradient [B, K, Hk, Hv] of the state that enters, if nothing depends on the one that leaves."""
    if options.kind == "delta":
        return _delta_back(inputs, do, options), None
    with precision(inputs.q.dtype):
        dtype, (B, T, K, Hk) = wide(inputs.q.dtype), inputs.k.shape
        enter = _where(inputs, 0, jnp.exp(jnp.cumsum(log_decays(inputs), axis=1)))
        q = enter[..., None, :] * inputs.q.reshape(B, T, K, -1, Hk).astype(dtype)
        do = do.reshape(*q.shape[:-1], -1).astype(dtype)
        return options.scale * jnp.einsum("BTKGi,BTKGj->BKij", q, do), None


def _where(inputs: Inputs, document, weights: jax.Array) -> jax.Array:
    """Weights [B, T, K, 1 | Hk] where a token is of this document, else 0."""
    if inputs.documents is None:
        return weights
    return jnp.where((inputs.documents == document)[..., None, None], weights, 0)


def _delta(inputs: Inputs, options: Options) -> Affine:
    """The map of the state that all tokens together are, of the delta rule: of the state, and of a basis."""
    cut, Hk = Cut.of(inputs, options), inputs.k.shape[-1]

    def span(state, x):
        _, steps, _ = chunks.steps_of(x)
        seen = jnp.pad(steps.seen, [(0, 0)] * 5 + [(0, Hk)])
        return chunks.walk(steps._replace(seen=seen), state)[0], None

    with precision(inputs.q.dtype):
        state = jnp.zeros_like(cut.state(inputs))
        basis = jnp.broadcast_to(jnp.eye(Hk, dtype=state.dtype), (*state.shape[:-1], Hk))
        state, _ = lax.scan(span, jnp.concatenate([state, basis], -1), cut.chunks(inputs))
    return Affine(state[:, :, 0, :, -Hk:], state[:, :, 0, :, :-Hk])


def _delta_back(inputs: Inputs, do, options: Options) -> jax.Array:
    """The gradient of the state before all tokens, if nothing depends on the one after them."""
    cut = Cut.of(inputs, options)

    def span(dstate, xs):
        x, do = xs
        decays, _, T = chunks.steps_of(x)
        back, _ = chunks.steps_back(x, do, decays, T)
        return chunks.walk(back, dstate, reverse=True)[0], None

    with precision(inputs.q.dtype):
        xs = cut.chunks(inputs), cut.cut(do, heads=inputs.k.shape[2])
        return lax.scan(span, jnp.zeros_like(cut.state(inputs)), xs, reverse=True)[0][:, :, 0]
