"""Calls of the Triton kernels from JAX, through jax-triton."""

import functools
import linecache
import os

import jax
import triton.language as tl
from blockjax.kernels.depth_mix.triton.plan import Sizes


def call(kernel, inputs: tuple, outputs: tuple, sizes: Sizes):
    """Runs a kernel whose parameters are `inputs`, `outputs` and `sizes`.

    Args:
      inputs: arrays, tuples of arrays, and np.float32 scalars.
      outputs: a `ShapeDtypeStruct`, or a tuple of them, for each.

    Returns:
      Arrays like `outputs`.
    """
    lengths = tuple(len(x) if isinstance(x, tuple) else None for x in (*inputs, *outputs))
    flat, tree = jax.tree.flatten(outputs)
    arrays = jax_triton().triton_call(
        *jax.tree.leaves(inputs),
        kernel=flattened(kernel, lengths),
        out_shape=flat,
        grid=sizes.grid,
        num_warps=sizes.warps,
        S=sizes,
    )
    return jax.tree.unflatten(tree, arrays)


@functools.cache
def jax_triton():
    """The module. Its import empties TRITON_CACHE_DIR, without which Triton kernels of PyTorch do not run."""
    folder = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton

    os.environ.pop("TRITON_CACHE_DIR", None)
    if folder is not None:
        os.environ["TRITON_CACHE_DIR"] = folder
    return jax_triton


@functools.cache
def flattened(kernel, lengths: tuple[int | None, ...]):
    """The kernel with one parameter an array, as jax-triton wants it, where its own take tuples."""
    parameters, arguments = [], []
    for name, length in zip(kernel.arg_names, lengths, strict=False):
        members = [name if length is None else f"{name}_{i}" for i in range(1 if length is None else length)]
        parameters += members
        arguments.append(name if length is None else f"({' '.join(f'{member},' for member in members)})")
    name = kernel.fn.__name__
    text = f"def {name}({', '.join(parameters)}, S: tl.constexpr):\n    kernel({', '.join(arguments)}, S)\n"
    # Triton reads the source of a function where Python keeps that of files.
    file = f"<{name}{lengths}>"
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    scope = {"kernel": kernel, "tl": tl}
    exec(compile(text, file, "exec"), scope)
    return type(kernel)(scope[name])
