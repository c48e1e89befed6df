"""One loss and one gradient, whatever the mesh; and what the devices say to each other."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from blockjax.models.transformer import weight
from blockjax.parallel import make_mesh, partition_spec
from blockjax.train.config import base_config
from blockjax.train.state import plan_state
from blockjax.train.step import batch_loss
from tests.hlo import collectives
from tests.models.tiny import random_params, tiny_config

# T appears in no parameter, so that an activation is known by its shape.
B, T = 16, 48
CONFIG = tiny_config(vocab_size=64, depth=4, width=32, ffn=40, pattern="20")
_, PARAMS = random_params(CONFIG)
# Windows that are scanned, segments, and a depth block that is not whole.
BLOCKS = dataclasses.replace(
    CONFIG,
    pattern="full",
    locality="beta:1,mode=segment,smallest=4,boundary=adaptive",
    residual="block_attn_res:size=6",
    context=T,
)
# A layer that is applied three times, told which time it is.
LOOP = dataclasses.replace(CONFIG, loop="1,1*3")
MESHES = {
    "data": dict(data=8),
    "fsdp": dict(fsdp=8),
    "data_fsdp": dict(data=2, fsdp=4),
    "data_fsdp_tensor": dict(data=2, fsdp=2, tensor=2),
    "seq_data": dict(seq=2, data=4),
    "seq_zigzag": dict(seq=4, data=2),
    "seq_striped": dict(seq=4, fsdp=2),
    "seq_ulysses": dict(seq=4, tensor=2),
    "tensor_fsdp": dict(tensor=2, fsdp=4),
}
HOW = {
    "seq_zigzag": dict(layout="zigzag", schedule="ring", pattern="full"),
    "seq_striped": dict(layout="striped", attention_block=4),
    "seq_ulysses": dict(layout="balanced", attention_block=4, ulysses=2, heads=8, kv_heads=4),
}


def batch():
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.integers(1, T, (B, 2)), axis=1)
    segments = (np.arange(T) >= cuts[:, :1]).astype(int) - 2 * (np.arange(T) >= cuts[:, 1:])
    starts = np.where(segments == 1, cuts[:, :1], 0)
    tokens = rng.integers(0, CONFIG.vocab_size, (B, T + 1))
    arrays = dict(
        tokens=tokens[:, :-1],
        targets=np.where(segments < 0, -1, tokens[:, 1:]),
        positions=np.arange(T) - starts,
        segment_ids=segments,
    )
    return {name: a.astype(np.int32) for name, a in arrays.items()}


@functools.cache
def step(name, config=CONFIG, meshed=True):
    """`(loss, gradients, text of the compiled program)` on the mesh of this name, or on one device."""
    config = dataclasses.replace(config, **HOW.get(name, {}))
    graph, params = random_params(config)
    mesh = make_mesh(MESHES[name]) if meshed else make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        places = plan_state(config, base_config(), mesh).abstract.params
        places = jax.tree.map(lambda leaf: leaf.sharding, places)

        def loss(params, batch):
            total, sums = batch_loss(graph, params, batch)
            return total / sums.tokens

        params = jax.device_put(params, places)
        data = jax.device_put(batch(), NamedSharding(mesh, partition_spec(("batch", "time"))))
        lowered = jax.jit(jax.value_and_grad(loss), out_shardings=(None, places)).lower(params, data)
        compiled = lowered.compile()
        value, grads = compiled(params, data)
        return float(value), jax.device_get(grads), compiled.as_text()


def test_a_seed_makes_the_same_weight_on_every_mesh():
    axes = dict(model=32, ffn=40)
    place = NamedSharding(make_mesh(MESHES["tensor_fsdp"]), partition_spec(tuple(axes)))
    make = lambda: weight(nnx.Rngs(0), axes, fan_in=32)[...]  # noqa: E731
    np.testing.assert_allclose(jax.jit(make, out_shardings=place)(), make(), rtol=1e-5, atol=1e-6)


# Of the meshes those whose axes together are all.
SOME = "data_fsdp", "data_fsdp_tensor", "seq_zigzag", "seq_striped"


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *(pytest.param(name, CONFIG, id=name) for name in MESHES),
        pytest.param("data_fsdp_tensor", BLOCKS, id="depth_blocks_and_segments"),
        pytest.param("seq_striped", BLOCKS, id="seq_depth_blocks_and_segments"),
        pytest.param("data_fsdp", LOOP, id="data_fsdp_loop"),
    ],
)
@pytest.mark.sample("seq_depth_blocks_and_segments")
def test_loss_and_gradients_are_those_of_one_device(name, config):
    alone = None if name not in HOW else name
    (loss, grads, _), (expected_loss, expected, _) = step(name, config), step(alone, config, meshed=False)
    assert abs(loss - expected_loss) < 1e-5
    for (path, g), e in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(g, e, atol=1e-5 * max(1, np.abs(e).max()), err_msg=str(path))
        assert np.abs(e).max() > 1e-5


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.sample("data_fsdp_tensor", "seq_striped")
def test_attention_loops_are_silent(name):
    """The loop over layers is one deep, those over query rows and key blocks two and three."""
    text = step(name)[2]
    # Loops of one pass are gone: fewer where sequences are cut.
    assert text.count(" while(") >= (6 if "seq" not in MESHES[name] else 2)
    assert not [c for c in collectives(text) if c[2] > 1]


@pytest.mark.parametrize("name", ["data", "fsdp", "data_fsdp"])
@pytest.mark.sample("data_fsdp")
def test_only_parameters_and_their_gradients_travel(name):
    parts = MESHES[name].get("fsdp", 1)

    def known(shape):
        """A parameter's shape or a layer's part of a stack, whole or cut along one dimension."""
        cuts = [[*shape[:i], n // parts, *shape[i + 1 :]] for i, n in enumerate(shape)]
        return {tuple(sorted(cut)) for cut in (shape, *cuts)}

    shapes = [shape for leaf in jax.tree.leaves(PARAMS) for shape in (leaf.shape, leaf.shape[1:])]
    allowed = set().union(*map(known, shapes)) | {()}
    found = collectives(step(name)[2])
    assert len(found) > 2
    for op, results, _ in found:
        assert all(tuple(sorted(shape)) in allowed for shape in results), (op, results)


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.sample(*SOME)
def test_each_device_keeps_to_its_sequences(name):
    """Sums over heads and features travel with tensor parallelism, tokens with seq, sequences never."""
    sizes = MESHES[name]
    rows = B // (sizes.get("data", 1) * sizes.get("fsdp", 1))
    for op, results, _ in collectives(step(name)[2]):
        for shape in results:
            if T in shape:
                assert shape[0] == rows, (op, shape)
                # Where tokens are exchanged for heads, each device needs the ids of all.
                ids = "seq" in sizes and shape == (rows, T)
                assert op == "all-reduce" or (op == "all-gather" and ids), (op, shape)
            elif "seq" not in sizes:
                assert math.prod(shape) <= CONFIG.vocab_size * CONFIG.width, (op, shape)


@pytest.mark.parametrize("name", [name for name in MESHES if "seq" in MESHES[name]])
@pytest.mark.sample(*SOME)
def test_activations_stay_where_their_tokens_are(name):
    """Only token ids are put in order; inside layers, keys, queries and what goes with them travel."""
    config = dataclasses.replace(CONFIG, **HOW.get(name, {}))
    sizes = MESHES[name]
    rows, here = B // (sizes.get("data", 1) * sizes.get("fsdp", 1)), T // sizes["seq"]
    attention = rows * here * config.heads * config.head_dim * sizes.get("ulysses", 1)
    travelled = False
    for op, results, depth in collectives(step(name)[2]):
        for shape in results:
            if op in ("all-gather", "all-to-all", "collective-permute") and shape[:1] == (rows,):
                travelled |= depth == 1
                assert math.prod(shape) <= (attention if depth else rows * T), (op, shape)
    assert travelled
