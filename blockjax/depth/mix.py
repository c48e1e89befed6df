"""The depth mix: softmax attention of one learned query per reader over earlier outputs, per token.

s_i = <w, v_i> / sqrt(mean(v_i^2) + eps), h = sum_i softmax_i(s) v_i (Attention Residuals,
arXiv:2603.15031, eqs. 2 to 4): keys are normalised sources, values the sources themselves. A mix over
some of the sources is a softmax partial (o, lse); `partials.merge` joins it with another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mix(NamedTuple):
    """The partials of R readers over some sources.

    Attributes:
      o: [R, B, T, M] in the sources' dtype.
      lse: [R, B, T] float32.
      logits: one [R, B, T] float32 a source.
    """

    o: jax.Array
    lse: jax.Array
    logits: tuple[jax.Array, ...]


def source_logits(source: jax.Array, queries: jax.Array, eps: float) -> jax.Array:
    """The logit of a source [B, T, M] for each of the queries [R, M]: [R, B, T], float32."""
    v = source.astype(jnp.promote_types(source.dtype, jnp.float32))
    rms = jax.lax.rsqrt(jnp.mean(v * v, axis=-1) + eps)
    return rms * jnp.einsum("BTM,RM->RBT", v, queries.astype(v.dtype))


def mix(sources: Sequence[jax.Array], queries: jax.Array, eps: float) -> Mix:
    """All queries of a depth block over its sources, each [B, T, M], in one pass."""
    logits = tuple(source_logits(v, queries, eps) for v in sources)
    lse = logits[0] if len(sources) == 1 else jax.nn.logsumexp(jnp.stack(logits), axis=0)
    # Elementwise, not a product of matrices: the number of sources is tiny.
    o = sum(jnp.exp(s - lse)[..., None] * v.astype(lse.dtype) for s, v in zip(logits, sources, strict=True))
    return Mix(o.astype(sources[0].dtype), lse, logits)
