"""NVIDIA GPUs through Triton: what it serves, and the passes.

jax-triton and Triton are imported when a kernel is called.
"""

import importlib.util
import re

import jax
import jax.numpy as jnp
from blockjax.kernels.depth_mix.spec import (
    Join,
    JoinInputs,
    JoinOptions,
    Read,
    ReadInputs,
    ReadOptions,
    Spec,
)
from blockjax.kernels.depth_mix.triton import plan

PACKAGES = "jax_triton", "triton"
MAX_HEADS = 16
MAX_WIDTH = 16384
OLDER = re.compile(r"\b([CGKMPTV]\d{1,4}|GTX|TITAN|Quadro|RTX 20\d\d)\b")
"""NVIDIA GPUs of compute capability below 8.0, by name."""


def supports(spec: Spec) -> str | None:
    kind = spec.target.device_kind
    if spec.target.platform != "gpu" or "NVIDIA" not in kind or OLDER.search(kind):
        return f"it runs on NVIDIA GPUs of compute capability 8.0 or newer, not on {kind}"
    if spec.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it needs bfloat16 or float32, not {spec.dtype}"
    if spec.heads > MAX_HEADS or spec.M > MAX_WIDTH or not spec.tokens:
        return (
            f"it serves up to {MAX_HEADS} heads, a width of {MAX_WIDTH} and at least one token, got "
            f"{spec.heads}, {spec.M} and {spec.tokens}"
        )
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        return f"{' and '.join(missing)} cannot be imported: pip install 'blockjax[cuda]'"
    return None


def read_forward(inputs: ReadInputs, options: ReadOptions):
    from blockjax.kernels.depth_mix.triton import kernels
    from blockjax.kernels.depth_mix.triton.call import call

    sources, queries = inputs
    n, R, (*axes, M) = len(sources), len(queries), sources[0].shape
    rows = tuple(map(_rows, sources))
    T, dtype, heads = len(rows[0]), rows[0].dtype, options.heads
    if n == 1:  # what is read of one source is that source
        means = ()
    else:
        means = (_array(dtype, T, M),) * R if options.unstacked else (_array(dtype, R, T, M),)
    outputs = means, _wide(R, T, heads), _wide(n, R, T, heads), _wide(n, T)
    sizes = plan.read_forward(n, R, T, M, options)
    means, lse, logits, norms = call(kernels.read_forward, (rows, queries), outputs, sizes)
    if n == 1:
        o = sources * R if options.unstacked else jnp.broadcast_to(sources[0], (R, *axes, M))
    else:
        o = tuple(x.reshape(*axes, M) for x in means) if options.unstacked else means[0].reshape(R, *axes, M)
    return Read(o, lse.reshape(R, *axes, heads), logits.reshape(n, R, *axes, heads)), norms


def read_backward(inputs: ReadInputs, read: Read, norms, do, dlse, options: ReadOptions) -> ReadInputs:
    """In as many launches as there are pieces of the queries whose rows fit: one, but for very wide models."""
    sources, queries = inputs
    n, R, M = len(sources), len(queries), queries.shape[1]
    rows = tuple(map(_rows, sources))
    sizes, pieces = plan.read_backward(n, R, len(rows[0]), M, options)
    found = []
    for r in pieces:
        piece = queries[r], _some(read.o, r), _some(do, r), read.lse[r], dlse[r], read.logits[:, r]
        found.append(_read_backward(rows, piece, norms, sizes))
    gradients, dqueries = zip(*found, strict=True)
    if len(found) > 1:
        gradients = [sum(x.astype(jnp.float32) for x in xs) for xs in zip(*gradients, strict=True)]
    else:
        gradients = gradients[0]
    shape, dtype = sources[0].shape, sources[0].dtype
    return ReadInputs(
        tuple(x.astype(dtype).reshape(shape) for x in gradients), jnp.concatenate(dqueries)
    )


def _read_backward(rows, piece, norms, sizes):
    from blockjax.kernels.depth_mix.triton import kernels
    from blockjax.kernels.depth_mix.triton.call import call

    queries, o, do, lse, dlse, logits = piece
    R, M = queries.shape
    means = () if sizes.group == sizes.n else _each(o)
    inputs = rows, queries, means, _each(do), lse, dlse, logits, norms
    outputs = tuple(_array(x.dtype, *x.shape) for x in rows), _wide(sizes.programs, R, M)
    gradients, shares = call(kernels.read_backward, inputs, outputs, sizes)
    return gradients, shares.sum(0)


def join_forward(inputs: JoinInputs, options: JoinOptions):
    from blockjax.kernels.depth_mix.triton import kernels
    from blockjax.kernels.depth_mix.triton.call import call

    partial, update, o, lse, query, norm_gain = inputs
    shape, heads = partial.shape, options.heads
    rows = _rows(partial)
    T, M = rows.shape
    added = () if update is None else (_rows(update),)
    inputs = rows, added, _rows(o), lse, query, norm_gain
    row = _array(partial.dtype, T, M)
    outputs = row, row, _wide(T, heads), _wide(T), _wide(T)
    # Without an update the running sum stays where it is, but for tokens that have none.
    aliases = {} if added else {0: 0}
    total, x, logit, *norms = call(
        kernels.join_forward, inputs, outputs, plan.join_forward(T, M, options), aliases
    )
    return Join(total.reshape(shape), x.reshape(shape), logit.reshape(lse.shape)), tuple(norms)


def join_backward(inputs: JoinInputs, join: Join, norms, dpartial, dx, options: JoinOptions) -> JoinInputs:
    from blockjax.kernels.depth_mix.triton import kernels
    from blockjax.kernels.depth_mix.triton.call import call

    _, update, o, lse, query, norm_gain = inputs
    arrays = map(_rows, (join.partial, dpartial, dx, o))
    total = _rows(o)
    (T, M), shape = total.shape, o.shape
    sizes = plan.join_backward(T, M, options)
    row = _array(o.dtype, T, M)
    outputs = (row, row, _wide(T, options.heads)), _wide(2, sizes.programs, M)
    inputs = *arrays, lse, query, norm_gain, join.logit, *norms
    (ds, do, dlse), shares = call(kernels.join_backward, inputs, outputs, sizes)
    ds, (dquery, dgain) = ds.reshape(shape), shares.sum(1)
    return JoinInputs(
        ds, None if update is None else ds, do.reshape(shape), dlse.reshape(lse.shape), dquery, dgain
    )


def _rows(x):
    """[..., M] as [T, M]."""
    return x.reshape(-1, x.shape[-1])


def _each(x) -> tuple:
    """R arrays [..., M] as R of [T, M]; a stack of them as one."""
    return tuple(map(_rows, x)) if isinstance(x, tuple) else (_rows(x),)


def _some(x, r: slice):
    return x[r]


def _array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def _wide(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)
