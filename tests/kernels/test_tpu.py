"""The TPU backend: the suite interpreted on CPU, races and uninitialized memory, compilation for chips."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blockjax.kernels.block_sparse_attention import (
    DistanceBias,
    block_sparse_attention,
    tpu,
)
from blockjax.kernels.block_sparse_attention.spec import Spec, Tiles
from blockjax.kernels.block_sparse_attention.tpu import layout, walk
from blockjax.kernels.platforms import Target
from jax.experimental.pallas import tpu as pltpu

from blockjax.masks import BlockMask, Causal, Window
from tests.compiling import compile_each, compile_elsewhere, on_each_chip
from tests.kernels.block_sparse_attention_suite import AttentionSuite, assert_close, make, run

EXHAUSTIVE = pytest.mark.exhaustive
SMALL = Tiles(forward=(128, 256), dq=(128, 256), dkv=(128, 256))


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels in plain interpretation and in tiles of few rows: several tiles even at tiny shapes."""
    monkeypatch.setattr(tpu, "INTERPRET", True)
    monkeypatch.setattr(layout, "TILES", dict.fromkeys(layout.TILES, SMALL))
    monkeypatch.setattr(walk, "UNROLLED", 4)


@pytest.fixture
def simulated(interpreted, monkeypatch):
    """With memory, copies and semaphores simulated: nothing is initialized, copies end late, races raise."""
    params = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    monkeypatch.setattr(tpu, "INTERPRET", params)


@pytest.mark.usefixtures("interpreted")
class TestTpu(AttentionSuite):
    """Compiling an interpreted kernel takes seconds: kept are the cases that differ for this backend."""

    implementation = "tpu"

    # No TPU multiplies float64.
    test_float64 = test_finite_differences = None
    # Lists and shapes of which others here are like.
    test_random_lists = test_padding_of_lists_does_not_matter = test_shards_of_a_mask_merge = None
    test_full_promises_do_not_count_with_positions = test_negative_segments_see_nothing = None
    test_segments_equal_separate_calls = test_mask_as_argument_equals_mask_closed_over = None

    @pytest.mark.parametrize(
        "name",
        ["causal-ragged", "lists-batch-heads", "chunked", "function", "wide-blocks"],
    )
    @pytest.mark.sample("lists-batch-heads")
    def test_masks(self, name):
        super().test_masks(name)

    @EXHAUSTIVE
    def test_options(self):
        super().test_options("causal", dict(learned=dict(slope=jnp.array([0.01, 0.1, 0.5, 2.0]))))

    @EXHAUSTIVE
    def test_no_block_at_all(self):
        super().test_no_block_at_all()

    @EXHAUSTIVE
    def test_one_scan_body_serves_every_window(self):
        super().test_one_scan_body_serves_every_window()

    @EXHAUSTIVE
    def test_permuted_blocks_with_positions(self):
        super().test_permuted_blocks_with_positions()

    @EXHAUSTIVE
    def test_vmap_over_windows(self):
        super().test_vmap_over_windows()

    @EXHAUSTIVE
    def test_vmap_and_remat(self):
        super().test_vmap_and_remat()

    @EXHAUSTIVE
    def test_per_token_positions(self):
        super().test_per_token_positions()

    @EXHAUSTIVE
    def test_lists_made_inside_jit(self):
        super().test_lists_made_inside_jit()

    @EXHAUSTIVE
    def test_disjoint_segments_read_nothing(self):
        super().test_disjoint_segments_read_nothing()

    @EXHAUSTIVE
    def test_rising_scores_force_rescaling(self):
        super().test_rising_scores_force_rescaling()

    @pytest.mark.parametrize(
        "shapes",
        [pytest.param(dict(N=4, K=1, Hv=4), marks=EXHAUSTIVE), dict(B=1, N=1, K=1, H=5, Hv=3)],
    )
    def test_heads(self, shapes):
        super().test_heads(shapes)

    def test_bfloat16(self):
        super().test_bfloat16("causal")

    @EXHAUSTIVE
    def test_block_size_does_not_matter(self):
        super().test_block_size_does_not_matter((40, 24))

    @pytest.mark.parametrize("form", [pytest.param("ranges", marks=EXHAUSTIVE), "lists-heads"])
    def test_nan_in_unlisted_blocks_does_not_leak(self, form):
        super().test_nan_in_unlisted_blocks_does_not_leak(form)

    @pytest.mark.parametrize("name", [pytest.param("window", marks=EXHAUSTIVE), "lists-query-heads"])
    def test_nan_in_one_row_of_queries_stays_there(self, name):
        super().test_nan_in_one_row_of_queries_stays_there(name)

    @pytest.mark.exhaustive
    def test_cached_decoding(self):
        super().test_cached_decoding(3)

    @pytest.mark.exhaustive
    def test_shard_map(self, monkeypatch):
        # Plain interpretation does not know about axes that values vary over.
        monkeypatch.setattr(tpu, "INTERPRET", pltpu.InterpretParams())
        super().test_shard_map("queries", True)

    def test_nan_in_one_block_of_queries_reaches_only_keys_that_it_sees(self):
        mask = BlockMask.window(80, left=20, bq=16, bk=16)
        (q, k, v), cotangents = make(0, mask)
        q = q.at[:, 48:64].set(jnp.nan)
        _, _, (_, dk, dv), _ = run("tpu", (q, k, v), cotangents, mask)
        seen = np.repeat(mask.tags()[0, 0, 3] > 0, 16)
        for x in (dk, dv):
            assert jnp.isfinite(x[:, ~seen]).all() and jnp.isnan(x[:, seen]).any()

    @EXHAUSTIVE
    def test_lists_in_far_memory(self, monkeypatch):
        monkeypatch.setattr(layout, "lists_fit", lambda rows, entries: False)
        super().test_masks("or")


