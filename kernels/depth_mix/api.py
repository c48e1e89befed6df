"""The public ops `depth_mix`, `depth_read` and `depth_join`: checks and dispatch."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from blockjax.kernels import dispatch
from blockjax.kernels.depth_mix import passes, reference, tpu, triton, xla
from blockjax.kernels.depth_mix.spec import (
    Join,
    JoinInputs,
    JoinOptions,
    Read,
    ReadInputs,
    ReadOptions,
    Spec,
    tokens,
    wide,
)
from blockjax.kernels.platforms import target
from jaxtyping import Array, Bool, Float

from blockjax.errors import UsageError

BACKENDS = {"tpu": tpu, "triton": triton, "xla": xla, "reference": reference}
"""Fastest first: `implementation=None` takes the first that supports the call."""


def depth_mix(
    sources: Sequence[Float[Array, "... M"]],
    query: Float[Array, " M"],
    *,
    gain: Float[Array, " M"] | None = None,
    heads: int = 1,
    eps: float = 1e-6,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "... M"] | tuple[Float[Array, "... M"], Float[Array, "... heads"]]:
    """Softmax attention of one learned query over n sources, for each token on its own.

    With `r_i = (mean_M v_i^2 + eps)^-1/2` and w the query, head by head over slices of M / heads:
    `s_i = r_i <w, v_i>`, `h = sum_i softmax_i(s) v_i`. Keys are normalised over the whole of M, values are
    the sources as they are. All is computed in float32 (float64 for float64 sources) and rounded once.

    Args:
        sources: n arrays of one shape and floating dtype, not stacked: each is read where it is, once.
        query: any floating dtype.
        gain: of the norm of keys; the same as multiplying the query by it.
        heads: a divisor of M. One softmax a head; the norm stays over the whole of M.
        return_lse: also return the log of the sum of exponentials, natural log.
        implementation: a name in `BACKENDS`, or None for the fastest that supports the call.

    Returns:
        `h` [..., M] in the sources' dtype, and with `return_lse` also `lse` [..., heads] float32. Of one
        source, h is that source bit for bit and the query's gradient exactly 0. Gradients in reverse mode for
        sources, query and gain through both outputs; equal from run to run, bit for bit.

    Raises:
        UsageError: shapes, dtypes or heads that do not fit, or a named implementation that cannot serve them.

    Source: Attention Residuals, arXiv:2603.15031, eqs. 2 to 4; heads: Multi-Head AttnRes, arXiv:2607.27230.
    """
    query = _floating("query", query)
    queries = (query if gain is None else query * _floating("gain", gain))[None]
    options = dict(heads=heads, eps=eps, implementation=implementation, unstacked=True)
    (h,), lse, _ = depth_read(sources, queries, **options)
    return (h, lse[0]) if return_lse else h


def depth_read(
    sources: Sequence[Float[Array, "... M"]],
    queries: Float[Array, "R M"],
    *,
    heads: int = 1,
    eps: float = 1e-6,
    unstacked: bool = False,
    implementation: str | None = None,
) -> Read:
    """What R queries read of the same n sources, each source read once: `depth_mix` for all of them.

    The first of two phases (arXiv:2603.15031, sec. 4): queries are parameters, so all sublayers of a depth
    block can ask its completed sources together. `(o, lse)` of each is a softmax partial, see
    `blockjax.partials`, which `depth_join` merges with the running sum of the block.

    Args:
        sources, heads, eps, implementation: as in `depth_mix`.
        queries: any floating dtype, gains multiplied in.
        unstacked: `o` as R arrays. Each then has a gradient of its own, where slices of a stack would add up
            padded ones; a stack is what a scan takes.

    Returns:
        `Read(o, lse, logits)`: `o` [R, ..., M] in the sources' dtype, or R arrays [..., M]; `lse`
        [R, ..., heads] and `logits` [n, R, ..., heads] float32. The weights are `exp(logits - lse)`; no
        gradient passes through logits.

    Raises:
        UsageError: as in `depth_mix`.
    """
    sources, queries = tuple(map(jnp.asarray, sources)), _floating("queries", queries)
    _check_sources(sources)
    M = sources[0].shape[-1]
    if queries.ndim != 2 or queries.shape[1] != M or not len(queries):
        raise UsageError(f"queries must be [R, M={M}] like sources {sources[0].shape}, got {queries.shape}.")
    _check_heads(heads, M)
    spec = _describe("read", sources[0], heads, n=len(sources), R=len(queries))
    inputs = ReadInputs(sources, queries.astype(wide(sources[0].dtype)))
    out = passes.read(_backend(spec, implementation), inputs, ReadOptions(heads, float(eps), unstacked))
    return out._replace(logits=jax.lax.stop_gradient(out.logits))


def depth_join(
    partial: Float[Array, "... M"],
    update: Float[Array, "... M"] | None,
    o: Float[Array, "... M"],
    lse: Float[Array, "... heads"],
    query: Float[Array, " M"],
    *,
    norm_gain: Float[Array, " M"],
    heads: int = 1,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    first: bool | Bool[Array, ""] = False,
    implementation: str | None = None,
) -> Join:
    """Adds to a running sum, merges it with what was read of completed blocks, normalises: one pass.

    With `s = partial + update` and its logit `l = r <w, s>` as in `depth_mix`, the merge of the softmax
    partials `(o, lse)` and `(s, l)` is `h = o + sigmoid(l - lse) (s - o)`, and
    `x = h / sqrt(mean_M h^2 + norm_eps) * norm_gain`. h is neither rounded nor written.

    Args:
        partial: what the depth block's sublayers wrote before the last one.
        update: what the last one wrote; None if it is in `partial` already.
        o, lse: one row of `depth_read`.
        query, heads, eps, implementation: as in `depth_mix`.
        norm_gain: of the RMSNorm behind the merge.
        first: nothing of the depth block is there yet, so h = o and the new running sum is 0, whatever
            `partial` and `update` hold: an absent source is left out, as one of zeros would take weight. A
            bool array for a scan, in which only the first step has none.

    Returns:
        `Join(partial, x, logit)`: s and x [..., M] in the dtype of `partial`, and l [..., heads] float32,
        -inf with `first`, without a gradient: `l - logaddexp(lse, l)` is the log of the weight of s.
        Gradients in reverse mode for all floating arguments; equal from run to run, bit for bit.

    Raises:
        UsageError: as in `depth_mix`.
    """
    partial, o, lse = (jnp.asarray(x) for x in (partial, o, lse))
    update = None if update is None else jnp.asarray(update)
    query, norm_gain = _floating("query", query), _floating("norm_gain", norm_gain)
    M, dtype = partial.shape[-1], wide(partial.dtype)
    _check_sources(tuple(x for x in (partial, update, o) if x is not None), "partial, update and o")
    _check_heads(heads, M)
    for name, x, shape in (
        ("query", query, (M,)),
        ("norm_gain", norm_gain, (M,)),
        ("lse", lse, (*partial.shape[:-1], heads)),
    ):
        if x.shape != shape:
            raise UsageError(f"{name} must be {shape} for a running sum {partial.shape}, got {x.shape}.")
    spec = _describe("join", partial, heads, update=update is not None)
    # A partial of infinite lse takes all of the weight.
    lse = lse.astype(dtype) if first is False else jnp.where(first, jnp.inf, lse.astype(dtype))
    inputs = JoinInputs(partial, update, o, lse, query.astype(dtype), norm_gain.astype(dtype))
    options = JoinOptions(heads, float(eps), float(norm_eps), first is not False)
    out = passes.join(_backend(spec, implementation), inputs, options)
    return out._replace(logit=jax.lax.stop_gradient(out.logit))


def choose(spec: Spec, implementation: str | None = None) -> str:
    """The name of the backend for this call; raises `UsageError` if a named one cannot serve it."""
    return dispatch.choose("depth_mix", BACKENDS, spec, implementation)


def _backend(spec: Spec, implementation: str | None):
    return BACKENDS[choose(spec, implementation)]


def _describe(op: str, x: jax.Array, heads: int, n: int = 1, R: int = 1, update: bool = False) -> Spec:
    sizes = dict(tokens=tokens(x.shape), M=x.shape[-1], heads=heads)
    return Spec(target(), x.dtype, op, n, R, **sizes, update=update)


def _floating(name: str, x) -> jax.Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UsageError(f"{name} must be floating, got {x.dtype} {x.shape}.")
    return x


def _check_sources(sources: tuple[jax.Array, ...], name: str = "sources") -> None:
    if not sources:
        raise UsageError("sources must hold at least one array [..., M], got none.")
    shapes, dtypes = ({getattr(x, what) for x in sources} for what in ("shape", "dtype"))
    if len(shapes) > 1 or not sources[0].ndim or not sources[0].shape[-1]:
        raise UsageError(f"{name} must have one shape [..., M], got {', '.join(map(str, sorted(shapes)))}.")
    if len(dtypes) > 1 or not jnp.issubdtype(sources[0].dtype, jnp.floating):
        raise UsageError(f"{name} need one floating dtype, got {', '.join(sorted(map(str, dtypes)))}.")


def _check_heads(heads: int, M: int) -> None:
    if not isinstance(heads, int) or heads < 1 or M % heads:
        raise UsageError(f"heads={heads} must be a whole number that divides M={M}.")
