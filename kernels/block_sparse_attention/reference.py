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
    v = _wide(inputs.v, inputs)
    s = scores(inputs, options)
    seen = visible(inputs)

    # A row that sees nothing has o = 0 and lse = -inf, without a NaN in its gradient.
    some = seen.any(-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(some, s.max(-1, keepdims=True), 0.0))
    p = jnp.where(seen, jnp.exp(jnp.where(seen, s - top, 0.0)), 0.0)
    total = jnp.where(some, p.sum(-1, keepdims=True), 1.0)
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)[..., 0]
    o = jnp.einsum("BNTS,BSNH->BTNH", p / total, v)
    return o.astype(inputs.q.dtype), lse


def scores(inputs: Inputs, options: Options) -> jax.Array:
    """[B, N, T, S], -inf where a query does not see a key."""
    q, k = _wide(inputs.q, inputs), _wide(inputs.k, inputs)
    z = options.scale * jnp.einsum("BTNH,BSNH->BNTS", q, k)
    s = z if options.soft_cap is None else options.soft_cap * jnp.tanh(z / options.soft_cap)
    if inputs.slope is not None:
        pq, pk = positions(inputs)
        distance = jnp.abs(pq[:, None, :, None] - pk[:, None, None, :])
        s = s - inputs.slope[:, None, None] * distance
    return jnp.where(visible(inputs), s, -jnp.inf)


def _wide(x, inputs: Inputs):
    """In float32 or wider, [B, T | S, N, H]."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.repeat(x, inputs.q.shape[2] // x.shape[2], axis=2)


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
