"""What a user would call instead of `linear_attention`, for `bench.py`."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blockjax.kernels.linear_attention.api import linear_attention


class Arrays(NamedTuple):
    """q, k, v, do [B, T, K, H]; log_decay None, [K] or [B, T, K] float32."""

    q: Any
    k: Any
    v: Any
    do: Any
    log_decay: Any

    @property
    def a_token(self) -> bool:
        return self.log_decay is not None and self.log_decay.ndim == 3


class Runner(NamedTuple):
    """Calls that start work: `forward()` for o and `both()` for (o, gradients).

    Gradients are those of q, k, v, and of a decay that is given for each token. `wait` takes what either
    returned, and `arrays` makes it arrays of JAX.
    """

    forward: Callable[[], Any]
    both: Callable[[], Any]
    wait: Callable[[Any], Any]
    arrays: Callable[[Any], list[jax.Array]]


def jax_runner(attend: Callable, arrays: Arrays) -> Runner:
    """Of `attend(q, k, v, log_decay)`, compiled."""

    def both(q, k, v, do, log_decay):
        if arrays.a_token:
            o, pullback = jax.vjp(attend, q, k, v, log_decay)
        else:
            o, pullback = jax.vjp(lambda *x: attend(*x, log_decay), q, k, v)
        return o, pullback(do)

    forward = jax.jit(lambda q, k, v, do, log_decay: attend(q, k, v, log_decay))
    both = jax.jit(both)
    return Runner(lambda: forward(*arrays), lambda: both(*arrays), jax.block_until_ready, jax.tree.leaves)


def ours(arrays: Arrays, implementation: str | None = None) -> Runner:
    def attend(q, k, v, log_decay):
        return linear_attention(q, k, v, log_decay=log_decay, implementation=implementation)

    return jax_runner(attend, arrays)


def jla(arrays: Arrays) -> Runner:
    """`simple_gla` of jax-linear-attention (Mosaic GPU), which takes a decay for each token."""
    from jla.ops import linear_attention as attention

    def attend(q, k, v, log_decay):
        decay = jnp.zeros(()) if log_decay is None else log_decay
        return attention("simple_gla", q, k, v, g=jnp.broadcast_to(decay, q.shape[:3]), impl="mosaic_gpu")[0]

    return jax_runner(attend, arrays)


def fla(arrays: Arrays) -> Runner:
    """`chunk_simple_gla` of flash-linear-attention (Triton): `chunk_lightning_attn` with any decays."""
    import torch
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v, do = (torch.from_dlpack(x) for x in arrays[:4])
    inputs = [x.requires_grad_() for x in (q, k, v)]
    decay = {}
    if arrays.log_decay is not None:
        g = torch.from_dlpack(arrays.log_decay)
        if arrays.a_token:
            inputs.append(g.requires_grad_())
        decay = dict(g=g) if arrays.a_token else dict(g_gamma=g)

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
