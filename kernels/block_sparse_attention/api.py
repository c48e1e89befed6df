"""The public op `block_sparse_attention`: checks, dispatch, sinks."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from blockjax.kernels import dispatch
from blockjax.kernels.block_sparse_attention import hopper, reference, tpu, xla
from blockjax.kernels.block_sparse_attention.passes import attend
from blockjax.kernels.block_sparse_attention.spec import Inputs, Options, Spec, Tiles
from blockjax.kernels.block_sparse_attention.tuning import choose_tiles
from blockjax.kernels.platforms import target
from jaxtyping import Array, Float, Int

from blockjax import partials
from blockjax.errors import UsageError
from blockjax.masks import BlockMask, Ranges

BACKENDS = {"hopper": hopper, "tpu": tpu, "xla": xla, "reference": reference}
"""Fastest first: `implementation=None` takes the first that supports the call."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DistanceBias:
    """`-slope * |pos_q - pos_k|` added to the scores: the soft form of locality, differentiable in `slope`.

    `slope` is [N], one per query head. Source: ALiBi, Press et al. 2022, arXiv:2108.12409.
    """

    slope: Float[Array, " N"]


def block_sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    mask: BlockMask,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    q_positions: Int[Array, "B T"] | Int[Array, " T"] | None = None,
    kv_positions: Int[Array, "B S"] | Int[Array, " S"] | None = None,
    bias: DistanceBias | None = None,
    sinks: Float[Array, " N"] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    config: Tiles | None = None,
) -> Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """Attention in which each block of queries visits only the key blocks that `mask` lists.

    Query i sees key j when their tile is listed, the mask's predicate holds for their positions, and their
    segment ids are equal and not negative. Scores are `s = cap(scale * q k) - slope * distance` with
    `cap(z) = soft_cap * tanh(z / soft_cap)`. Time and memory are linear in the listed tiles. A row that sees
    nothing has o = 0, lse = -inf and zero gradients; what is not listed is not multiplied.

    Args:
        q, k, v: any floating dtype, all the same; N is a multiple of K. Products accumulate in float32.
        mask: for T query and S key tokens; lists for 1 or B batch entries and 1, K or N heads.
        scale: default `H ** -0.5`.
        soft_cap: bound on the scores before the bias.
        q_segment_ids, kv_segment_ids: integers; for self-attention the first is enough.
        q_positions, kv_positions: of each token, instead of consecutive ones from the mask's offsets. The
            mask still says which tiles are visited; the predicate is then tested in each of them.
        bias: see `DistanceBias`.
        sinks: one extra score a head that takes weight and gives no value: merged as the partial
            `(0, sink)`, once. Source: Xiao et al. 2024, arXiv:2309.17453, with learned values.
        return_lse: also return the log of the sum of exponentials, float32, natural log, sinks included.
        implementation: a name in `BACKENDS`, or None for the fastest that supports the call.
        config: tiles of each kernel, instead of tuned ones or the backend's own; see `tuning.py`.

    Returns:
        `o` [B, T, N, Hv] in q's dtype, and with `return_lse` also `lse` [B, N, T]. Reverse-mode gradients for
        q, k, v, `bias.slope` and `sinks`, through both outputs; equal from run to run, bit for bit.

    Raises:
        UsageError: shapes, dtypes or options that do not fit, or a named implementation that cannot
            serve them.
    """
    inputs, sinks = checked(
        q, k, v, mask, q_segment_ids, kv_segment_ids, q_positions, kv_positions, bias, sinks
    )
    backend, options = select(inputs, scale, soft_cap, implementation, config)
    call = functools.partial(attend, backend) if hasattr(backend, "backward_pass") else backend.forward_pass
    o, lse = call(inputs, options)
    if sinks is not None:
        o, lse = merge_sinks(o, lse, sinks)
    return (o, lse) if return_lse else o


def checked(
    q, k, v, mask, q_segment_ids, kv_segment_ids, q_positions, kv_positions, bias, sinks
) -> tuple[Inputs, jax.Array | None]:
    """The arguments of a call as a backend receives them, and its sinks; raises `UsageError`."""
    _check_shapes(q, k, v, mask)
    (B, T, N, _), S = q.shape, v.shape[1]
    segments = _segments(q_segment_ids, kv_segment_ids, B, T, S)
    positions = _positions(q_positions, kv_positions, mask, B, T, S)
    slope = None if bias is None else _per_head("bias.slope", bias.slope, N)
    sinks = None if sinks is None else _per_head("sinks", sinks, N)
    return Inputs(q, k, v, mask, slope, *segments, *positions), sinks


def select(
    inputs: Inputs,
    scale: float | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
    config: Tiles | None = None,
):
    """The backend for a call, and its options; raises `UsageError` if a named one cannot serve it."""
    _check_numbers(scale, soft_cap)
    q, k, v, mask, slope, segments, _, positions, _ = inputs
    given = dict(soft_cap=soft_cap, segments=segments, positions=positions, bias=slope)
    spec = describe(q, k, v, mask, **{name: x is not None for name, x in given.items()})
    name = choose(spec, implementation)
    tiles = choose_tiles(name, BACKENDS[name], spec, mask, config)
    return BACKENDS[name], Options(q.shape[-1] ** -0.5 if scale is None else scale, soft_cap, tiles)


