"""Both primitives from the passes of a backend, tied together for gradients.

Saved for the backward pass: the arrays that came in and went out, and the norms. Keys are not stored.
Formulas: with the passes of `xla.py`. Gradients pass through `o` and `lse`, not through logits.
"""

import functools

import jax
import jax.numpy as jnp
from blockjax.kernels.depth_mix.spec import JoinInputs, JoinOptions, Read, ReadInputs, ReadOptions
from blockjax.kernels.platforms import vary, varying_axes
from jax.ad_checkpoint import checkpoint_name

RESIDUAL = "depth_mix"
"""Name, for checkpoint policies, of all that a read keeps: then its backward recomputes nothing."""


def read(backend, inputs: ReadInputs, options: ReadOptions) -> Read:
    inputs = _vary(inputs)
    if hasattr(backend, "read_backward"):
        return _read(backend, options, inputs)
    return backend.read_forward(inputs, options)[0]


def join(backend, inputs: JoinInputs, options: JoinOptions):
    inputs = _vary(inputs)
    if hasattr(backend, "join_backward"):
        return _join(backend, options, inputs)
    return backend.join_forward(inputs, options)[0]


def _vary(inputs):
    """Typed alike inside `shard_map`: queries that all devices share get the sum of their gradients there."""
    return _like(inputs, jax.tree.map(jnp.asarray, inputs))


def _like(inputs, tree):
    """Varying over the same mesh axes: a kernel's outputs may not know of any."""
    axes = varying_axes(inputs)
    return jax.tree.map(lambda x: vary(x, axes), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _read(backend, options, inputs):
    return _read_forward(backend, options, inputs)[0]


def _read_forward(backend, options, inputs):
    out, norms = _like(inputs, backend.read_forward(inputs, options))
    out, norms = jax.tree.map(lambda x: checkpoint_name(x, RESIDUAL), (out, norms))
    return out, (inputs, out, norms)


def _read_backward(backend, options, kept, cotangents):
    inputs, out, norms = kept
    gradients = backend.read_backward(inputs, out, norms, cotangents.o, cotangents.lse, options)
    return (_like(inputs, gradients),)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _join(backend, options, inputs):
    return _join_forward(backend, options, inputs)[0]


def _join_forward(backend, options, inputs):
    out, norms = _like(inputs, backend.join_forward(inputs, options))
    # Of what came in, the backward pass sees again all but the running sum and its update.
    absent = None if inputs.update is None else ()
    return out, (inputs._replace(partial=None, update=absent), out._replace(x=None), norms)


def _join_backward(backend, options, kept, cotangents):
    inputs, out, norms = kept
    gradients = backend.join_backward(inputs, out, norms, cotangents.partial, cotangents.x, options)
    return (_like(inputs, gradients),)


_read.defvjp(_read_forward, _read_backward)
_join.defvjp(_join_forward, _join_backward)