RACES = {
    # One copy for several blocks, ranges that end inside a tile.
    "ranges": BlockMask.window(48, left=20, bq=16, bk=16),
    # Walks of their own for the query heads of a key head, empty rows, an empty column.
    "lists": BlockMask.from_block_bool(
        np.array([[[1, 0, 0], [0, 0, 0], [1, 0, 1]], [[1, 0, 0], [1, 0, 0], [0, 0, 0]]], bool),
        bq=16,
        bk=16,
        predicate=Causal(),
    ),
}


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("name", RACES)
@pytest.mark.sample("lists")
def test_no_races_and_nothing_read_before_it_is_written(name, monkeypatch):
    monkeypatch.setattr(layout, "lists_fit", lambda rows, entries: False)
    inputs, cotangents = make(0, RACES[name], B=1, N=2, K=1)
    ids = np.sort(np.random.default_rng(0).integers(0, 2, (1, 48)))
    options = dict(arrays=dict(q_segment_ids=ids), learned=dict(slope=jnp.array([0.1, 0.5])), soft_cap=3.0)
    ours = run("tpu", inputs, cotangents, RACES[name], **options)
    assert_close(ours, run("reference", inputs, cotangents, RACES[name], **options))


def spec(**changes):
    sizes = dict(B=1, T=8192, S=8192, N=8, K=8, H=128, Hv=128, bq=128, bk=128)
    options = dict(soft_cap=False, segments=False, positions=False, bias=False)
    call = (
        dict(target=Target("tpu", "TPU v5 lite"), dtype=jnp.dtype("bfloat16"), form="lists", lists=(1, 8))
        | sizes
        | options
    )
    return Spec(**call | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(), None),
        (dict(T=2**20, S=2**20), None),
        (dict(target=Target("cpu", "cpu")), "runs on TPUs, not on cpu"),
        (dict(dtype=jnp.dtype("float16")), "not float16"),
        (dict(H=2**15), r"head sizes 32768 and 128 need \d+.\d MiB of vector memory, of 56"),
        (
            dict(T=2**20, S=2**20, bq=16, bk=16),
            r"65536 by 65536 blocks need 4.51 MiB of scalar memory, of 0.70",
        ),
    ],
)
def test_refuses_before_compilation_with_the_numbers(changes, reason):
    said = tpu.supports(spec(**changes))
    assert said is None if reason is None else re.search(reason, said)


