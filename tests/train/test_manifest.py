"""Digests of arrays: they change with every bit, and with nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from blockjax.parallel.mesh import make_mesh
from blockjax.train import manifest
from blockjax.train.manifest import Damaged

DTYPES = ("float32", "bfloat16", "int32", "uint8", "bool")


def digest(x) -> tuple[int, ...]:
    return tuple(np.asarray(manifest.digests({"x": jnp.asarray(x)}))[0].tolist())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_single_bit_changes_both_lanes(data):
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    dtype = data.draw(st.sampled_from(("float32", "uint8")))
    raw = draw.integers(0, 256, (3, 5, 4), np.uint8)
    flipped = raw.copy()
    flipped.reshape(-1)[data.draw(st.integers(0, raw.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    before, after = (digest(x.view(dtype)) for x in (raw, flipped))
    assert before[0] != after[0] and before[1] != after[1]


def test_order_signs_of_zero_and_nans_count():
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    found = {
        digest(v) for v in (x, x[::-1], x.T.reshape(3, 4), x.reshape(4, 3).T, 0 * x, -0.0 * x, x + np.nan)
    }
    assert len(found) == 7


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_on_every_mesh(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)) * 3).astype(dtype)
    alone = digest(x)
    for sizes, spec in ((dict(data=8), P("data")), (dict(fsdp=4, tensor=2), P("tensor", "fsdp")), ({}, P())):
        count = int(np.prod(list(sizes.values()) or [1]))
        placed = jax.device_put(x, NamedSharding(make_mesh(sizes, jax.devices()[:count]), spec))
        assert digest(placed) == alone


def test_names_and_words():
    tree = {"params": {"a": np.zeros((2, 3), np.float32), "b": [np.zeros(4, np.int32)]}}
    assert manifest.leaf_names(tree) == ["params/a", "params/b/0"]
    leaves = manifest.describe(tree, np.asarray(manifest.digests(tree)))
    content = {"leaves": leaves}
    manifest.check_tree(content, tree)
    manifest.check_digests(content, tree)
    other = {"params": {"a": np.zeros((3, 3), np.float32), "c": np.zeros(1, np.float32)}}
    with pytest.raises(Damaged) as error:
        manifest.check_tree(content, other)
    for words in (
        "params/a is float32[2,3] there, float32[3,3] here",
        "params/b/0 is int32[4] there, nothing here",
        "params/c is nothing there, float32[1] here",
    ):
        assert words in str(error.value)
    tree["params"]["a"][1, 2] = 1
    with pytest.raises(Damaged, match=r"^params/a holds other bits"):
        manifest.check_digests(content, tree)
