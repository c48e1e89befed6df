"""The public op `linear_attention`: checks and dispatch."""

import jax
import jax.numpy as jnp
from blockjax.kernels import dispatch
from blockjax.kernels.linear_attention import hopper, passes, reference, tpu, xla
from blockjax.kernels.linear_attention.spec import KINDS, Inputs, Options, Spec, floor, form, wide
from blockjax.kernels.platforms import target
from jax import lax
from jaxtyping import Array, Float, Int

from blockjax.errors import UsageError

BACKENDS = {"hopper": hopper, "tpu": tpu, "xla": xla, "reference": reference}
"""Fastest first: `implementation=None` takes the first that supports the call."""


def linear_attention(
    q: Float[Array, "B T N Hk"],
    k: Float[Array, "B T K Hk"],
    v: Float[Array, "B T K Hv"],
    *,
    log_decay: Float[Array, "..."] | None = None,
    beta: Float[Array, "B T K"] | None = None,
    kind: str = "decay",
    scale: float | None = None,
    initial_state: Float[Array, "B K Hk Hv"] | None = None,
    return_state: bool = False,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], Float[Array, "B K Hk Hv"]]:
    """Each token writes to a state [Hk, Hv] a head and reads it: linear in tokens, constant memory to decode.

    With S the state, g = `log_decay` and b = `beta` of a token:

        kind="decay":  S <- e^g S + k v^T
        kind="delta":  S <- e^g S;  S <- S + b k (v - S^T k)^T
        o = scale S^T q

    What this is, by form of `log_decay`. Decay: none, linear attention (Katharopoulos et al. 2020,
    arXiv:2006.16236); [K], Lightning Attention-2 (arXiv:2401.04658) and retention; [B, T, K], Mamba-2 SSD
    (arXiv:2405.21060) with q=C, k=B, v=x dt, and simple gated linear attention; [B, T, K, Hk], GLA
    (arXiv:2312.06635). Delta: none, DeltaNet (arXiv:2406.06484); [B, T, K], Gated DeltaNet
    (arXiv:2412.06464); [B, T, K, Hk], KDA (Kimi Linear, arXiv:2510.26692).

    Args:
        q, k, v: any floating dtype, all the same. N is a multiple of K: query n reads the state of head
            n // (N / K). q and k may also have fewer heads than v, a divisor of K: they are then shared by
            consecutive states. Nothing is normalised here.
        log_decay: natural log of the decay of the state before the token's write, at most 0, -inf allowed.
        beta: how much of the old value is replaced; in [0, 1], or up to 2 for negative eigenvalues. Only for
            kind "delta"; default 1.
        scale: default `Hk ** -0.5`. Published variants disagree: Lightning and Mamba-2 use 1.
        initial_state: float32, before the first token; default zeros.
        return_state: also return the state after the last token.
        segment_ids: where they change the state is cut: the next document starts from zeros. The first
            document continues `initial_state`. Tokens of negative id are padding: they neither write, decay
            nor cut, and their o is 0.
        chunk_size: tokens that are worked on at once, a power of two; default the backend's own.
        implementation: a name in `BACKENDS`, or None for the fastest that supports the call.

    Returns:
        `o` [B, T, N, Hv] in q's dtype, and with `return_state` also the state [B, K, Hk, Hv] in float32
        (float64 for float64 q), whose chain is never rounded to less. Any T; calls on parts of a sequence
        that pass the state on give what one call gives. Reverse-mode gradients for all floating arguments
        through both outputs; equal from run to run, bit for bit.

    Raises:
        UsageError: shapes, dtypes or options that do not fit, or a named implementation that cannot
            serve them.
    """
    inputs = checked(q, k, v, log_decay, beta, kind, initial_state, segment_ids)
    backend, options = select(inputs, kind, scale, chunk_size, implementation, form(log_decay) == "head")
    o, state = passes.run(backend, inputs, options)
    return (o, state) if return_state else o


def checked(q, k, v, log_decay, beta, kind, initial_state, segment_ids) -> Inputs:
    """The arrays of a call as a backend receives them; raises `UsageError`."""
    q, k, v = map(jnp.asarray, (q, k, v))
    _check_shapes(q, k, v)
    if kind not in KINDS:
        raise UsageError(f"kind={kind!r} must be one of {', '.join(KINDS)}.")
    if kind == "decay" and beta is not None:
        raise UsageError('beta is for kind="delta"; with kind="decay" multiply v by it.')
    (B, T, K, Hv), Hk, dtype = v.shape, k.shape[-1], wide(q.dtype)
    q, k = (_shared(x, K) for x in (q, k))
    if log_decay is not None:
        shapes = (K,), (B, T, K), (B, T, K, Hk)
        log_decay = _floating("log_decay", log_decay, dtype, *shapes)
        log_decay = jnp.where(log_decay < floor(dtype), floor(dtype), log_decay)
    if beta is not None:
        beta = _floating("beta", beta, dtype, (B, T, K))
    elif kind == "delta":
        beta = jnp.ones((B, T, K), dtype)
    if initial_state is not None:
        initial_state = _floating("initial_state", initial_state, dtype, (B, K, Hk, Hv))
    inputs = Inputs(q, k, v, log_decay, beta, None, initial_state)
    if segment_ids is None:
        return inputs
    ids = checked_ids(segment_ids, B, T)
    return without_padding(inputs._replace(documents=count_documents(ids)), ids >= 0)