def describe(q, k, v, mask: BlockMask, **options: bool) -> Spec:
    """The `Spec` of a call; options that are not given are off."""
    (B, T, N, H), (S, K, Hv) = q.shape, v.shape[1:]
    return Spec(
        target=target(),
        dtype=q.dtype,
        **dict(B=B, T=T, S=S, N=N, K=K, H=H, Hv=Hv, bq=mask.bq, bk=mask.bk),
        form="ranges" if isinstance(mask, Ranges) else "lists",
        lists=mask.lists_shape,
        **{name: options.get(name, False) for name in ("soft_cap", "segments", "positions", "bias")},
    )


def choose(spec: Spec, implementation: str | None = None) -> str:
    """The name of the backend for this call; raises `UsageError` if a named one cannot serve it."""
    return dispatch.choose("block_sparse_attention", BACKENDS, spec, implementation)


def merge_sinks(o, lse, sinks):
    """With one more score a head, `sinks` [N], that takes weight and gives no value."""
    merged, lse = partials.merge((o.swapaxes(1, 2), lse), (jnp.zeros((), lse.dtype), sinks[:, None]))
    return merged.swapaxes(1, 2).astype(o.dtype), lse


def _check_shapes(q, k, v, mask):
    if any(x.ndim != 4 for x in (q, k, v)):
        raise UsageError(f"q, k and v need 4 axes [B, T, N, H], got {q.shape}, {k.shape} and {v.shape}.")
    if k.shape[:3] != v.shape[:3]:
        raise UsageError(f"k {k.shape} and v {v.shape} must agree in [B, S, K].")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise UsageError(f"q {q.shape} and k {k.shape} must agree in batch and head size.")
    N, K = q.shape[2], k.shape[2]
    if N % K:
        raise UsageError(f"{N} query heads in q {q.shape} are no multiple of {K} key heads in k {k.shape}.")
    if not (q.dtype == k.dtype == v.dtype) or not jnp.issubdtype(q.dtype, jnp.floating):
        raise UsageError(f"q, k and v need one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}.")
    if not isinstance(mask, BlockMask):
        raise UsageError(
            f"mask must be a BlockMask, got {type(mask).__name__}; see BlockMask.from_block_bool."
        )
    if (q.shape[1], k.shape[1]) != (mask.T, mask.S):
        raise UsageError(
            f"The mask is for T={mask.T}, S={mask.S}, but q {q.shape} and k {k.shape} have "
            f"T={q.shape[1]}, S={k.shape[1]}; build it for these."
        )
    b, h = mask.lists_shape
    if b not in (1, q.shape[0]) or h not in (1, K, N):
        raise UsageError(
            f"The mask has lists for {b} batch entries and {h} heads; q {q.shape} and k {k.shape} need "
            f"1 or {q.shape[0]}, and 1, {K} or {N}."
        )


def _check_numbers(scale, soft_cap):
    for name, value in (("scale", scale), ("soft_cap", soft_cap)):
        if value is not None and not isinstance(value, int | float):
            raise UsageError(
                f"{name} must be a Python number, got {type(value).__name__}; multiply q instead."
            )
    if soft_cap is not None and soft_cap <= 0:
        raise UsageError(f"soft_cap must be positive, got {soft_cap}; None means no cap.")


def _segments(ids_q, ids_k, B, T, S):
    if ids_q is None and ids_k is None:
        return None, None
    if ids_k is None and T == S:
        ids_k = ids_q
    if ids_q is None or ids_k is None:
        raise UsageError(
            f"Give q_segment_ids and kv_segment_ids together; one alone is not enough for T={T}, S={S}."
        )
    return _per_token("q_segment_ids", ids_q, B, T), _per_token("kv_segment_ids", ids_k, B, S)


def _positions(pos_q, pos_k, mask, B, T, S):
    if mask.q_blocks is not None:
        if pos_q is not None or pos_k is not None:
            raise UsageError("A mask of picked blocks has positions of its own; leave out those of the call.")
        pos_q, pos_k = mask.positions()
    if pos_q is None and pos_k is None:
        return None, None
    pos_q = mask.q_offset + jnp.arange(T) if pos_q is None else pos_q
    pos_k = mask.kv_offset + jnp.arange(S) if pos_k is None else pos_k
    return _per_token("q_positions", pos_q, B, T), _per_token("kv_positions", pos_k, B, S)


def _per_token(name, x, B, length):
    x = jnp.asarray(x)
    if x.shape not in ((length,), (1, length), (B, length)) or not jnp.issubdtype(x.dtype, jnp.integer):
        raise UsageError(f"{name} must be integers [{B}, {length}] or [{length}], got {x.dtype} {x.shape}.")
    return x.astype(jnp.int32).reshape(-1, length)


def _per_head(name, x, N):
    x = jnp.asarray(x)
    if x.shape != (N,) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise UsageError(f"{name} must be floating [{N}], one per query head, got {x.dtype} {x.shape}.")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
