"""The mesh and the rules that place arrays on it."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from blockjax.errors import UsageError
from blockjax.parallel import MESH_AXES, RULES, constrain, cut, make_mesh, partition_spec, shardings
from blockjax.parallel.mesh import compiler_options
from blockjax.train.config import base_config
from blockjax.train.state import plan_state
from tests.models.tiny import tiny_config


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        (dict(data=8), (8, 1, 1, 1)),
        (dict(data=-1), (8, 1, 1, 1)),
        (dict(data=-1, tensor=2), (4, 1, 1, 2)),
        (dict(fsdp=2, seq=-1, data=1), (1, 2, 4, 1)),
        (dict(data=2, fsdp=2, seq=2, tensor=-1), (2, 2, 2, 1)),
    ],
)
def test_mesh_has_four_axes_and_all_devices(sizes, shape):
    mesh = make_mesh(sizes)
    assert mesh.axis_names == MESH_AXES == ("data", "fsdp", "seq", "tensor")
    assert mesh.devices.shape == shape
    assert mesh.axis_types == (AxisType.Auto,) * 4


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (dict(data=4), ["data=4", "4 devices", "there are 8", "-1"]),
        (dict(data=16), ["data=16", "16 devices", "there are 8"]),
        (dict(data=-1, tensor=3), ["multiple of 3", "there are 8"]),
        (dict(data=-1, fsdp=-1), ["at most one may be -1"]),
        (dict(data=8, fsdp=0), ["fsdp=0", "at least 1"]),
        (dict(data=-2), ["data=-2", "at least 1"]),
        (dict(data=4, tensors=2), ["'tensors'", "'tensor'"]),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_the_numbers(sizes, words):
    with pytest.raises(UsageError) as error:
        make_mesh(sizes)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_mesh_of_given_devices():
    assert make_mesh(dict(data=-1), jax.devices()[:2]).devices.shape == (2, 1, 1, 1)


def test_rules_name_each_axis_once_and_known_mesh_axes():
    names = [name for name, _ in RULES]
    assert len(names) == len(set(names))
    assert {axis for _, axes in RULES for axis in axes} <= set(MESH_AXES)


def test_partition_of_names():
    assert partition_spec(("batch", "time", None)) == P(("data", "fsdp"), "seq", None)
    assert partition_spec(("layers", "model", "heads", "head_dim")) == P(None, "fsdp", "tensor", None)
    assert partition_spec(()) == P()
    with pytest.raises(KeyError, match="'tim'"):
        partition_spec(("batch", "tim"))


BLOCK = {
    ("attention", "q"): ("fsdp", "tensor", None),
    ("attention", "k"): ("fsdp", "tensor", None),
    ("attention", "v"): ("fsdp", "tensor", None),
    ("attention", "o"): ("tensor", None, "fsdp"),
    ("attention", "q_norm", "gain"): (None,),
    ("attention", "k_norm", "gain"): (None,),
    ("attention_norm", "gain"): (None,),
    ("mlp_norm", "gain"): (None,),
    ("mlp", "gate"): ("fsdp", "tensor"),
    ("mlp", "up"): ("fsdp", "tensor"),
    ("mlp", "down"): ("tensor", "fsdp"),
}
GOLDEN = {
    ("embedding",): ("tensor", "fsdp"),
    ("head",): ("fsdp", "tensor"),
    ("final_norm", "gain"): (None,),
    **{
        ("periods", slot, *path): (None, *spec)
        for slot in ("slot_0", "slot_1")
        for path, spec in BLOCK.items()
    },
    **{("tail", "slot_0", *path): spec for path, spec in BLOCK.items()},
}


def plan(mesh, optimizer="adamw", **options):
    model = dict(vocab_size=32, depth=3, head_dim=4, ffn=24, pattern="8,full", dtype="bfloat16")
    config = base_config()
    config.optimizer.name = optimizer
    return plan_state(tiny_config(**(model | options)), config, mesh)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_where_every_part_of_the_state_lives(optimizer):
    mesh = make_mesh(dict(data=2, fsdp=2, tensor=2))
    state = plan(mesh, optimizer).abstract

    def table(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {tuple(key.key for key in path): tuple(leaf.sharding.spec) for path, leaf in leaves}

    assert table(state.params) == GOLDEN
    assert state.step.sharding.spec == P()
    # Moments have the shapes of their parameters, and lie beside them.
    moments = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        owner = next((names[i:] for i in range(len(names)) if names[i:] in GOLDEN), None)
        assert tuple(leaf.sharding.spec) == (GOLDEN[owner] if owner else ()), path
        assert owner or leaf.size <= 3  # counts, and Muon's coefficients
        moments += owner is not None
    assert moments >= len(GOLDEN) * (2 if optimizer == "adamw" else 1)


@pytest.mark.parametrize(
    ("mesh", "options", "words"),
    [
        (dict(fsdp=8), dict(width=12), ["12 along 'model'", "fsdp=8"]),
        (dict(tensor=8), dict(), ["along", "tensor=8"]),
        (dict(tensor=4, data=2), dict(), ["2 along 'kv_heads'", "tensor=4"]),
    ],
)
def test_parameters_that_do_not_divide_are_refused_with_the_numbers(mesh, options, words):
    with pytest.raises(UsageError) as error:
        plan(make_mesh(mesh), **options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_dimensions_over_two_mesh_axes_divide_by_their_product():
    mesh, shape = make_mesh(dict(data=2, fsdp=4)), jax.ShapeDtypeStruct((12,), jnp.float32)
    with pytest.raises(UsageError, match=r"12 along 'batch'.*data\*fsdp=8"):
        shardings(mesh, {"x": shape}, {"x": ("batch",)})


def test_constrain_does_nothing_without_a_mesh():
    x = jnp.ones((3, 5))
    assert constrain(x, ("batch", "time")) is x
    assert "sharding" not in str(jax.make_jaxpr(lambda x: constrain(x, ("batch", "time")))(x))


def test_constrain_places_an_activation():
    with jax.set_mesh(make_mesh(dict(data=2, fsdp=2, seq=2))):
        place = jax.jit(lambda x: constrain(x, ("batch", "time", None)))
        assert place(jnp.ones((8, 4, 3))).sharding.spec == P(("data", "fsdp"), "seq")


def test_cut_names_the_axes_that_divide():
    assert cut("batch", 8) is None
    for sizes, batch, heads in (
        (dict(data=2, fsdp=2, tensor=2), ("data", "fsdp"), ("tensor",)),
        (dict(data=8), ("data", "fsdp"), ("tensor",)),
        (dict(tensor=8), ("data", "fsdp"), None),
    ):
        with jax.set_mesh(make_mesh(sizes)):
            assert cut("batch", 8) == batch and cut("heads", 4) == heads


def test_options_of_the_compiler_are_for_gpus_and_known_to_it():
    def mesh(platform, seq):
        return SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]), shape=dict(seq=seq))

    assert compiler_options(mesh("gpu", 1)) == compiler_options(mesh("tpu", 2)) == {}
    options = compiler_options(mesh("gpu", 2))
    assert options["xla_gpu_enable_latency_hiding_scheduler"]
    jax.jit(lambda x: x + 1).lower(1.0).compile(options)  # an option that XLA does not know is an error
