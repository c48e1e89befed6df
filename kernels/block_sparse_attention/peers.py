"""What a user would call instead of `block_sparse_attention`, for `bench.py`."""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blockjax.masks import FULL_TAG, BlockMask, Causal, Window


class Runner(NamedTuple):
    """Calls that start work: `forward()` for o and `both()` for (o, (dq, dk, dv)).

    `wait` takes what either returned, and `arrays` makes it float32 arrays [B, T, heads, H].
    """

    forward: Callable[[], Any]
    both: Callable[[], Any]
    wait: Callable[[Any], Any]
    arrays: Callable[[Any], list[np.ndarray]]


def jax_runner(attend: Callable, arrays) -> Runner:
    """Of `attend(q, k, v, *rest)`, compiled; `arrays` are (q, k, v, do, *rest)."""

    def both(q, k, v, do, *rest):
        o, pullback = jax.vjp(lambda *x: attend(*x, *rest), q, k, v)
        return o, pullback(do)

    forward = jax.jit(lambda q, k, v, do, *rest: attend(q, k, v, *rest))
    both = jax.jit(both)
    to_numpy = lambda out: [np.asarray(x.astype(jnp.float32)) for x in jax.tree.leaves(out)]  # noqa: E731
    return Runner(lambda: forward(*arrays), lambda: both(*arrays), jax.block_until_ready, to_numpy)


def dense(implementation: str) -> Callable:
    """`jax.nn.dot_product_attention` by `xla` or `cudnn`: windows are built in, only segments are a mask."""

    def make(mask: BlockMask, segments, arrays) -> Runner:
        predicate = mask.predicates[0]
        window = (int(predicate.left) - 1, 0) if isinstance(predicate, Window) else None
        visible = None if segments is None else (segments[:, None, :, None] == segments[:, None, None, :])

        def attend(q, k, v):
            return jax.nn.dot_product_attention(
                q, k, v, mask=visible, is_causal=True, local_window_size=window, implementation=implementation
            )

        return jax_runner(attend, arrays[:4])

    return make


def flex(mask: BlockMask, segments, arrays) -> Runner:
    """FlexAttention of PyTorch, compiled, with the same block lists."""
    import torch
    from torch.nn.attention import flex_attention as torch_flex

    def lists(listed):
        """Counts [1, h, nq] and indices [1, h, nq, nk], what is listed first."""
        order = np.argsort(~listed, axis=-1, kind="stable")
        return (torch.from_numpy(x.astype(np.int32)).cuda() for x in (listed.sum(-1), order))

    tags = np.asarray(mask.tags())
    partial, full = lists((tags > 0) & (tags < FULL_TAG)), lists(tags >= FULL_TAG)
    predicate = mask.predicates[0]
    left = int(predicate.left) if isinstance(predicate, Window) else None

    def visible(b, h, i, j):
        return (j <= i) if left is None else (j <= i) & (i - j < left)

    assert segments is None and isinstance(predicate, Causal | Window)
    block_mask = torch_flex.BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=(mask.bq, mask.bk), mask_mod=visible, seq_lengths=(mask.T, mask.S)
    )
    q, k, v, do = (torch.from_dlpack(x).transpose(1, 2).contiguous() for x in arrays[:4])
    compiled = torch.compile(torch_flex.flex_attention, dynamic=False)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def forward():
        with torch.no_grad():
            return compiled(*inputs, block_mask=block_mask, enable_gqa=True)

    def both():
        o = compiled(*inputs, block_mask=block_mask, enable_gqa=True)
        return o, torch.autograd.grad(o, inputs, do)

    def to_numpy(out):
        leaves = [out] if torch.is_tensor(out) else [out[0], *out[1]]
        return [x.detach().transpose(1, 2).float().cpu().numpy() for x in leaves]

    return Runner(forward, both, lambda out: torch.cuda.synchronize(), to_numpy)


def missing(name: str) -> str | None:
    """A reason why a peer cannot be called here, or None."""
    if name == "flex" and importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed: pip install 'blockjax[bench]'"
    return None


PEERS = {"xla": dense("xla"), "cudnn": dense("cudnn"), "flex": flex}