def checked_ids(segment_ids, B: int, T: int) -> jax.Array:
    """[B, T] int32."""
    ids = jnp.asarray(segment_ids)
    if ids.shape != (B, T) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise UsageError(f"segment_ids must be integers [{B}, {T}], got {ids.dtype} {ids.shape}.")
    return ids.astype(jnp.int32)


def count_documents(segment_ids: jax.Array) -> jax.Array:
    """[B, T] int32: how many documents started since the first one; padding belongs to the last of them."""

    def later(a, b):
        return jnp.where(b < 0, a, b)

    last = lax.associative_scan(later, segment_ids, axis=1)
    before = jnp.concatenate([last[:, :1], last[:, :-1]], axis=1)
    # After leading padding the first document starts nothing: it continues the initial state.
    return jnp.cumsum((last != before) & (before >= 0), axis=1, dtype=jnp.int32)


def without_padding(inputs: Inputs, real: jax.Array) -> Inputs:
    """With zeros where a token is not `real` [B, T]: it writes and reads nothing, NaN there is not read."""

    def keep(x):
        return None if x is None else jnp.where(real.reshape(*real.shape, *(1,) * (x.ndim - 2)), x, 0)

    log_decay = inputs.log_decay
    if form(log_decay) == "head":
        log_decay = jnp.broadcast_to(log_decay, inputs.k.shape[:3])
    q, k, v, log_decay, beta = map(keep, (*inputs[:3], log_decay, inputs.beta))
    return inputs._replace(q=q, k=k, v=v, log_decay=log_decay, beta=beta)


def select(
    inputs: Inputs,
    kind: str,
    scale: float | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
    shared_decay: bool = False,
):
    """The backend for a call, and its options; raises `UsageError` if a named one cannot serve it."""
    if scale is not None and not isinstance(scale, int | float):
        raise UsageError(f"scale must be a Python number, got {type(scale).__name__}; multiply q instead.")
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1 or chunk & (chunk - 1)):
        raise UsageError(f"chunk_size={chunk} must be a power of two.")
    (B, T, N, Hk), (K, Hv) = inputs.q.shape, inputs.v.shape[2:]
    spec = Spec(
        target(),
        inputs.q.dtype,
        kind,
        form(inputs.log_decay),
        **dict(B=B, T=T, N=N, K=K, Hk=Hk, Hv=Hv),
        documents=inputs.documents is not None,
        chunk=chunk,
    )
    options = Options(kind, Hk**-0.5 if scale is None else scale, chunk, shared_decay)
    return BACKENDS[choose(spec, implementation)], options


def choose(spec: Spec, implementation: str | None = None) -> str:
    """The name of the backend for this call; raises `UsageError` if a named one cannot serve it."""
    return dispatch.choose("linear_attention", BACKENDS, spec, implementation)


def _shared(x: jax.Array, K: int) -> jax.Array:
    """With heads repeated up to K."""
    return jnp.repeat(x, K // x.shape[2], axis=2) if x.shape[2] < K else x


def _check_shapes(q, k, v):
    if any(x.ndim != 4 for x in (q, k, v)):
        raise UsageError(f"q, k and v need 4 axes [B, T, N, H], got {q.shape}, {k.shape} and {v.shape}.")
    if not (q.shape[:2] == k.shape[:2] == v.shape[:2]):
        raise UsageError(f"q {q.shape}, k {k.shape} and v {v.shape} must agree in [B, T].")
    if q.shape[3] != k.shape[3]:
        raise UsageError(f"q {q.shape} and k {k.shape} must agree in head size.")
    N, Nk, K = (x.shape[2] for x in (q, k, v))
    if 0 in v.shape or 0 in q.shape:
        raise UsageError(f"q {q.shape} and v {v.shape} must hold at least one token, head and channel.")
    if K % Nk or (N % K and K % N):
        raise UsageError(
            f"v {v.shape} has {K} heads: k {k.shape} needs a divisor, q {q.shape} a multiple or a divisor."
        )
    if not (q.dtype == k.dtype == v.dtype) or not jnp.issubdtype(q.dtype, jnp.floating):
        raise UsageError(f"q, k and v need one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}.")


def _floating(name: str, x, dtype, *shapes: tuple[int, ...]) -> jax.Array:
    x = jnp.asarray(x)
    if x.shape not in shapes or not jnp.issubdtype(x.dtype, jnp.floating):
        wanted = " or ".join(map(str, map(list, shapes)))
        raise UsageError(f"{name} must be floating {wanted}, got {x.dtype} {x.shape}.")
    return x.astype(dtype)
