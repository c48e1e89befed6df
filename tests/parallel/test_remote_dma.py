"""The ring of one TPU kernel with remote copies: interpreted with race detection, and compiled for chips.

The interpreter runs a device a thread, knows which accesses nothing orders, fills memory with NaN, and
carries a copy out at once (`eager`) or when it is waited for (`on_wait`). Gradients of shards are dense here.
"""

import functools
import inspect
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blockjax.kernels.block_sparse_attention import api, block_sparse_attention, reference, tpu
from blockjax.kernels.block_sparse_attention.spec import Tiles
from blockjax.kernels.block_sparse_attention.tpu import layout, ring, walk
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from blockjax.errors import UsageError
from blockjax.masks import BlockMask, Causal
from blockjax.parallel.attention import attention
from blockjax.parallel.layouts import LAYOUTS
from experiments import tpu_schedule
from tests.compiling import compile_elsewhere
from tests.kernels.block_sparse_attention_suite import random_blocks
from tests.parallel.dense import DENSE
from tests.parallel.test_attention import compare, make, mesh_of

EXHAUSTIVE = pytest.mark.exhaustive
MODES = "eager", "on_wait"
BLOCK = 64
BLOCKS = dict(bq=BLOCK, bk=BLOCK)


@pytest.fixture
def interpreted(monkeypatch, capfd):
    """`interpreted(mode)`: from then on kernels are; a semaphore left above zero fails the test."""
    monkeypatch.setattr(api, "BACKENDS", {"dense": DENSE, "tpu": tpu, "reference": reference})
    monkeypatch.setattr(layout, "TILES", dict.fromkeys(layout.TILES, Tiles(*[(128, 256)] * 3)))
    monkeypatch.setattr(walk, "UNROLLED", 1)

    def start(mode="on_wait", **params):
        params = pltpu.InterpretParams(
            detect_races=True, uninitialized_memory="nan", dma_execution_mode=mode, **params
        )
        monkeypatch.setattr(tpu, "INTERPRET", params)

    yield start
    assert "non-zero count" not in capfd.readouterr().out
    pltpu.reset_tpu_interpret_mode_state()


