"""The op from a backend's `forward_pass` and `backward_pass`, tied together for gradients."""

import functools

import jax
import jax.numpy as jnp
from blockjax.kernels.linear_attention.spec import Inputs, Options
from blockjax.kernels.platforms import vary, varying_axes
from jax.ad_checkpoint import checkpoint_name

RESIDUAL = "linear_attention"
"""Name, for checkpoint policies, of all that the backward pass sees again: if kept, it recomputes no pass."""


def run(backend, inputs: Inputs, options: Options) -> tuple[jax.Array, jax.Array]:
    """`o` [B, T, N, Hv] in q's dtype and the last state [B, K, Hk, Hv] wide, differentiable in all inputs."""
    inputs = _like(inputs, jax.tree.map(jnp.asarray, inputs))
    if hasattr(backend, "backward_pass"):
        return _run(backend, options, inputs)
    return backend.forward_pass(inputs, options)[0]


def _like(inputs: Inputs, tree):
    """Varying over the same mesh axes: inside `shard_map`, a kernel's outputs may not know of any."""
    axes = varying_axes(inputs)
    return jax.tree.map(lambda x: vary(x, axes), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(backend, options: Options, inputs: Inputs):
    return _forward(backend, options, inputs)[0]


def _forward(backend, options, inputs):
    out, residuals = _like(inputs, backend.forward_pass(inputs, options))
    return out, jax.tree.map(lambda x: checkpoint_name(x, RESIDUAL), (inputs, residuals))


def _backward(backend, options, kept, cotangents):
    inputs, residuals = kept
    gradients = _like(inputs, backend.backward_pass(inputs, residuals, *cotangents, options))
    return (gradients._replace(documents=None),)


_run.defvjp(_forward, _backward)
