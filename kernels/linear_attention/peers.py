"""What a user would call instead of `linear_attention`, for `bench.py`."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blockjax.kernels.linear_attention.api import linear_attention


class Arrays(NamedTuple):
    """q, k, v, do [B, T, K, H]; gates by name, float32: `fixed` ones [K], and those of tokens [B, T, K]."""

    kind: str
    q: Any
    k: Any
    v: Any
    do: Any
    fixed: dict[str, Any]
    gates: dict[str, Any]


class Runner(NamedTuple):
    """Calls that start work: `forward()` for o and `both()` for (o, gradients).

    Gradients are those of q, k, v, and of the gates of tokens in the order of their names. `wait` takes what
    either returned, and `arrays` makes it arrays of JAX.
    """

    forward: Callable[[], Any]
    both: Callable[[], Any]
    wait: Callable[[Any], Any]
    arrays: Callable[[Any], list[jax.Array]]


def jax_runner(attend: Callable, arrays: Arrays) -> Runner:
    """Of `attend(q, k, v, **gates)`, compiled."""
    _, *tensors, do, fixed, gates = arrays

    @jax.jit
    def forward(tensors, gates, fixed):
        return attend(*tensors, **gates, **fixed)

    @jax.jit
    def both(tensors, gates, fixed, do):
        o, pullback = jax.vjp(lambda x, gates: attend(*x, **gates, **fixed), tensors, gates)
        return o, pullback(do)

    return Runner(
        lambda: forward(tensors, gates, fixed),
        lambda: both(tensors, gates, fixed, do),
        jax.block_until_ready,
        jax.tree.leaves,
    )


def ours(arrays: Arrays, implementation: str | None = None) -> Runner:
    op = functools.partial(linear_attention, kind=arrays.kind, implementation=implementation)
    return jax_runner(op, arrays)


def jla(arrays: Arrays) -> Runner:
    """`simple_gla` or `gated_deltanet` of jax-linear-attention (Mosaic GPU), with a decay for each token."""
    from jla.ops import linear_attention as attention

    variant = dict(decay="simple_gla", delta="gated_deltanet")[arrays.kind]

    def attend(q, k, v, log_decay=None, **gates):
        decay = jnp.zeros(()) if log_decay is None else log_decay
        decay = jnp.broadcast_to(decay, q.shape[:3])
        return attention(variant, q, k, v, g=decay, **gates, impl="mosaic_gpu")[0]

    return jax_runner(attend, arrays)


def fla(arrays: Arrays) -> Runner:
    """`chunk_simple_gla` of flash-linear-attention (Triton): `chunk_lightning_attn` with any decays.

    Not its delta rule: fla-core 0.6.0 refuses that on Hopper with Triton 3.4 and newer.
    """
    import torch
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v, do = map(torch.from_dlpack, (arrays.q, arrays.k, arrays.v, arrays.do))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    decay = {}
    if "log_decay" in arrays.fixed:
        decay["g_gamma"] = torch.from_dlpack(arrays.fixed["log_decay"])
    if "log_decay" in arrays.gates:
        decay["g"] = torch.from_dlpack(arrays.gates["log_decay"]).requires_grad_()
        inputs.append(decay["g"])

    def call():
        return chunk_simple_gla(q, k, v, **decay)[0]

    def forward():
        with torch.no_grad():
            return call()

    def both():
        o = call()
        return o, torch.autograd.grad(o, inputs, do)

    def to_jax(out):
        leaves = [out] if torch.is_tensor(out) else [out[0], *out[1]]
        torch.cuda.synchronize()
        return [jnp.from_dlpack(x.detach().contiguous()) for x in leaves]

    return Runner(forward, both, lambda out: torch.cuda.synchronize(), to_jax)


def missing(name: str) -> str | None:
    """A reason why a peer cannot be called here, or None."""
    if name == "fla" and any(importlib.util.find_spec(x) is None for x in ("torch", "fla")):
        return "PyTorch or flash-linear-attention is not installed: pip install 'blockjax[bench]'"
    if name == "jla" and importlib.util.find_spec("jla") is None:
        return "jax-linear-attention is not installed; 0.1.0 needs jax 0.11.2"
    return None


PEERS = {"xla": functools.partial(ours, implementation="xla"), "jla": jla, "fla": fla}
