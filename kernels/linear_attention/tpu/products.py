"""Matrix products of the TPU kernels, and products with numbers per token."""

import jax.numpy as jnp
from jax import lax


def dot(a, b, i: int, j: int):
    """Contracts axis i of a with axis j of b, in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((i,), (j,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def exact(a, b, i: int, j: int, dtype):
    """`dot` of float32 matrices; to 16 bits, in three products of bfloat16, if that is the dtype."""
    if dtype == jnp.float32:
        return dot(a, b, i, j)
    (a, a_rest), (b, b_rest) = (_halves(x) for x in (a, b))
    return dot(a, b, i, j) + dot(a, b_rest, i, j) + dot(a_rest, b, i, j)


def _halves(x):
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def times(factors, x):
    """Each row of x [C, H] times its factor, [C, lanes]."""
    return factors[:, : x.shape[1]] * x


def row_sums(x):
    return jnp.sum(x, axis=1, keepdims=True)
