"""NVIDIA GPUs through Triton: what it serves, and the passes.

jax-triton and Triton are imported when a kernel is called.
"""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
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
OLDER = re.compile(r"\b([CGKMPTV]\d{1,4}|MX\d{3}|GTX|TITAN|Quadro|GeForce RTX 20\d\d)\b")
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
    """In one launch, unless the means of all queries together are too wide for a program."""
    sources, queries = inputs
    rows, R = tuple(map(_rows, sources)), len(queries)
    pieces = _pieces(R, plan.forward_queries(rows, R, options))
    found = [_read_forward(ReadInputs(sources, queries[r]), options) for r in pieces]
    if len(found) == 1:
        return found[0]
    reads, norms = zip(*found, strict=True)
    means, lse, logits = zip(*reads, strict=True)
    o = sum(means, ()) if options.unstacked else jnp.concatenate(means)
    return Read(o, jnp.concatenate(lse), jnp.concatenate(logits, 1)), norms[0]


def _read_forward(inputs: ReadInputs, options: ReadOptions):
    sources, queries = inputs
    n, R, (*axes, M) = len(sources), len(queries), sources[0].shape
    rows = tuple(map(_rows, sources))
    T, dtype, heads = len(rows[0]), rows[0].dtype, options.heads
    means = (_array(dtype, T, M),) * R if options.unstacked else (_array(dtype, R, T, M),)
    if n == 1:  # what is read of one source is that source
        means = ()
    outputs = means, _wide(R, T, heads), _wide(n, R, T, heads), _wide(n, T)
    sizes = plan.read_forward(rows, R, options)
    inputs = rows, queries, np.float32(options.eps)
    means, lse, logits, norms = _call("read_forward", inputs, outputs, sizes)
    if n == 1:
        o = sources * R if options.unstacked else jnp.broadcast_to(sources[0], (R, *axes, M))
    else:
        o = tuple(x.reshape(*axes, M) for x in means) if options.unstacked else means[0].reshape(R, *axes, M)
    return Read(o, lse.reshape(R, *axes, heads), logits.reshape(n, R, *axes, heads)), norms


def read_backward(inputs: ReadInputs, read: Read, norms, do, dlse, options: ReadOptions) -> ReadInputs:
    sources, queries = inputs
    rows, found = tuple(map(_rows, sources)), []
    for r in _pieces(len(queries), plan.backward_queries(len(sources))):
        w, kept = queries[r], (read.lse[r], dlse[r], read.logits[:, r], norms)
        backward = _one_query_backward if len(w) == 1 else _queries_backward
        found.append(backward(rows, w, _each(read.o[r]), _each(do[r]), kept, options))
    gradients, shares = zip(*found, strict=True)
    if len(found) > 1:
        gradients = [[sum(x.astype(jnp.float32) for x in xs) for xs in zip(*gradients, strict=True)]]
    like = sources[0]
    gradients = tuple(x.astype(like.dtype).reshape(like.shape) for x in gradients[0])
    return ReadInputs(gradients, jnp.concatenate([share.sum(0) for share in shares]))


def _one_query_backward(rows, queries, means, dmeans, kept, options):
    """In one launch that reads each array once."""
    T, M = rows[0].shape
    sizes = plan.read_backward(rows, options)
    means = () if sizes.group == sizes.n else means
    outputs = tuple(_array(x.dtype, T, M) for x in rows), _wide(sizes.programs, 1, M)
    return _call("read_backward", (rows, queries, means, *dmeans, *kept), outputs, sizes)


def _queries_backward(rows, queries, _, dmeans, kept, options):
    """In two launches: rows of all of many queries and their gradients are more than a program can hold."""
    (R, M), T = queries.shape, len(rows[0])
    *_, logits, norms = kept
    sizes = plan.logit_gradients(rows, R, options)
    outputs = _wide(*logits.shape), _wide(*logits.shape), _wide(*norms.shape)
    found = _call("logit_gradients", (rows, dmeans, *kept), outputs, sizes)
    sizes = plan.source_gradients(rows, R, options)
    inputs = rows, queries, dmeans, *found
    outputs = tuple(_array(x.dtype, T, M) for x in rows), _wide(sizes.programs, R, M)
    return _call("source_gradients", inputs, outputs, sizes)


def join_forward(inputs: JoinInputs, options: JoinOptions):
    partial, update, o, lse, query, norm_gain = inputs
    shape, heads = partial.shape, options.heads
    rows = _rows(partial)
    T, M = rows.shape
    added = () if update is None else (_rows(update),)
    scalars = np.float32(options.eps), np.float32(options.norm_eps)
    inputs = rows, added, _rows(o), lse, query, norm_gain, *scalars
    row = _array(partial.dtype, T, M)
    total = (row,) if added or options.first else ()
    outputs = total, row, _wide(T, heads), _wide(T), _wide(T)
    sizes = plan.join_forward(rows, options)
    total, x, logit, *norms = _call("join_forward", inputs, outputs, sizes)
    total = total[0].reshape(shape) if total else partial
    return Join(total, x.reshape(shape), logit.reshape(lse.shape)), tuple(norms)


def join_backward(inputs: JoinInputs, join: Join, norms, dpartial, dx, options: JoinOptions) -> JoinInputs:
    _, update, o, lse, query, norm_gain = inputs
    arrays = [_rows(x) for x in (join.partial, dpartial, dx, o)]
    (T, M), shape = arrays[0].shape, o.shape
    sizes = plan.join_backward(arrays[0], options)
    row = _array(o.dtype, T, M)
    outputs = (row, row, _wide(T, options.heads)), _wide(2, sizes.programs, M)
    inputs = *arrays, lse, query, norm_gain, join.logit, *norms
    (ds, do, dlse), shares = _call("join_backward", inputs, outputs, sizes)
    ds, (dquery, dgain) = ds.reshape(shape), shares.sum(1)
    return JoinInputs(
        ds, None if update is None else ds, do.reshape(shape), dlse.reshape(lse.shape), dquery, dgain
    )


def _call(kernel: str, *args):
    from blockjax.kernels.depth_mix.triton import call, kernels

    return call.call(getattr(kernels, kernel), *args)


def _pieces(R: int, most: int) -> list[slice]:
    """R queries in pieces of at most so many, all but the last of equal length."""
    return [slice(start, min(start + most, R)) for start in range(0, R, most)]


def _rows(x):
    """[..., M] as [T, M]."""
    return x.reshape(-1, x.shape[-1])


def _each(x) -> tuple:
    """R arrays [..., M] as R of [T, M]; a stack of them as one."""
    return tuple(map(_rows, x)) if isinstance(x, tuple) else (_rows(x),)


def _array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def _wide(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)
