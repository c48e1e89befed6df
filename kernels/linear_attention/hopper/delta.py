"""The delta rule with at most one decay a token, on Hopper GPUs: Gated DeltaNet and DeltaNet.

`delta_inverse.py` solves all chunks at once. The sequence is cut into pieces that fill the chip: `maps` of
`delta_forward.py` makes of each piece an affine map of the state, `delta_chain.py` of these the state that
enters each, and `outputs` walks all pieces at once. Backward likewise: `added_back`, a chain with the
transposed maps, then `back` and `ahead` of `delta_backward.py`. The forward keeps U and E (see
`delta_parts.py`) and no states within pieces; no sum is made in memory in an order that changes, and every
run gives the same bits.

Bytes, in tensors of B T N H, where U is half of one: the forward must move 4 and the backward 7. Forward:
the inverse 1.5, maps 2.5, outputs 6; backward: added_back 3.5, back 7, ahead 8; together 28.5, of which
pieces are 6. Operations, with H = 128, of a chunk of 64 tokens and one head: 9 and 24 MFLOP, maps and
added_back 12. With N16 H128 and T 32768 a tensor is 0.046 ms at 2.92 TB/s: 1.3 ms forward and backward for
the bytes of this design (0.5 ms for those no design avoids), and 0.6 ms for 370 GFLOP at 600 TFLOP/s. An H100
takes 0.85 and 2.10 ms.

Where the keys of a chunk are all alike and beta nears 2, U is large, and its rounding grows to a part of the
results: float32 is for that.
"""

from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from blockjax.kernels.linear_attention.gates import starts
from blockjax.kernels.linear_attention.hopper import (
    TILE,
    delta_backward,
    delta_forward,
    whole,
)
from blockjax.kernels.linear_attention.hopper.delta_chain import Operands as Pieces
from blockjax.kernels.linear_attention.hopper.delta_chain import chain
from blockjax.kernels.linear_attention.hopper.delta_forward import MARK, Walk
from blockjax.kernels.linear_attention.hopper.delta_inverse import Operands as Solve
from blockjax.kernels.linear_attention.hopper.delta_inverse import inverse
from blockjax.kernels.linear_attention.hopper.delta_parts import numbers
from blockjax.kernels.linear_attention.hopper.parts import Cut
from blockjax.kernels.linear_attention.spec import Inputs, Options, form


class Residuals(NamedTuple):
    """What the backward pass sees again.

    Attributes:
      solve: U [B, K, chunks, 64, 64]; errors: E [B, T, K, Hv].
      maps: as `delta_forward.maps` returns them, or None for one piece.
      entries: [B, K, pieces, Hk, Hv] float32, the states that enter the pieces; last: the state after all;
        marked: those at marks, see `Walk`.
    """

    solve: jax.Array
    errors: jax.Array
    maps: jax.Array | None
    entries: jax.Array
    last: jax.Array
    marked: jax.Array


def cut(heads: int, K: int, chunks: int) -> Cut:
    """By the turns of walks with outputs, and of those that only sum pieces up."""
    return Cut.best(
        heads, K, chunks, lambda pieces, turns: 5 * turns(pieces) + turns(pieces - 1) + turns(2 * pieces)
    )


def forward_pass(inputs: Inputs, options: Options):
    (B, T, K, Hk), Hv = inputs.k.shape, inputs.v.shape[-1]
    call, chunked = Walk(cut(B * K, K, pl.cdiv(T, TILE)), options.scale), numbers(inputs)
    q, k, v = (whole(x) for x in inputs[:3])
    solve = inverse(Solve(k, chunked))
    state = jnp.zeros((B, K, Hk, Hv), jnp.float32) if inputs.state is None else inputs.state
    maps, entries = None, state[:, :, None]
    if call.cut.pieces > 1:
        maps = delta_forward.maps(call, delta_forward.Operands(k, v, solve, chunked))
        entries = chain(Pieces(state, maps))
    operands = delta_forward.Operands(k, v, solve, chunked, q, entries)
    o, errors, last, marked = delta_forward.outputs(call, operands)
    return (o[:, :T], last), Residuals(solve, errors, maps, entries, last, marked)


def backward_pass(inputs: Inputs, residuals: Residuals, do, dstate, options: Options) -> Inputs:
    B, T, K, _ = inputs.k.shape
    call, chunked = Walk(cut(B * K, K, pl.cdiv(T, TILE)), options.scale), numbers(inputs)
    solve, errors, maps, entries, last, marked = residuals
    q, k, padded_do = (whole(x) for x in (inputs.q, inputs.k, do))
    operands = delta_backward.Back(q, k, padded_do, solve, chunked)
    into = dstate[:, :, None]
    if call.cut.pieces > 1:
        into = chain(Pieces(dstate, maps, delta_backward.added_back(call, operands)))
    dv, writes, dbeta, written, dinitial, marks = delta_backward.back(
        call, operands._replace(errors=errors, entries=into)
    )
    dq, dk, read = delta_backward.ahead(
        call, delta_backward.Ahead(q, k, padded_do, dv, errors, writes, chunked, entries)
    )
    dbeta = dbeta.sum(2)[..., :T].swapaxes(1, 2)
    dlog = None
    if form(inputs.log_decay) == "token":
        sums = (read - written).sum(2)
        after = jnp.concatenate([entries[:, :, 1:], last[:, :, None]], axis=2)
        dlog = _decay_gradient(inputs, call, sums, _dots(after, into), _dots(marked, marks))
    dstate = None if inputs.state is None else dinitial
    return Inputs(dq[:, :T], dk[:, :T], dv[:, :T], dlog, dbeta, None, dstate)


def _decay_gradient(inputs: Inputs, call: Walk, sums, ends, marks):
    """For what each token adds to the gradients of all log-decays before it, [B, K, tokens].

    At marks and at the ends of pieces that of a log-decay is the product of the state and its gradient, given
    as [B, K, pieces, marks] and [B, K, pieces]: rounding adds up in between only.
    """
    (B, K, tokens), cut = sums.shape, call.cut
    length, runs = cut.length * TILE, call.marks + 1
    sums = jnp.pad(sums, ((0, 0), (0, 0), (0, cut.pieces * length - tokens)))
    sums = sums.reshape(B, K, cut.pieces, length)
    sums = jnp.pad(sums, ((0, 0),) * 3 + ((0, runs * MARK * TILE - length),))
    # Of a shorter last piece, the runs that end inside.
    inside = (jnp.arange(1, runs) * MARK)[None] < jnp.asarray(cut.lengths())[:, None]
    across = jnp.where(inside, marks[..., : call.marks], ends[..., None])
    across = jnp.concatenate([across, ends[..., None]], axis=-1)
    sums = sums.reshape(B, K, cut.pieces, runs, MARK * TILE)
    dlog = jax.lax.cumsum(sums, 4, reverse=True) + across[..., None]
    dlog = dlog.reshape(B, K, cut.pieces, -1)[..., :length].reshape(B, K, -1)
    dlog = dlog[..., : inputs.k.shape[1]].swapaxes(1, 2)
    if inputs.documents is not None:
        dlog = jnp.where(starts(inputs.documents)[..., None], 0, dlog)
    return dlog


def _dots(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=(-1, -2))
