"""The Hopper backend: what it refuses, lowering without a GPU, and the suite on one (`make test-gpu`)."""

import contextlib
import functools
import itertools
import re
import unittest.mock
from dataclasses import replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blockjax.kernels import checking
from blockjax.kernels.block_sparse_attention import DistanceBias, api, block_sparse_attention, hopper
from blockjax.kernels.block_sparse_attention.hopper import schedule
from blockjax.kernels.block_sparse_attention.spec import Spec
from blockjax.kernels.platforms import Target

from blockjax.masks import Between, BlockMask, Causal, Window, pick
from blockjax.models.transformer import REMAT
from tests.kernels.block_sparse_attention_suite import (
    MASKS,
    AttentionSuite,
    both,
    gradients,
    random_blocks,
    run,
)
from tests.kernels.targets import H100


def spec(**changes):
    sizes = dict(B=1, T=8192, S=8192, N=8, K=8, H=128, Hv=128, bq=128, bk=128)
    options = dict(soft_cap=False, segments=False, positions=False, bias=False)
    call = dict(target=H100, dtype=jnp.dtype("bfloat16"), form="lists", lists=(1, 8)) | sizes | options
    return Spec(**call | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(), None),
        (dict(target=Target("gpu", "NVIDIA H200")), None),
        (dict(target=Target("gpu", "NVIDIA GH200 480GB")), None),
        (dict(dtype=jnp.dtype("float16"), H=192, bq=16, bk=512), None),
        (dict(T=1001, S=7), None),
        (dict(target=Target("cpu", "cpu")), "runs on NVIDIA Hopper GPUs .* not on cpu"),
        (dict(target=Target("gpu", "NVIDIA A100-SXM4-80GB")), "not on NVIDIA A100"),
        (dict(target=Target("gpu", "NVIDIA RTX A2000")), "not on NVIDIA RTX A2000"),
        (dict(dtype=jnp.dtype("float32")), "needs bfloat16 or float16, not float32"),
        (dict(H=96), r"head dims must be in \(64, 128, 192, 256\), got 96 and 128"),
        (dict(Hv=320), "got 128 and 320"),
        (dict(bq=48), r"block sizes must be in \(16, 32, 64, 128, 256, 512\), got bq=48"),
        (dict(bk=1024), "got bk=1024"),
    ],
)
def test_refuses_before_compilation_with_the_numbers(changes, reason):
    said = hopper.supports(spec(**changes))
    assert said is None if reason is None else re.search(reason, said)


