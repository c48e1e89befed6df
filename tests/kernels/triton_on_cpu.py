"""Runs the Triton kernels of `depth_mix` on a CPU, by Triton's interpreter and a callback of JAX."""

import importlib.util
import threading

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl
from blockjax.kernels.depth_mix import triton as backend
from blockjax.kernels.depth_mix.triton import call as calls
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

ONE_AT_A_TIME = threading.Lock()
"""The interpreter has one place for the number of the program that it is at."""

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
    monkeypatch.setattr(interpreter, "_convert_float", _convert_float)
    # Several rows at a time are only ever summed; element by element that would take minutes.
    every = lambda op, rows: tuple(op.sum(row) for row in rows)  # noqa: E731
    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", every)
    # Functions that kernels call find the language patched; as it is, each would patch it again.
    run = lambda function, *args, **options: function.rewrite()(*args, **options)  # noqa: E731
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", run)
    spec = importlib.util.find_spec("blockjax.kernels.depth_mix.triton.kernels")
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    monkeypatch.setattr(backend, "kernels", kernels, raising=False)
    monkeypatch.setattr(calls, "call", call)


def call(kernel, inputs, outputs, sizes):
    """In place of `call.call`. What a kernel leaves unwritten is NaN."""
    lengths = tuple(len(x) if isinstance(x, tuple) else None for x in (*inputs, *outputs))
    function = calls.flattened(kernel, lengths)
    flat, tree = jax.tree.flatten(outputs)

    leaves = jax.tree.leaves(inputs)
    scalars = [x if isinstance(x, np.float32) else None for x in leaves]

    def run(*arrays):
        found = [np.full(x.shape, np.nan, x.dtype) for x in flat]
        given = iter([np.array(x, order="C") for x in arrays])
        operands = [next(given) if scalar is None else float(scalar) for scalar in scalars]
        with ONE_AT_A_TIME:
            _interpret(function, [*operands, *found], sizes)
        return found

    arrays = (x for x, scalar in zip(leaves, scalars, strict=True) if scalar is None)
    arrays = jax.pure_callback(run, flat, *arrays, vmap_method="sequential")
    return jax.tree.unflatten(tree, arrays)


def _interpret(function, operands, sizes) -> None:
    operands = [x if isinstance(x, float) else _pointer(x) for x in operands]
    # Of kernels and of the functions that come with the language.
    patched = [interpreter._patch_lang(fn) for fn in (function.fn, tl.zeros.fn)]
    try:
        interpreter.interpreter_builder.set_grid_dim(*(*sizes.grid, 1, 1)[:3])
        for program in np.ndindex(sizes.grid):
            interpreter.interpreter_builder.set_grid_idx(*(*program, 0, 0)[:3])
            function.rewrite()(*operands, sizes)
    finally:
        for scope in reversed(patched):
            scope.restore()


def _convert_float(x, source, target, rounding):
    """Rounds to nearest, which the interpreter does not; bfloat16 is handed on as uint16."""
    x = x.view(jnp.bfloat16) if source == tl.bfloat16 else x
    return x.astype(jnp.bfloat16).view(np.uint16) if target == tl.bfloat16 else x.astype(np.float32)


def _pointer(x: np.ndarray):
    kind = tl.pointer_type(DTYPES[x.dtype.name])
    return tl.tensor(interpreter.TensorHandle(np.array([x.ctypes.data], np.uint64), kind), kind)
