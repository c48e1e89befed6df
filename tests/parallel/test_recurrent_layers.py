"""Recurrent layers of sequences that are cut over devices are those of one device, with their gradients."""

import contextlib
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from blockjax.kernels.block_sparse_attention import api as attention_api
from blockjax.kernels.linear_attention import api, reference
from flax import nnx
from jax.sharding import NamedSharding

from blockjax.errors import UsageError
from blockjax.parallel import Layout, make_mesh, partition_spec
from blockjax.recurrence import MIXERS, Past
from blockjax.recurrence.convolution import ShortConvolution
from blockjax.train.config import base_config
from blockjax.train.health import healthy
from blockjax.train.state import TrainState, plan_state
from blockjax.train.step import batch_sharding, make_train_step
from tests.hlo import collectives
from tests.models.tiny import random_params, tiny_config
from tests.parallel.dense import DENSE

T, RUN = 24, 6  # tokens, and those of a run: four runs in either layout
DEVICES = {"contiguous": 4, "zigzag": 2}
# Ends of documents at a border between runs, a token before it, one after it; a document shorter than the
# reach of a convolution across a border; padding from a border on, from within a run, and all but padding.
IDS = np.stack(
    [
        np.repeat([0, 1, 2, 3], [6, 5, 8, 5]),
        np.repeat([5, 6, 5, -1], [5, 2, 10, 7]),
        np.repeat([0, 1, 2, -1], [11, 2, 5, 6]),
        np.repeat([3, 2], [17, 7]),
        np.full(T, -1),
        np.repeat([0, -1], [1, T - 1]),
    ]
).astype(np.int32)
B = len(IDS)


def normal(name, shape):
    return jnp.asarray(np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape), jnp.float32)


def filled(build):
    """`(graph, parameters)` of a module, its parameters filled with NumPy."""
    graph, state = nnx.split(nnx.eval_shape(build))
    return graph, jax.tree_util.tree_map_with_path(
        lambda path, leaf: normal(jax.tree_util.keystr(path), leaf.shape) * 0.5, nnx.to_pure_dict(state)
    )


@pytest.fixture(autouse=True)
def dense(monkeypatch):
    monkeypatch.setattr(attention_api, "BACKENDS", {"dense": DENSE})


