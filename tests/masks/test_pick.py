"""Pieces of a mask show what the whole mask shows of their blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blockjax.kernels.block_sparse_attention import block_sparse_attention
from blockjax.kernels.block_sparse_attention.reference import visible
from blockjax.kernels.block_sparse_attention.spec import Inputs

from blockjax.errors import UsageError
from blockjax.masks import FULL_TAG, Ranges, lengthen, pick
from tests.kernels.block_sparse_attention_suite import MASKS, make

WHOLE = [name for name, mask in MASKS.items() if name != "wide-blocks"]


def dense(mask, N=4):
    """Which query sees which key, [B, N, T, S]."""
    q = jnp.zeros((2, mask.T, N, 4))
    k = jnp.zeros((2, mask.S, 2, 4))
    positions = (None, None) if mask.q_blocks is None else (jnp.asarray(x)[None] for x in mask.positions())
    seen = visible(Inputs(q, k, k, mask, None, None, None, *positions))
    return np.broadcast_to(seen, (2, N, mask.T, mask.S))


def longer(name):
    mask = MASKS[name]()
    return lengthen(mask, (mask.nq + 1) * mask.bq, (mask.nk + 2) * mask.bk)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.sample("lists-batch-heads", "causal-ragged", "chunked", "full-ragged")
def test_lengthened_sees_no_more(name):
    mask = MASKS[name]()
    seen = dense(longer(name))
    np.testing.assert_array_equal(seen[:, :, : mask.T, : mask.S], dense(mask))
    assert not seen[..., mask.S :].any()


def tokens(blocks, size):
    return (np.asarray(blocks)[:, None] * size + np.arange(size)).reshape(-1)


@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.sample("*-False-*")
def test_picked_blocks_see_what_they_saw(name, traced, ascending):
    mask = longer(name)
    rng = np.random.default_rng(0)
    q_blocks = rng.permutation(mask.nq)[:3].astype("int32")
    kv_blocks = rng.permutation(mask.nk)[: mask.nk - 1].astype("int32")
    if ascending:
        q_blocks, kv_blocks = np.sort(q_blocks), np.sort(kv_blocks)
    picked = functools.partial(pick, ascending=ascending)
    piece = (jax.jit(picked) if traced else picked)(mask, q_blocks, kv_blocks)
    assert isinstance(piece, Ranges) == (ascending and isinstance(mask, Ranges))
    twice = picked(picked(mask, q_blocks), None, kv_blocks)
    whole = dense(mask)[:, :, tokens(q_blocks, mask.bq)][..., tokens(kv_blocks, mask.bk)]
    np.testing.assert_array_equal(dense(piece), whole)
    np.testing.assert_array_equal(dense(twice), whole)
    np.testing.assert_array_equal(piece.tags(), pick(mask, q_blocks, kv_blocks).tags())
    promised = np.repeat(np.repeat(np.asarray(piece.tags()) >= FULL_TAG, mask.bq, 2), mask.bk, 3)
    heads = np.repeat(promised, 4 // promised.shape[1], 1)
    assert whole[np.broadcast_to(heads, whole.shape)].all()


@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("name", ["causal", "window-both-sides", "lists-query-heads", "or"])
def test_attention_to_picked_blocks(name, ascending):
    mask = longer(name)
    blocks = np.array([3, 0, 4]), np.array([4, 1, 0, 2])
    piece = pick(mask, *map(np.sort, blocks), ascending=True) if ascending else pick(mask, *blocks)
    inputs, _ = make(0, piece)
    ours, exact = (
        block_sparse_attention(*inputs, piece, return_lse=True, implementation=name)
        for name in ("xla", "reference")
    )
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    with pytest.raises(UsageError, match="positions of its own"):
        block_sparse_attention(*inputs, piece, q_positions=jnp.arange(piece.T))


@pytest.mark.parametrize("name", ["causal", "window-both-sides"])
def test_finer_blocks_see_the_same(name):
    piece = pick(longer(name), np.array([0, 2, 3]), np.array([0, 1, 4]), ascending=True)
    finer = piece.finer(piece.bq // 2, piece.bk // 2)
    np.testing.assert_array_equal(dense(finer), dense(piece))
    assert finer.executed_pairs() < piece.executed_pairs()
