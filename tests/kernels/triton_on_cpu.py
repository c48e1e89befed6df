"""Runs the Triton kernels of `depth_mix` on a CPU, by Triton's interpreter and a callback of JAX."""

import importlib.util

import jax
import numpy as np
import triton
import triton.language as tl
from blockjax.kernels.depth_mix import triton as backend
from blockjax.kernels.depth_mix.triton import call as calls
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

DTYPES = {"bfloat16": tl.bfloat16, "float32": tl.float32}


def install(monkeypatch) -> None:
    """Makes the backend call interpreted copies of its kernels."""
    for module in (tl, tl.standard):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                monkeypatch.setattr(module, name, interpreter.InterpretedFunction(value.fn))
    monkeypatch.setattr(triton, "jit", interpreter.InterpretedFunction)
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        # As it is, `int` of an array of one number, which NumPy 2.5 refuses.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_lang_tensor)
    spec = importlib.util.find_spec("blockjax.kernels.depth_mix.triton.kernels")
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    monkeypatch.setattr(backend, "kernels", kernels, raising=False)
    monkeypatch.setattr(calls, "call", call)


def call(kernel, inputs, outputs, sizes, aliases=None):
    """In place of `call.call`. What a kernel leaves unwritten is NaN."""
    lengths = tuple(len(x) if isinstance(x, tuple) else None for x in (*inputs, *outputs))
    function = calls.flattened(kernel, lengths)
    flat, tree = jax.tree.flatten(outputs)

    def run(*arrays):
        found = [np.full(x.shape, np.nan, x.dtype) for x in flat]
        for source, target in (aliases or {}).items():
            found[target] = np.array(arrays[source])
        arrays = [np.ascontiguousarray(x) for x in arrays]
        _interpret(function, [*arrays, *found], sizes)
        return found

    arrays = jax.pure_callback(run, flat, *jax.tree.leaves(inputs), vmap_method="sequential")
    return jax.tree.unflatten(tree, arrays)


def _interpret(function, arrays, sizes) -> None:
    pointers = [_pointer(x) for x in arrays]
    patched = interpreter._patch_lang(function.fn)
    try:
        interpreter.interpreter_builder.set_grid_dim(sizes.programs, 1, 1)
        for program in range(sizes.programs):
            interpreter.interpreter_builder.set_grid_idx(program, 0, 0)
            function.rewrite()(*pointers, sizes)
    finally:
        patched.restore()


def _pointer(x: np.ndarray):
    kind = tl.pointer_type(DTYPES[x.dtype.name])
    return tl.tensor(interpreter.TensorHandle(np.array([x.ctypes.data], np.uint64), kind), kind)