@contextlib.contextmanager
def one_token_at_a_time():
    """Without a mesh recurrences are those of the oracle, which compiles in a third of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "BACKENDS", {"reference": reference})
        yield


def compare(graph, args, name, ids, mesh):
    """Outputs, memories and gradients by parameters, x and the memory: with a layout, and without a mesh."""

    def call(layout, args):
        params, x, memory = args
        laid = (lambda a: a) if layout is None else layout.apply
        past = Past(memory, None if ids is None else laid(jnp.asarray(ids)), True, 1, layout)
        y, after = nnx.merge(graph, params)(laid(x), past)
        y = y if layout is None else layout.restore(y)
        return (y if ids is None else jnp.where((ids >= 0).reshape(B, T, *(1,) * (y.ndim - 2)), y, 0)), after

    def both(layout, args):
        out, pullback = jax.vjp(functools.partial(call, layout), args)
        cotangents = [normal(str(i), leaf.shape) for i, leaf in enumerate(jax.tree.leaves(out))]
        return out, pullback(jax.tree.unflatten(jax.tree.structure(out), cotangents))[0]

    with one_token_at_a_time():
        expected = jax.jit(functools.partial(both, None))(args)
    layout = Layout.of(name, T, DEVICES[name], T // (DEVICES[name] * (2 if name == "zigzag" else 1)))
    with jax.set_mesh(mesh):
        found = jax.jit(functools.partial(both, layout))(args)
    for (path, a), e in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        assert np.abs(e).max() > 1e-3, path
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4 * np.abs(e).max(), err_msg=str(path))


def mesh_of(name, **axes):
    sizes = dict(seq=DEVICES[name]) | axes
    return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("layout", DEVICES)
@pytest.mark.sample("*-True")
def test_the_convolution(layout, documents):
    """Heads are cut, too; what lies in padding is not read."""
    graph, params = filled(lambda: ShortConvolution(4, dict(heads=2, head_dim=3), rngs=nnx.Rngs(0)))
    x, ids = normal("x", (B, T, 2, 3)), IDS if documents else None
    if documents:
        x = jnp.where((ids >= 0)[..., None, None], x, jnp.nan)
    compare(graph, (params, x, normal("memory", (B, 3, 2, 3))), layout, ids, mesh_of(layout, tensor=2))


def test_only_the_tokens_before_a_run_travel():
    """And at the end of a row those that are remembered, of all of which each device has a part or zeros."""
    graph, params = filled(lambda: ShortConvolution(4, dict(heads=2, head_dim=3), rngs=nnx.Rngs(0)))
    mesh, layout = mesh_of("zigzag", tensor=2), Layout.of("zigzag", T, 2, RUN)

    def call(params, x, ids):
        return nnx.merge(graph, params)(x, Past(None, ids, True, layout=layout))

    with jax.set_mesh(mesh):
        x, ids = (
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, partition_spec(names)))
            for shape, dtype, names in (
                ((B, T, 2, 3), jnp.float32, ("batch", "time", "heads", None)),
                ((B, T), jnp.int32, ("batch", "time")),
            )
        )
        found = collectives(jax.jit(call).lower(params, x, ids).compile().as_text())
    sizes = [np.prod(shape) for _, shapes, _ in found for shape in shapes]
    assert len(sizes) >= 4 and max(sizes) == B * 3 * 3  # of 12 tokens, one head and three channels there


OPTIONS = dict(lightning={}, ssd=dict(state=6), gdn=dict(conv=3), kda={})


@pytest.mark.parametrize("layout", DEVICES)
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.sample("ssd-zigzag")
def test_a_layer(kind, layout):
    """With documents, from a memory on, which is handed on."""
    config = tiny_config(heads=2, head_dim=8)
    graph, params = filled(lambda: MIXERS[kind](**OPTIONS[kind]).build(config, rngs=nnx.Rngs(0)))
    x = normal("x", (B, T, config.width))
    memory = jax.tree.map(lambda leaf: normal(str(leaf.shape), leaf.shape), nnx.merge(graph, params).empty(B))
    compare(graph, (params, x, memory), layout, IDS, mesh_of(layout, data=2))


def step_of(pattern, layout, mesh):
    """`(state, metrics)` after one training step that goes on from a memory, in rows of documents."""
    model = tiny_config(
        pattern=pattern, depth=pattern.count(",") + 1, layout=layout, heads=2, attention_block=3
    )
    config = base_config()
    config.data.update(carry=True, seq_len=T, batch_size=4)
    # The update is the gradient.
    optimizer = optax.sgd(1.0)
    with jax.set_mesh(mesh):
        plan = plan_state(model, config, mesh)
        params, memory = plan.abstract.params, plan.abstract.memory
        filled = jax.tree.map(lambda leaf: normal(str(leaf.shape), leaf.shape), memory)
        places = jax.tree.map(lambda leaf: leaf.sharding, (params, memory))
        params, memory = jax.device_put((random_params(model)[1], filled), places)
        state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), healthy(), memory)
        step = jax.jit(make_train_step(plan.graph, optimizer))
        return jax.device_get(step(state, jax.device_put(batch(), batch_sharding(mesh))))


def batch():
    """The last row starts a document, the others go on."""
    ids = IDS[:4]
    starts = np.diff(ids, axis=1, prepend=ids[:, :1]) != 0
    starts[3, 0] = True
    index = np.arange(T)
    tokens = np.random.default_rng(0).integers(0, 24, (4, T + 1)).astype(np.int32)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    return dict(
        tokens=tokens[:, :-1], targets=np.where(ids < 0, -1, tokens[:, 1:]).astype(np.int32),
        positions=positions.astype(np.int32), segment_ids=ids, starts=starts,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "layout", "axes"),
    [
        ("lightning,8", "contiguous", dict(data=2, seq=2)),
        ("ssd:state=6,8", "contiguous", dict(data=2, seq=4)),
        ("lightning,full", "zigzag", dict(fsdp=2, seq=2, tensor=2)),
        ("kda,gdn,full", "zigzag", dict(fsdp=2, seq=2, tensor=2)),
    ],
)
@pytest.mark.sample("lightning,8-*")
def test_a_training_step_of_recurrence_and_attention(pattern, layout, axes):
    """Loss, updated parameters and what is remembered; attention is cut along with the rest."""
    with one_token_at_a_time():
        expected = step_of(pattern, layout, make_mesh({}, jax.devices()[:1]))
    found = step_of(pattern, layout, make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))]))
    for (path, a), e in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4 * np.abs(e).max(), err_msg=str(path))


@pytest.mark.parametrize(
    ("values", "devices", "words"),
    [
        (dict(pattern="gdn,brt:window=8/states=3"), 2, ["'brt:window=8/states=3'", "mesh.seq=1, not 2"]),
        (
            dict(pattern="gdn,full", layout="striped"),
            4,
            ["'gdn,full'", "'contiguous' or 'zigzag'", "'striped'"],
        ),
        (dict(pattern="gdn,full", layout="balanced"), 4, ["run.layout", "'balanced'"]),
        (dict(pattern="lightning,ssd:conv=8", layout="zigzag"), 2, ["runs of 6 tokens", "reaches 7"]),
    ],
)
def test_what_cannot_be_cut_is_refused(values, devices, words):
    config = tiny_config(**values)
    with pytest.raises(UsageError) as error:
        config.sequence_layout(T, devices)
    assert all(word in str(error.value) for word in words), error.value


def test_runs_as_long_as_a_convolution_reaches_serve():
    assert tiny_config(pattern="gdn:conv=7", layout="zigzag").sequence_layout(T, 2).pieces == (1, -1)
