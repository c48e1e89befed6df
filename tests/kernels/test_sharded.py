"""Batch and heads shared out over a mesh: the same results, and nothing is communicated on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blockjax.kernels.block_sparse_attention import (
    DistanceBias,
    block_sparse_attention,
    sharded_block_sparse_attention,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from blockjax.errors import UsageError
from blockjax.masks import BlockMask, Causal
from tests.kernels.block_sparse_attention_suite import MASKS, make

T = 80
SEGMENTS = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (4, T))))
CASES = {
    "window": (MASKS["window"], {}),
    "lists of each head": (
        lambda: BlockMask.from_block_bool(
            np.random.default_rng(0).random((4, 5, 5)) < 0.5, bq=16, bk=16, predicate=Causal()
        ),
        dict(bias=DistanceBias(jnp.arange(4) * 0.1), sinks=jnp.arange(4.0)),
    ),
    "lists of each batch entry": (
        lambda: BlockMask.from_block_bool(np.random.default_rng(1).random((4, 2, 5, 5)) < 0.5, bq=16, bk=16),
        dict(q_segment_ids=SEGMENTS, q_positions=jnp.arange(T) * 2),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sample("lists of each head")
def test_equals_the_call_without_a_mesh(name):
    mask, options = CASES[name]
    mask = mask()
    inputs, (do, dlse) = make(0, mask, B=4)
    learned = {key: options[key] for key in ("bias", "sinks") if key in options}

    def gradients(call):
        def run(inputs, learned):
            f = lambda x, y: call(*x, mask, return_lse=True, **{**options, **y})  # noqa: E731
            out, pullback = jax.vjp(f, inputs, learned)
            return out, pullback((do, dlse))

        return run

    expected = jax.jit(gradients(block_sparse_attention))(inputs, learned)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
        placed = jax.device_put(inputs, place)

        def call(*args, **kwargs):
            return sharded_block_sparse_attention(*args, batch=("data", "fsdp"), heads="tensor", **kwargs)

        found = jax.jit(gradients(call))(placed, learned)
        forward = jax.jit(lambda *x: call(*x, mask, **options)).lower(*placed).compile()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    assert found[0][0].sharding.is_equivalent_to(place, 4)
    text = forward.as_text()
    assert not [op for op in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if op in text]


def test_what_does_not_divide_is_refused_with_the_numbers():
    mask = MASKS["window"]()
    inputs, _ = make(0, mask, B=3)
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        with pytest.raises(UsageError, match="3 batch entries do not divide over data=2"):
            sharded_block_sparse_attention(*inputs, mask, batch="data")
        with pytest.raises(UsageError, match="2 key heads do not divide over tensor=4"):
            sharded_block_sparse_attention(*inputs, mask, heads="tensor")
    np.testing.assert_array_equal(
        sharded_block_sparse_attention(*inputs, mask, batch="data"), block_sparse_attention(*inputs, mask)
    )