def lists(*heads, T=256, S=256, bq=128, bk=128, predicate=None):
    blocks = random_blocks(0, *heads, -(-T // bq), -(-S // bk), density=0.5)
    return BlockMask.from_block_bool(blocks, T, S, bq=bq, bk=bk, predicate=predicate)


def halo(start):
    """A window over keys that begin before the queries do, at a place that is not known."""
    mask = BlockMask.window(512, left=64)
    return replace(mask, predicate=mask.predicate & Between(0, 512)).rows(start, 2).columns(start - 1, 3)


def picked(blocks):
    """Of a device that holds blocks from several places of the sequence."""
    return pick(BlockMask.causal(2048, bq=512, bk=512), blocks, blocks, ascending=True)


def traced_lists(listed):
    return BlockMask.from_block_bool(listed, predicate=Causal())


# What is lowered, together all sizes, forms and options: (shapes, mask, or a function that makes it of traced
# values, the shapes of these values, options).
LOWERED = {
    "64 ranges": (dict(H=64), BlockMask.causal(256), (), ("segments",)),
    "128 ranges": (dict(), BlockMask.window(256, 384, left=100, right=30), (), ("bias", "soft_cap")),
    "192 and 128, ragged": (dict(H=192, Hv=128), BlockMask.causal(200, 141, q_offset=9), (), ()),
    "256 lists a head": (dict(H=256), lists(4, predicate=Causal()), (), ()),
    "64 and 256, ragged": (dict(H=64, Hv=256), BlockMask.causal(203), (), ("bias",)),
    "float16": (dict(dtype="float16"), lists(2), (), ("segments", "soft_cap", "bias")),
    "gathered 16": (dict(), lists(4, bq=64, bk=16, predicate=Causal()), (), ("segments",)),
    "gathered 32": (dict(H=64), lists(2, bk=32, predicate=Causal()), (), ("positions", "bias")),
    "gathered queries": (dict(H=64, Hv=128), lists(4, bq=16, bk=16), (), ("segments", "bias", "soft_cap")),
    "packed 16": (dict(), lists(1, bq=16, predicate=Causal()), (), ("bias",)),
    "packed 32": (dict(K=4), lists(1, bq=32, bk=64, predicate=Causal()), (), ("segments", "positions")),
    "small a head, ragged": (
        dict(),
        lists(4, T=101, S=90, bq=16, bk=16, predicate=Window(60, 3)),
        (),
        (),
    ),
    "512": (dict(), lists(2, T=1100, S=1300, bq=512, bk=512), (), ()),
    "traced window": (
        dict(H=64),
        lambda left: BlockMask.window(256, left=left, q_offset=left),
        (jax.ShapeDtypeStruct((), "int32"),),
        (),
    ),
    "traced lists": (dict(), traced_lists, (jax.ShapeDtypeStruct((4, 2, 2), "bool"),), ("positions",)),
    "between": (dict(), halo, (jax.ShapeDtypeStruct((), "int32"),), ()),
    "picked": (dict(), picked, (jax.ShapeDtypeStruct((2,), "int32"),), ("segments",)),
    "and": (dict(), BlockMask.chunked(256, size=100) & BlockMask.causal(256), (), ()),
    "or": (
        dict(),
        BlockMask.window(256, left=50) | lists(2, predicate=Causal()) | BlockMask.chunked(256, size=70),
        (),
        ("segments",),
    ),
    "function": (dict(), BlockMask.from_predicate(lambda pq, pk: (pq + pk) % 7 < 2, 256, 200), (), ()),
}


@pytest.mark.parametrize(("H", "Hv"), [*itertools.product(hopper.HEAD_DIMS, repeat=2)])
def test_tiles_of_the_table_fit(H, Hv):
    call = spec(H=H, Hv=Hv)
    assert hopper.tiles_fit(call, hopper.default_tiles(call)) is None


def test_tiles_that_do_not_fit_are_refused_with_the_bytes():
    call = spec(H=256, Hv=128)
    tiles = hopper.default_tiles(call)
    # 128 rows of 256 and of 128 are held apart, 256 tokens of both are in flight.
    said = hopper.tiles_fit(call, tiles._replace(forward=(128, 2)))
    assert said == "forward needs 288 KiB of shared memory, of 224, for 2 steps of 128 tokens"
    assert "multiple of 64 tokens" in hopper.tiles_fit(call, tiles._replace(dq=(96, 2)))


@pytest.fixture
def for_hopper(monkeypatch):
    monkeypatch.setattr(api, "target", lambda: H100)


def lowered(f, *args) -> str:
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def kernels(text: str) -> int:
    return len(re.findall(r"custom_call @mosaic_gpu", text))


def arguments(mask, B=2, N=4, K=2, H=128, Hv=None, dtype="bfloat16"):
    """Shapes of `(q, k, v, slope)` and of the cotangents of `o` and `lse`."""
    T, S, Hv = mask.T, mask.S, Hv or H
    shapes = (T, N, H), (S, K, H), (S, K, Hv), (T, N, Hv)
    q, k, v, do = (jax.ShapeDtypeStruct((B, *shape), dtype) for shape in shapes)
    floats = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((N,), (B, N, T))]
    return (q, k, v, floats[0]), (do, floats[1])


def lowered_kernels(shapes, mask, traced, options) -> int:
    """How many kernels a call and its gradients are lowered to."""
    inputs, cotangents = arguments(jax.eval_shape(mask, *traced) if traced else mask, **shapes)

    def f(inputs, cotangents, ids, traced):
        def attend(q, k, v, slope):
            extra = dict(bias=DistanceBias(slope)) if "bias" in options else {}
            for option, what in (("segments", "segment_ids"), ("positions", "positions")):
                if option in options:
                    extra |= {f"{side}_{what}": x for side, x in zip(("q", "kv"), ids, strict=True)}
            return block_sparse_attention(
                q,
                k,
                v,
                mask(*traced) if traced else mask,
                soft_cap=9.0 if "soft_cap" in options else None,
                return_lse=True,
                **extra,
            )

        out, pullback = jax.vjp(attend, *inputs)
        return out, pullback(cotangents)

    ids = [jax.ShapeDtypeStruct(x.shape[:2], "int32") for x in inputs[:2]]
    return kernels(lowered(f, inputs, cotangents, ids, traced))


@pytest.mark.usefixtures("for_hopper")
@pytest.mark.parametrize("name", LOWERED)
@pytest.mark.sample(
    "128 ranges", "64 and 256, ragged", "gathered queries", "packed 16", "or", "between", "picked"
)
def test_lowers(name):
    assert lowered_kernels(*LOWERED[name]) == 3


@pytest.mark.exhaustive
@pytest.mark.usefixtures("for_hopper")
@pytest.mark.parametrize("options", [*itertools.product((False, True), repeat=4)], ids=str)
@pytest.mark.parametrize("name", ["64 ranges", "packed 16", "gathered queries", "or", "function"])
def test_lowers_with_any_options(name, options):
    """A vector that only some options use leaves the others without a layout."""
    named = itertools.compress(("segments", "positions", "bias", "soft_cap"), options)
    assert lowered_kernels(*LOWERED[name][:3], tuple(named)) == 3


@pytest.mark.usefixtures("for_hopper")
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.sample("True")
def test_lowers_in_shard_map(check_vma):
    """With queries sharded; the gradients of keys and values are summed over devices."""
    mask = lists(2, predicate=Causal())
    (*qkv, _), (do, _) = arguments(mask)
    mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def local(*x):
        return block_sparse_attention(*x, mask.rows(jax.lax.axis_index("x"), 1))

    rows = jax.P(None, "x")
    f = jax.shard_map(
        local, mesh=mesh, in_specs=(rows, jax.P(), jax.P()), out_specs=rows, check_vma=check_vma
    )
    text = lowered(gradients(f), *qkv, do)
    assert kernels(text) == 3 and text.count("all_reduce") == 2


@pytest.mark.usefixtures("for_hopper")
@pytest.mark.exhaustive
def test_lowers_under_vmap_and_remat():
    mask = lists(4, bq=64, bk=64)
    (*qkv, _), (do, _) = arguments(mask)
    one = jax.remat(lambda *x: block_sparse_attention(*(a[None] for a in x), mask)[0])
    assert kernels(lowered(gradients(jax.vmap(one)), *qkv, do)) == 3


@pytest.mark.usefixtures("for_hopper")
@pytest.mark.parametrize(("policy", "launches"), [("full", 4), ("dots", 3)])
@pytest.mark.sample("dots-3")
def test_what_remat_keeps_is_not_computed_again(policy, launches):
    """Launches of forward, dQ and dK/dV, the forward twice if its results are not kept."""
    mask = lists(4, predicate=Causal())
    (*qkv, _), _ = arguments(mask)
    attend = REMAT[policy](lambda *x: block_sparse_attention(*x, mask))
    loss = jax.value_and_grad(lambda *x: jnp.sum(attend(*x).astype("float32") ** 2), (0, 1, 2))
    assert kernels(lowered(loss, *qkv)) == launches


@contextlib.contextmanager
def waves(n):
    """CTAs serve several tiles each in calls that keep the chip busy for this long."""
    jax.clear_caches()
    with unittest.mock.patch.object(schedule, "WAVES", n):
        yield
    jax.clear_caches()


@pytest.mark.gpu
class TestHopper(AttentionSuite):
    """Against plain XLA in the same dtype: see `checking.py` for the criterion."""

    implementation = "hopper"
    shapes: ClassVar = dict(H=64, Hv=64, dtype="bfloat16")

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def several_tiles(cls):
        """What is compiled is what users run, as in large calls: a CTA serves several tiles."""
        with waves(0):
            yield

    # No float64; blocks of any size are not served, and those that are come below.
    test_float64 = test_finite_differences = test_block_size_does_not_matter = test_random_lists = None

    def agree(self, f, *arrays, tolerance=None, expected=None):
        ours, peer = f(self.implementation, *arrays), f("xla", *arrays)
        with jax.default_matmul_precision("highest"):
            exact = (expected or f)("reference", *checking.widen(arrays))
        parts = jax.tree.map(checking.part_of_allowed, ours, peer, exact)
        assert all(part <= 1 for part in jax.tree.leaves(parts)), parts
        return ours

    @pytest.mark.parametrize("name", [name for name in MASKS if name != "wide-blocks"])
    def test_masks(self, name):
        super().test_masks(name)

    @pytest.mark.parametrize("left", [700, 2048])
    def test_blocks_of_several_places(self, left):
        whole = BlockMask.window(2048, left=left, bq=512, bk=512)
        self.compare(pick(whole, np.array([1, 2]), np.array([0, 2, 3]), ascending=True))

    def test_everything_at_once(self):
        super().test_everything_at_once(Hv=128)

    @pytest.mark.parametrize("shapes", [dict(N=3, K=3), dict(N=8, K=1, Hv=128), dict(B=1, N=1, K=1, H=128)])
    def test_heads(self, shapes):
        super().test_heads(shapes)

    @pytest.mark.parametrize("block", [16, 64, 128, 256])
    def test_rising_scores_force_rescaling(self, block):
        super().test_rising_scores_force_rescaling(block)

    @pytest.mark.parametrize("block", [16, 64, 128, 512])
    def test_empty_rows_and_columns(self, block):
        super().test_empty_rows_and_columns(block)

    @pytest.mark.parametrize("block", [16, 64, 128, 256])
    @pytest.mark.parametrize("form", ["ranges", "lists", "lists-heads"])
    def test_nan_in_unlisted_blocks_does_not_leak(self, form, block):
        super().test_nan_in_unlisted_blocks_does_not_leak(form, block)

    @pytest.mark.parametrize("bk", hopper.BLOCKS)
    @pytest.mark.parametrize("bq", hopper.BLOCKS)
    @pytest.mark.parametrize(("H", "Hv"), [(64, 64), (128, 128), (192, 128), (256, 256)])
    def test_head_dims_and_blocks(self, H, Hv, bq, bk):
        T, S = max(5 * bq // 2, 200) - 3, max(5 * bk // 2, 250) - 5
        # One list for all heads, one a key head and one a query head take turns over the pairs.
        heads = (1, 2, 4)[(hopper.BLOCKS.index(bq) + hopper.BLOCKS.index(bk)) % 3]
        mask = lists(heads, T=T, S=S, bq=bq, bk=bk, predicate=Window(5 * bk, T))
        self.compare(mask, shapes=dict(H=H, Hv=Hv))

    @pytest.mark.parametrize("shapes", [dict(H=64, Hv=256), dict(H=256, Hv=64), dict(dtype="float16")])
    def test_other_head_dims_and_float16(self, shapes):
        self.compare(BlockMask.window(500, 700, left=190, q_offset=210), shapes=shapes)

    @pytest.mark.parametrize("name", ["window", "causal-ragged", "or", "lists-query-heads", "function"])
    def test_mask_closed_over(self, name):
        """Its walks are constants then; elsewhere here they are computed on the device."""
        mask = MASKS[name]()
        inputs, cotangents = self.make(0, mask)
        self.agree(
            lambda implementation, *x: jax.jit(functools.partial(both, implementation, mask=mask))(*x),
            inputs,
            cotangents,
        )

    @pytest.mark.parametrize("H", [128, 256])
    @pytest.mark.parametrize("name", ["causal-ragged", "or", "lists-query-heads"])
    def test_one_tile_a_cta(self, name, H):
        with waves(1 << 20):
            self.compare(MASKS[name](), shapes=dict(H=H, Hv=H))

    @pytest.mark.parametrize("T", [1, 7, 8, 63, 129, 1000])
    def test_ragged_lengths(self, T):
        mask = BlockMask.causal(T, 300, q_offset=299)
        self.compare(mask, shapes=dict(H=128, Hv=128), learned=dict(slope=jnp.geomspace(0.5, 0.01, 4)))

    @pytest.mark.parametrize("block", [16, 64, 128, 256])
    def test_rows_of_one_block_beside_full_rows(self, block):
        blocks = random_blocks(0, 4, 8, 8, density=0.1)
        blocks[:, ::3], blocks[:2, 1::3] = True, False
        blocks[..., 0] = True
        mask = BlockMask.from_block_bool(blocks, bq=block, bk=block)
        assert {1, 8} <= set(mask.tags().astype(bool).sum(-1).ravel())
        self.compare(mask, shapes=dict(H=128, Hv=128))

    @pytest.mark.parametrize("heads", [1, 2, 4])
    @pytest.mark.parametrize("block", [16, 128])
    def test_many_blocks_are_bitwise_equal_from_run_to_run(self, heads, block):
        mask = lists(heads, T=2000, S=2000, bq=block, bk=block, predicate=Causal())
        inputs, cotangents = self.make(0, mask, H=128, Hv=128)
        learned = dict(slope=jnp.geomspace(0.5, 0.01, 4))
        results = [
            jax.device_get(run(self.implementation, inputs, cotangents, mask, learned=learned))
            for _ in range(5)
        ]
        assert np.abs(results[0][3]["slope"]).min() > 0
        for other in results[1:]:
            for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(other), strict=True):
                assert a.tobytes() == b.tobytes()
