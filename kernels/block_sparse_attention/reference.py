"""The oracle: dense attention under the mask, written as the definition. Needs memory for T x S."""

import jax
import jax.numpy as jnp
from blockjax.kernels.block_sparse_attention.spec import Inputs, Options, Spec


def supports(spec: Spec) -> str | None:
    return None


def default_tiles(spec: Spec) -> None:
    """There is nothing to choose."""


def forward_pass(inputs: Inputs, options: Options):
    """`o` [B, T, N, Hv] in q's dtype and `lse` [B, N, T], computed in float32 (float64 stays float64).

    Ignores the promise that a tile is full and tests its predicates. Its gradient is JAX's own.
    """
    q, k, v = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (inputs.q, inputs.k, inputs.v))
    G = q.shape[2] // k.shape[2]
    k = jnp.repeat(k, G, axis=2)
    v = jnp.repeat(v, G, axis=2)
    pq, pk = positions(inputs)

    z = options.scale * jnp.einsum("BTNH,BSNH->BNTS", q, k)
    s = z if options.soft_cap is None else options.soft_cap * jnp.tanh(z / options.soft_cap)
    if inputs.slope is not None:
        distance = jnp.abs(pq[:, None, :, None] - pk[:, None, None, :])
        s = s - inputs.slope[:, None, None] * distance
    seen = visible(inputs)

    # A row that sees nothing has o = 0 and lse = -inf, without a NaN in its gradient.
    some = seen.any(-1, keepdims=True)
    s = jnp.where(seen, s, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(some, s.max(-1, keepdims=True), 0.0))
    p = jnp.where(seen, jnp.exp(jnp.where(seen, s - top, 0.0)), 0.0)
    total = jnp.where(some, p.sum(-1, keepdims=True), 1.0)
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)[..., 0]
    o = jnp.einsum("BNTS,BSNH->BTNH", p / total, v)
    return o.astype(inputs.q.dtype), lse


def visible(inputs: Inputs) -> jax.Array:
    """Which query sees which key, `[1 | B, 1 | N, T, S]` bool: the definition the backends must meet."""
    mask, N = inputs.mask, inputs.q.shape[2]
    pq, pk = positions(inputs)
    tags = jnp.asarray(mask.tags())
    if tags.shape[1] > 1:
        tags = jnp.repeat(tags, N // tags.shape[1], axis=1)
    tags = jnp.repeat(tags, mask.bq, axis=2)[:, :, : mask.T]
    tags = jnp.repeat(tags, mask.bk, axis=3)[..., : mask.S]
    seen = mask.visible(tags, pq[:, None, :, None], pk[:, None, None, :])
    if inputs.q_segment_ids is not None:
        ids_q = inputs.q_segment_ids[:, None, :, None]
        ids_k = inputs.kv_segment_ids[:, None, None, :]
        seen = seen & (ids_q == ids_k) & (ids_q >= 0)
    return seen


def positions(inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """Positions `[1 | B, T]` and `[1 | B, S]`: the given ones, else consecutive from the mask's offsets."""
    mask = inputs.mask
    if inputs.q_positions is not None:
        return inputs.q_positions, inputs.kv_positions
    return tuple(jnp.asarray(x)[None] for x in mask.positions())
