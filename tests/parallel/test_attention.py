"""Every schedule, mask and layout is dense attention, exactly, with its gradients."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blockjax.kernels.block_sparse_attention import DistanceBias, api, block_sparse_attention, reference
from jax.sharding import AxisType

from blockjax import partials
from blockjax.errors import UsageError
from blockjax.masks import BlockMask, Causal, Ranges
from blockjax.parallel import circulate
from blockjax.parallel.attention import attention
from blockjax.parallel.layouts import LAYOUTS, Layout, lockstep, work
from blockjax.parallel.schedules import SCHEDULES
from blockjax.parallel.shards import add
from tests.jaxprs import equations
from tests.kernels.block_sparse_attention_suite import random_blocks
from tests.parallel.dense import DENSE

BLOCKS = dict(bq=8, bk=8)
MASKS = {
    "causal": lambda T: BlockMask.causal(T, **BLOCKS),
    "window": lambda T: BlockMask.window(T, left=13, **BLOCKS),
    "window of both sides": lambda T: BlockMask.window(T, left=7, right=9, **BLOCKS),
    "full": lambda T: BlockMask.full(T, **BLOCKS),
    "lists a head": lambda T: BlockMask.from_block_bool(
        random_blocks(0, 4, T // 8, T // 8), **BLOCKS, predicate=Causal()
    ),
    "lists a key head": lambda T: BlockMask.from_block_bool(random_blocks(1, 2, T // 8, T // 8), **BLOCKS),
    "or": lambda T: (
        BlockMask.window(T, left=9, **BLOCKS)
        | BlockMask.from_block_bool(random_blocks(2, 4, T // 8, T // 8), **BLOCKS, predicate=Causal())
    ),
}
ANYWHERE = [name for name in SCHEDULES if name != "ring_dma"]
DEVICES = 2, 3, 4, 8
KEY_HEADS = 1, 2, 4


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Shards are dense where schedules are tested: compiled in a fraction of the time."""
    if "real" in request.keywords:
        return
    monkeypatch.setattr(api, "BACKENDS", {"dense": DENSE, "reference": reference})


@functools.cache
def mesh_of(P):
    return jax.make_mesh((P,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:P])


def make(mask, N, K, B=2, H=4):
    rng = np.random.default_rng(0)
    shapes = (B, mask.T, N, H), (B, mask.S, K, H), (B, mask.S, K, H), (B, mask.T, N, H), (B, N, mask.T)
    *qkv, do, dlse = (jnp.asarray(rng.normal(size=shape), "float32") for shape in shapes)
    return qkv, (do, dlse)


def both(call, inputs, cotangents, learned=None):
    """`(o, lse)` and gradients."""

    def run(inputs, learned):
        extra = dict(learned)
        bias = DistanceBias(extra.pop("slope")) if "slope" in extra else None
        return call(*inputs, bias=bias, return_lse=True, **extra)

    @jax.jit
    def f(inputs, cotangents, learned):
        out, pullback = jax.vjp(run, inputs, learned)
        return out, pullback(cotangents)

    return f(inputs, cotangents, learned or {})


def compare(P, mask, N=4, K=2, learned=None, arrays=None, options=None, B=2, exact=None, **how):
    inputs, cotangents = make(mask, N, K, B)
    shared = dict(mask=mask, **(arrays or {}), **(options or {}))
    ours = both(functools.partial(attention, mesh=mesh_of(P), **how, **shared), inputs, cotangents, learned)
    if exact is None:
        whole = functools.partial(block_sparse_attention, implementation="reference", **shared)
        exact = both(whole, inputs, cotangents, learned)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b[np.isfinite(b)]).max(initial=0)), rtol=0)
    return ours