# What is compiled, together all sizes, forms and options: (shapes, mask, options).
COMPILED = [
    (dict(H=128), "causal", ()),
    (dict(H=64, K=2, bq=128), "traced window", ("segment_ids",)),
    (dict(H=256, dtype="float32", bq=128), "lists", ("positions",)),
    (dict(H=128, K=2, bq=64, bk=16), "own lists", ("segment_ids", "soft_cap")),
    (dict(H=80, Hv=64, T=1000, S=900, bq=128, bk=128), "own lists", ("far", "bias")),
    (dict(H=128, K=1, bq=16, bk=32), "or", ("positions", "segment_ids", "bias")),
]


def compile_for(chip, cases):
    """Forward and backward of these of `COMPILED`; runs in a process of its own."""
    compile_each(chip, (COMPILED[i] for i in cases), compile_one)


NEAR = layout.lists_fit


def compile_one(shapes, form, options, sharding, B=1, T=1024, N=4, K=4):
    layout.lists_fit = (lambda rows, entries: False) if "far" in options else NEAR
    sizes = dict(T=T, S=shapes.get("T", T), K=K, Hv=shapes["H"], bq=512, bk=512, dtype="bfloat16") | shapes
    T, S, K, H, Hv, dtype = (sizes[name] for name in ("T", "S", "K", "H", "Hv", "dtype"))
    blocks = dict(bq=sizes["bq"], bk=sizes["bk"])
    listed = np.random.default_rng(0).random((N, -(-T // blocks["bq"]), -(-S // blocks["bk"]))) < 0.5
    masks = {
        "causal": lambda left: BlockMask.causal(T, S, **blocks),
        "traced window": lambda left: BlockMask.window(T, S, left=left, **blocks),
        "lists": lambda left: BlockMask.from_block_bool(listed[0], T, S, **blocks, predicate=Causal()),
        "own lists": lambda left: BlockMask.from_block_bool(listed, T, S, **blocks, predicate=Window(300)),
        "or": lambda left: masks["lists"](left) | BlockMask.chunked(T, S, size=100, **blocks),
    }

    def attend(q, k, v, slope, ids_q, ids_k, left):
        extra = dict(bias=DistanceBias(slope)) if "bias" in options else {}
        for name in {"segment_ids", "positions"} & set(options):
            extra |= {f"q_{name}": ids_q, f"kv_{name}": ids_k}
        return block_sparse_attention(
            q, k, v, masks[form](left), soft_cap=9.0 if "soft_cap" in options else None, **extra,
            return_lse=True, implementation="tpu",
        )  # fmt: skip

    def both(q, k, v, slope, *ids):
        out, pullback = jax.vjp(lambda *x: attend(*x, *ids), q, k, v, slope)
        return out, pullback(jax.tree.map(jnp.ones_like, out))

    floats = [((B, T, N, H), dtype), ((B, S, K, H), dtype), ((B, S, K, Hv), dtype), ((N,), "float32")]
    ids = [((B, T), "int32"), ((B, S), "int32"), ((), "int32")]
    args = [jax.ShapeDtypeStruct(*x, sharding=sharding) for x in floats + ids]
    jax.jit(both).lower(*args).compile()


@on_each_chip(len(COMPILED))
@pytest.mark.sample("v5e")
def test_compiles_for(chip, cases):
    compile_elsewhere("tests.kernels.test_tpu", chip, cases)