def lists(T, heads=2):
    blocks = random_blocks(0, heads, T // BLOCK, T // BLOCK)
    return BlockMask.from_block_bool(blocks, **BLOCKS, predicate=Causal())


MASKS = {
    "causal": lambda T: BlockMask.causal(T, **BLOCKS),
    "window": lambda T: BlockMask.window(T, left=100, **BLOCKS),
    "window of both sides": lambda T: BlockMask.window(T, left=50, right=70, **BLOCKS),
    "full": lambda T: BlockMask.full(T, **BLOCKS),
    "lists": lists,
    "or": lambda T: BlockMask.window(T, left=70, **BLOCKS) | lists(T),
}
CASES = [
    ("window of both sides", "contiguous", 3, 2, "on_wait"),
    ("or", "zigzag", 4, 1, "eager"),
]
ALL = [
    ("causal", "contiguous", 2, 2, "on_wait"),
    ("full", "contiguous", 8, 2, "on_wait"),
] + [
    (*case, 1 + i % 2, MODES[i // 2 % 2])
    for i, case in enumerate(itertools.product(MASKS, LAYOUTS, (2, 3, 4, 8)))
]


@pytest.mark.parametrize(
    ("mask", "layout", "P", "K", "mode"), [*CASES, *(pytest.param(*x, marks=EXHAUSTIVE) for x in ALL)]
)
@pytest.mark.sample("window of both sides*")
def test_equals_dense(mask, layout, P, K, mode, interpreted):
    interpreted(mode)
    T = BLOCK * P * (1 + (layout == "zigzag"))
    compare(P, MASKS[mask](T), 2, K, B=1, schedule="ring_dma", layout=layout)


def run(inputs, mask, mesh, **how):
    return jax.jit(functools.partial(attention, mask=mask, mesh=mesh, schedule="ring_dma", **how))(*inputs)


@pytest.mark.exhaustive
def test_options_and_documents(interpreted):
    interpreted("eager")
    T, how = 4 * BLOCK, dict(schedule="ring_dma", layout="striped")
    ids = np.sort(np.random.default_rng(0).integers(-1, 4, (1, T)))
    learned = dict(slope=jnp.array([0.01, 0.5]), sinks=jnp.array([-1.0, 2.0]))
    arrays, options = dict(q_segment_ids=ids), dict(soft_cap=1.5, scale=0.7)
    compare(2, MASKS["or"](T), 2, 1, learned, arrays, options, B=1, **how)


def test_a_hop_that_no_one_needs_only_passes_keys_on(interpreted):
    """Every place sees the keys of the second one before it, some also their own."""
    interpreted("on_wait")
    blocks = np.roll(np.eye(5, dtype=bool), 2, 0) | np.diag([True, True, False, False, True])
    mask = BlockMask.from_block_bool(blocks, **BLOCKS)
    assert layout.Route.of("seq", 5, 1, [2], 1).copies == (2, 0)
    compare(5, mask, 2, 1, B=1, schedule="ring_dma")


@pytest.mark.exhaustive
def test_bfloat16(interpreted):
    interpreted("eager")
    mask = MASKS["causal"](4 * BLOCK)
    inputs = [x.astype("bfloat16") for x in make(mask, 2, 1)[0]]
    o, lse = run(inputs, mask, mesh_of(2), layout="zigzag", return_lse=True)
    wide = [x.astype("float32") for x in inputs]
    exact = block_sparse_attention(*wide, mask, implementation="reference", return_lse=True)
    np.testing.assert_allclose(o.astype("float32"), exact[0], rtol=5e-3, atol=3e-3 * np.abs(exact[0]).max())
    np.testing.assert_allclose(lse, exact[1], rtol=5e-3, atol=3e-3)


def test_calls_in_one_program_while_devices_are_late(interpreted):
    """Each device holds up others at another of its steps."""
    steps = itertools.count()

    def dawdle(token, place, core):
        if next(steps) % 3 == 0:
            time.sleep(0.05)
        return token

    interpreted("eager", grid_point_recorder=dawdle)
    mask = MASKS["full"](3 * BLOCK)
    (q, k, v), _ = make(mask, 2, 1, B=1)

    def twice(call):
        return call(call(q, k, v), k, v)

    ours = jax.jit(lambda: twice(lambda *x: run(x, mask, mesh_of(3))))()
    exact = twice(lambda *x: block_sparse_attention(*x, mask, implementation="reference"))
    np.testing.assert_allclose(ours, exact, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "how"),
    [
        (dict(data=2, seq=2, tensor=2), dict(batch="data", heads="tensor")),
        pytest.param(dict(data=1, seq=4), dict(ulysses=2, batch="data"), marks=EXHAUSTIVE),
        pytest.param(dict(seq=6, data=1), dict(ulysses=2), marks=EXHAUSTIVE),
    ],
)
@pytest.mark.exhaustive
def test_neighbours_on_a_mesh_of_several_axes(sizes, how, interpreted):
    interpreted("on_wait")
    devices = jax.devices()[: np.prod([*sizes.values()])]
    mesh = jax.make_mesh((*sizes.values(),), (*sizes,), (AxisType.Auto,) * len(sizes), devices=devices)
    mask = MASKS["causal"](sizes["seq"] * BLOCK)
    inputs, _ = make(mask, 4, 2)
    ours = run(inputs, mask, mesh, **how)
    exact = block_sparse_attention(*inputs, mask, implementation="reference")
    np.testing.assert_allclose(ours, exact, atol=1e-5)


@pytest.mark.parametrize("mode", ["on_wait", pytest.param("eager", marks=EXHAUSTIVE)])
def test_a_credit_too_early_is_a_race(mode, interpreted, monkeypatch, caplog):
    """What the tests above rely on: of six places the last round writes where the second one read."""
    if "on_race" not in inspect.signature(pltpu.InterpretParams).parameters:
        pytest.skip("this JAX does not tell of races")
    grant = ring.RingForward.grant

    def grant_all(self, way, credits=None):
        if credits is not None:
            grant(self, way, self.call.route.copies[way])

    monkeypatch.setattr(ring.RingForward, "grant", grant_all)
    interpreted(mode, on_race="warn")
    mask = MASKS["full"](6 * BLOCK)
    jax.block_until_ready(run(make(mask, 2, 1, B=1)[0], mask, mesh_of(6)))
    assert "RACE DETECTED" in caplog.text


@pytest.mark.parametrize(
    ("mode", "how", "reason"),
    [
        (None, {}, "its forward is a TPU kernel, and this runs on cpu"),
        ("eager", dict(implementation="xla"), "not implementation='xla'"),
    ],
)
def test_refused_with_the_reason(mode, how, reason, interpreted):
    if mode:
        interpreted(mode)
    mask = MASKS["causal"](2 * BLOCK)
    with pytest.raises(UsageError, match=f"schedule='ring_dma' cannot serve this call: .*{reason}"):
        attention(*make(mask, 2, 1)[0], mask, mesh=mesh_of(2), schedule="ring_dma", **how)


COMPILED = [
    (dict(seq=4), "causal", "zigzag", {}),
    (dict(data=2, seq=2), "lists", "contiguous", dict(batch="data")),
    (dict(seq=2, tensor=2), "window", "contiguous", dict(heads="tensor")),
]


def compile_for(chip, cases):
    """The forwards of these of `COMPILED`; runs in a process of its own."""
    from jax.experimental import topologies

    topology = tpu_schedule.TOPOLOGIES[chip]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    for sizes, name, order, how in (COMPILED[i] for i in cases):
        auto = (AxisType.Auto,) * len(sizes)
        mesh = jax.sharding.Mesh(np.reshape(devices, [*sizes.values()]), [*sizes], axis_types=auto)
        mask = {
            "causal": BlockMask.causal(4096, bq=512, bk=512),
            "window": BlockMask.window(4096, left=3000, bq=512, bk=512),
            "lists": BlockMask.from_block_bool(np.tri(32, dtype=bool), bq=128, bk=128),
        }[name]
        spec = jax.P(how.get("batch"), "seq", how.get("heads"))
        by, all_of = (jax.sharding.NamedSharding(mesh, x) for x in (spec, jax.P()))
        q, k = (jax.ShapeDtypeStruct((2, 4096, n, 128), "bfloat16", sharding=by) for n in (4, 2))
        ids = jax.ShapeDtypeStruct((1, 4096), "int32", sharding=all_of)

        def call(q, k, v, ids, mask=mask, mesh=mesh, order=order, how=how):
            return attention(
                q, k, v, mask, q_segment_ids=ids, mesh=mesh, schedule="ring_dma", layout=order,
                implementation="tpu", **how,
            )  # fmt: skip

        with jax.sharding.set_mesh(mesh):
            text = jax.jit(call).lower(q, k, k, ids).compile().as_text()
        assert text.count('custom_call_target="tpu_custom_call"') == 1 and "collective-permute" not in text


@pytest.mark.parametrize(
    ("chip", "cases"),
    [
        # Over the chips everything once.
        *((chip, [i]) for i, chip in enumerate(tpu_schedule.TOPOLOGIES)),
        *(pytest.param(chip, range(len(COMPILED)), marks=EXHAUSTIVE) for chip in tpu_schedule.TOPOLOGIES),
    ],
)
@pytest.mark.sample("v5e*")
def test_compiles_for(chip, cases):
    compile_elsewhere("tests.parallel.test_remote_dma", chip, cases)