ALL = [
    case
    for case in itertools.product(ANYWHERE, LAYOUTS, MASKS, DEVICES, KEY_HEADS)
    if case[0] != "halo" or (case[1] == "contiguous" and "window" in case[2] and case[3] < 8)
    if "key head" not in case[2] or case[4] == 2
]
# Each schedule, layout and mask with numbers of devices and heads in turn.
SHUFFLED = [ALL[i * 37 % len(ALL)] for i in range(len(ALL))]
SOME = {case for place in range(3) for case in {case[place]: case for case in SHUFFLED}.values()}


@functools.cache
def dense(mask, P, K):
    """What all schedules and layouts are compared with."""
    whole = MASKS[mask](16 * P)
    call = functools.partial(block_sparse_attention, implementation="reference", mask=whole)
    return both(call, *make(whole, 4, K))


@pytest.mark.parametrize(("schedule", "layout", "mask", "P", "K"), ALL)
@pytest.mark.sample(*("-".join(map(str, case)) for case in SOME))
def test_equals_dense(schedule, layout, mask, P, K):
    compare(P, MASKS[mask](16 * P), K=K, exact=dense(mask, P, K), schedule=schedule, layout=layout)


IDS = np.sort(np.random.default_rng(0).integers(-1, 4, (2, 64)))
OPTIONS = {
    "documents": dict(arrays=dict(q_segment_ids=IDS)),
    "positions": dict(arrays=dict(q_positions=np.arange(64) // 2, kv_positions=np.arange(64) // 2)),
    "soft cap and scale": dict(options=dict(soft_cap=1.5, scale=0.7)),
    "sinks": dict(learned=dict(sinks=jnp.array([-1.0, 0.0, 2.0, 9.0]))),
    "bias": dict(learned=dict(slope=jnp.array([0.01, 0.1, 0.5, 2.0]))),
}


TOGETHER = dict(
    arrays=OPTIONS["documents"]["arrays"],
    options=OPTIONS["soft cap and scale"]["options"],
    learned=OPTIONS["sinks"]["learned"] | OPTIONS["bias"]["learned"],
)
EVERYWHERE = [x for x in ANYWHERE if x != "halo"]


@pytest.mark.parametrize("schedule", EVERYWHERE)
@pytest.mark.sample("token_ring_direct")
def test_options_together(schedule):
    compare(4, MASKS["or"](64), schedule=schedule, layout="zigzag", **TOGETHER)


@pytest.mark.parametrize("schedule", EVERYWHERE)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.sample("positions-ring", "positions-token_ring_direct")
def test_options(name, schedule):
    mask = MASKS["or"](64)
    if name == "positions":
        mask = BlockMask.from_predicate(Causal(), 64, **BLOCKS, prune=False)
    compare(4, mask, schedule=schedule, layout="zigzag", **OPTIONS[name])


def test_options_of_the_halo_together():
    compare(4, MASKS["window"](64), schedule="halo", **TOGETHER)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [x for x in OPTIONS if x != "positions"])
def test_options_of_the_halo(name):
    compare(4, MASKS["window"](64), schedule="halo", **OPTIONS[name])


@pytest.mark.parametrize("schedule", EVERYWHERE)
@pytest.mark.parametrize("layout", ["contiguous", "striped"])
@pytest.mark.sample("striped-ring", "contiguous-token_ring_direct")
def test_lengths_that_divide_by_nothing(layout, schedule):
    mask = BlockMask.causal(75, 93, bq=16, bk=8, q_offset=18)
    compare(4, mask, schedule=schedule, layout=layout, learned=dict(slope=jnp.full(4, 0.1)))


def test_halo_of_a_whole_shard():
    """XLA's GPU compiler (jax 0.11.2) dies of a scatter that covers a whole shard."""
    mask = BlockMask.window(64, left=15, right=0, **BLOCKS)
    compare(4, mask, schedule="halo")
    inputs, (do, _) = make(mask, 4, 2)
    call = functools.partial(attention, mesh=mesh_of(4), mask=mask, schedule="halo")
    assert "scatter" not in str(jax.make_jaxpr(lambda *x: jax.vjp(call, *x)[1](do))(*inputs))


def test_halo_of_a_ragged_length():
    compare(3, BlockMask.window(50, left=9, right=4, **BLOCKS), schedule="halo")


@pytest.mark.parametrize(("P", "ulysses"), [(4, 4), (8, 2)])
@pytest.mark.parametrize(("N", "K"), [(8, 8), (8, 2), (8, 1)])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("schedule", ["ring", "two_stream_ring", "all_gather"])
@pytest.mark.sample("ring-contiguous-8-2-4-4", "all_gather-zigzag-8-1-4-4")
def test_ulysses(schedule, layout, N, K, P, ulysses):
    T = 16 * P
    mask = BlockMask.from_block_bool(random_blocks(0, N, T // 8, T // 8), **BLOCKS, predicate=Causal())
    arrays = dict(q_segment_ids=np.sort(np.random.default_rng(0).integers(-1, 4, (2, T))))
    learned = dict(slope=jnp.geomspace(0.5, 0.01, N))
    compare(P, mask, N, K, learned, arrays, schedule=schedule, layout=layout, ulysses=ulysses)


def test_ranges_stay_ranges(monkeypatch):
    """Lists are of larger blocks, and take time to make."""
    seen = []

    def forward(inputs, options):
        seen.append(inputs.mask)
        return DENSE.forward_pass(inputs, options)

    backend = types.SimpleNamespace(**vars(DENSE) | dict(forward_pass=forward))
    monkeypatch.setattr(api, "BACKENDS", {"dense": backend})
    mask = BlockMask.causal(64, **BLOCKS)
    for how in (dict(ulysses=4), dict(ulysses=1, schedule="ring")):
        call = functools.partial(attention, mask=mask, mesh=mesh_of(4), layout="zigzag", **how)
        jax.eval_shape(call, *make(mask, 4, 4)[0])
    assert len(seen) == 1 + 4
    assert all(isinstance(mask, Ranges) for mask in seen)
    assert seen[0].q_blocks is None


def test_gradients_of_a_layout_are_a_permutation():
    layout = Layout.of("zigzag", 32, 4, 4)
    x, dy = (jnp.arange(start, start + 64.0).reshape(2, 32) for start in (0, 100))
    y, pullback = jax.vjp(layout.apply, x)
    np.testing.assert_array_equal(layout.restore(y), x)
    np.testing.assert_array_equal(pullback(dy)[0], layout.restore(dy))
    np.testing.assert_array_equal(jax.vjp(layout.restore, y)[1](dy)[0], layout.apply(dy))
    assert "scatter" not in str(jax.make_jaxpr(pullback)(dy))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("schedule", EVERYWHERE)
@pytest.mark.sample("ring-contiguous")
def test_masks_made_inside_jit(schedule, layout):
    inputs, (do, _) = make(BlockMask.causal(64, **BLOCKS), 4, 2)
    blocks = random_blocks(3, 4, 8, 8)

    def loss(call, q, k, v, left, blocks):
        window = BlockMask.window(64, left=left, **BLOCKS)
        lists = BlockMask.from_block_bool(blocks, **BLOCKS, predicate=Causal())
        return sum(jnp.sum(call(q, k, v, mask) * do) for mask in (window, lists))

    def gradients(call):
        return jax.jit(jax.grad(functools.partial(loss, call), (0, 1, 2)))(*inputs, 20, blocks)

    ours = gradients(functools.partial(attention, mesh=mesh_of(4), schedule=schedule, layout=layout))
    exact = gradients(functools.partial(block_sparse_attention, implementation="reference"))
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.real
@pytest.mark.parametrize("schedule", ANYWHERE)
@pytest.mark.sample("ring", "halo")
def test_shards_computed_by_the_op(schedule):
    layout = "contiguous" if schedule == "halo" else "zigzag"
    compare(4, MASKS["window"](128), schedule=schedule, layout=layout)
    if schedule != "halo":
        compare(4, MASKS["or"](64), schedule=schedule, layout=layout)


@pytest.mark.real
def test_one_device_is_the_op_bit_for_bit():
    mask = MASKS["or"](64)
    inputs, cotangents = make(mask, 4, 2)
    ours = both(functools.partial(attention, mesh=mesh_of(1), mask=mask), inputs, cotangents)
    alone = both(functools.partial(block_sparse_attention, mask=mask), inputs, cotangents)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_kernels_rounded_is_summed_in_float32():
    assert float(add(jnp.bfloat16(256), jnp.bfloat16(1))) == 257
    o, lse = partials.merge(
        (jnp.full(1, 256, "bfloat16"), jnp.zeros(())), (jnp.ones(1, "bfloat16"), jnp.zeros(()))
    )
    assert o.dtype == lse.dtype == jnp.float32 and float(o[0]) == 128.5


def permutes(P, mask, **how):
    """Collective permutes of a forward, and of forward and backward."""
    inputs, (do, _) = make(mask, 4, 2)
    call = functools.partial(attention, mesh=mesh_of(P), mask=mask, **how)
    forward = str(jax.make_jaxpr(call)(*inputs))
    backward = str(jax.make_jaxpr(lambda *x: jax.vjp(call, *x)[1](do))(*inputs))
    return forward.count("ppermute["), backward.count("ppermute[")


def test_sends_are_as_many_as_the_schedule_says():
    P, T = 4, 64
    causal, window = MASKS["causal"](T), MASKS["window"](T)
    # Keys and values go to P - 1 others. In the backward so do they, and their gradients come home as well.
    assert permutes(P, causal, schedule="ring") == (2 * 3, 2 * 3 + (2 * 3 + 2 * 3))
    # Both ways: half of the heads each in the backward.
    assert permutes(P, causal, schedule="two_stream_ring") == (2 * 3, 2 * 3 + 2 * (2 * 3 + 2 * 3))
    # q goes out, o and lse come home; then q, do, lse and delta, and dq comes home: of each half of heads.
    assert permutes(P, causal, schedule="token_ring") == (2 * 9, 2 * 9 + 2 * (4 * 3 + 3))
    assert permutes(P, causal, schedule="token_ring_direct") == (9, 9 + 4 * 3 + 3)
    # A window of 13 tokens reaches one place of 16: other hops do not happen.
    assert permutes(P, window, schedule="ring") == (2, 2 + 2 + 2)
    assert permutes(P, window, schedule="halo") == (2, 2 + 2 + 2)
    assert permutes(P, causal, schedule="all_gather") == (0, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [64, 61])
def test_layouts_are_permutations_that_can_be_undone(layout, length):
    found = Layout.of(layout, length, 4, 8, [BlockMask.causal(length, **BLOCKS)])
    assert sorted(found.order.ravel()) == list(range(found.order.size))
    x = np.random.default_rng(0).normal(size=(2, length, 3)).astype("float32")
    np.testing.assert_array_equal(found.restore(found.apply(x)), x)


def test_layouts_balance_a_causal_mask():
    mask = BlockMask.causal(1024, **BLOCKS)
    tables = {name: work(mask, *[Layout.of(name, 1024, 4, 8, [mask])] * 2) for name in LAYOUTS}
    for table in tables.values():
        assert table.sum() == mask.counts_per_row().sum()
    # Of 32 blocks a place, a diagonal shard lists 33 / 64; the first hop costs that, each other one all.
    assert lockstep(tables["contiguous"]) == pytest.approx((6 + 4 * 33 / 64) / (4 * (3 + 33 / 64)))
    assert all(lockstep(tables[name]) > 0.95 for name in ("zigzag", "striped", "balanced"))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (dict(schedule="rings"), "Unknown schedule 'rings'"),
        (dict(layout="zag"), "Unknown layout 'zag'"),
        (dict(axis="rows"), "The mesh has no axis 'rows'; its axes are: seq"),
        (dict(ulysses=3), "ulysses=3 does not divide the 4 devices"),
        (
            dict(schedule="halo", layout="zigzag"),
            "schedule='halo' cannot serve this call: it needs the layout",
        ),
        (dict(schedule="halo", mask=MASKS["causal"](64)), "no longer than a shard"),
        (dict(heads=("seq",)), "2 key heads do not divide over seq=4"),
    ],
)
def test_refused_with_the_reason(how, words):
    inputs, _ = make(MASKS["window"](64), 4, 2)
    with pytest.raises(UsageError, match=words):
        attention(*inputs, **dict(mask=MASKS["window"](64), mesh=mesh_of(4)) | how)


def test_arrays_that_lie_so_already_are_not_moved():
    P, mask = 4, BlockMask.causal(64, **BLOCKS)
    layout = Layout.of("zigzag", 64, P, 8)
    (q, k, v), _ = make(mask, 4, 2)
    ids = jnp.asarray(np.repeat([[0, 1], [3, 3]], 32, axis=1), jnp.int32)
    call = functools.partial(attention, mask=mask, mesh=mesh_of(P), return_lse=True)

    def arranged(q, k, v, ids):
        return call(q, k, v, layout=layout, q_segment_ids=ids, kv_segment_ids=ids)

    o, lse = jax.jit(arranged)(*map(layout.apply, (q, k, v, ids)))
    expected = jax.jit(functools.partial(call, layout="zigzag"))(
        q, k, v, q_segment_ids=ids, kv_segment_ids=ids
    )
    np.testing.assert_allclose(layout.restore(o), expected[0], atol=1e-6)
    np.testing.assert_allclose(layout.restore(lse, axis=2), expected[1], atol=1e-6)
    moves = {"gather", "dynamic_slice", "transpose"}
    outside = jax.make_jaxpr(arranged)(q, k, v, ids).jaxpr.eqns
    assert "shard_map" in {e.primitive.name for e in outside}
    assert not moves & {e.primitive.name for e in outside}


@pytest.mark.parametrize(
    ("length", "P", "block", "match"),
    [(60, 4, 8, "4 of them padding"), (64, 2, 8, "over 4 devices"), (64, 4, 4, "4 tokens would cut")],
)
def test_a_layout_that_does_not_fit_is_refused(length, P, block, match):
    mask = BlockMask.causal(length, **BLOCKS)
    (q, k, v), _ = make(mask, 4, 2)
    with pytest.raises(UsageError, match=match):
        attention(q, k, v, mask, mesh=mesh_of(4), layout=Layout.of("contiguous", length, P, block))


@pytest.mark.parametrize("schedule", [x for x in EVERYWHERE if x != "all_gather"])
@pytest.mark.sample("ring")
def test_hops_in_the_middle_of_a_long_ring_are_one_loop(schedule, monkeypatch):
    P = 8
    arrays = dict(q_segment_ids=np.sort(np.random.default_rng(0).integers(-1, 4, (2, 16 * P))))
    learned = dict(slope=jnp.geomspace(0.5, 0.01, 4))
    mask, how = MASKS["lists a head"](16 * P), dict(schedule=schedule, layout="striped")

    def visits(dtype="float32"):
        inputs, (do, _) = make(mask, 4, 2)
        inputs, do = (jax.tree.map(lambda x: x.astype(dtype), x) for x in (inputs, do))
        call = functools.partial(attention, mesh=mesh_of(P), mask=mask, **how)
        jaxpr = jax.make_jaxpr(lambda *x: jax.vjp(call, *x)[1](do))(*inputs)
        return sum(e.primitive.name == "ppermute" for e in equations(jaxpr.jaxpr))

    written_out = visits()
    monkeypatch.setattr(circulate, "LONG", 1)
    loops = schedule != "token_ring_direct"
    assert visits() < 0.9 * written_out if loops else visits() == written_out
    # A loop's carry has one type: what one kernel rounded is summed in float32.
    assert visits("bfloat16") == visits()
    compare(P, mask, 4, 2, learned, arrays, **how)
