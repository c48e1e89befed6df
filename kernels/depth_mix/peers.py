"""What a user would call instead of `depth_mix`, for `bench.py`."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from blockjax.kernels.depth_mix.api import depth_mix


class Runner(NamedTuple):
    """Calls that start work: `forward()` for the mean and `both()` for (mean, (gradients of sources, dw)).

    `wait` takes what either returned, and `arrays` makes it float32 arrays.
    """

    forward: Callable[[], Any]
    both: Callable[[], Any]
    wait: Callable[[Any], Any]
    arrays: Callable[[Any], list[np.ndarray]]


def jax_runner(function: Callable, cotangent: jax.Array, *args) -> Runner:
    """Of `function(*args)`, compiled, and its gradients for all of `args`."""

    def both(cotangent, *args):
        out, pullback = jax.vjp(function, *args)
        return out, pullback(cotangent)

    forward, both = jax.jit(function), jax.jit(both)
    to_numpy = lambda out: [np.asarray(x, "float32") for x in jax.tree.leaves(out)]  # noqa: E731
    return Runner(lambda: forward(*args), lambda: both(cotangent, *args), jax.block_until_ready, to_numpy)


def xla(sources, query, cotangent) -> Runner:
    """The definition, left to the compiler."""
    mix = functools.partial(depth_mix, implementation="reference")
    return jax_runner(mix, cotangent, sources, query)


def fla(sources, query, cotangent) -> Runner:
    """`fused_attnres` of flash-linear-attention (Triton), tuned by itself, as it is called by default."""
    import torch
    from fla.ops.attnres import fused_attnres

    *values, w, do = (torch.from_dlpack(x) for x in (*sources, query, cotangent))
    inputs = [x.requires_grad_() for x in (*values, w.to(do.dtype))]
    gain = torch.ones_like(inputs[-1])

    def call():
        return fused_attnres(inputs[-1], inputs[:-1], gain)

    def forward():
        with torch.no_grad():
            return call()

    def both():
        h = call()
        return h, torch.autograd.grad(h, inputs, do)

    def to_numpy(out):
        leaves = [out] if torch.is_tensor(out) else [out[0], *out[1]]
        return [x.detach().float().cpu().numpy() for x in leaves]

    return Runner(forward, both, lambda out: torch.cuda.synchronize(), to_numpy)


def missing(name: str) -> str | None:
    """A reason why a peer cannot be called here, or None."""
    if name == "fla" and any(importlib.util.find_spec(x) is None for x in ("torch", "fla")):
        return "PyTorch or flash-linear-attention is not installed: pip install 'blockjax[bench]'"
    return None


PEERS = {"xla": xla, "fla": fla}
