"""The TPU backend of `depth_mix`: the suite interpreted on CPU, uninitialized memory, compiled for chips."""

import re

import jax
import jax.numpy as jnp
import pytest
from blockjax.kernels.depth_mix import Spec, depth_join, depth_read, tpu
from blockjax.kernels.platforms import Target
from jax.experimental.pallas import tpu as pltpu

from tests.compiling import compile_each, compile_elsewhere, on_each_chip
from tests.kernels.depth_mix_suite import (
    DepthMixSuite,
    assert_close,
    exhaustive_but,
    join_inputs,
    rand,
    run_join,
    run_read,
    sources_of,
)

EXHAUSTIVE = pytest.mark.exhaustive


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels in plain interpretation and in tiles of few tokens: several tiles even at tiny shapes."""
    monkeypatch.setattr(tpu, "INTERPRET", True)
    monkeypatch.setattr(tpu, "TILES", (64, 16))


@pytest.mark.usefixtures("interpreted")
@exhaustive_but(
    "test_any_number_of_tokens",
    "test_any_width",
    "test_join_without_an_update",
    "test_nothing_is_read_of_an_absent_running_sum",
    "test_one_source_is_read_as_it_is",
)
class TestTpu(DepthMixSuite):
    implementation = "tpu"
    # No TPU multiplies float64.
    test_float64 = test_finite_differences = None

    @pytest.mark.parametrize("M", [1280, *(pytest.param(M, marks=EXHAUSTIVE) for M in (1000, 2048, 7186))])
    def test_any_width(self, M):
        super().test_any_width(M)

    def test_join_without_an_update(self):
        super().test_join(2, False, None)

    def test_on_a_mesh(self, monkeypatch):
        # Plain interpretation does not know about axes that values vary over.
        monkeypatch.setattr(tpu, "INTERPRET", pltpu.InterpretParams())
        super().test_on_a_mesh()


def test_no_races_and_nothing_read_before_it_is_written(interpreted, monkeypatch):
    """With memory simulated that nobody has initialized; the last tile is ragged."""
    monkeypatch.setattr(
        tpu, "INTERPRET", pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    )
    monkeypatch.setattr(tpu, "TILES", (16,))
    sources, queries = sources_of(0, 2, (37, 24)), rand(1, 2, 24)
    assert_close(run_read("tpu", sources, queries, heads=2), run_read("reference", sources, queries, heads=2))
    arrays = join_inputs(0, (37, 24), 2)
    assert_close(run_join("tpu", *arrays, heads=2), run_join("reference", *arrays, heads=2))


def spec(**changes):
    call = dict(target=Target("tpu", "TPU v5 lite"), dtype=jnp.dtype("bfloat16"), op="read")
    return Spec(**call | dict(n=9, R=8, tokens=8192, M=2048, heads=1) | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(), None),
        (dict(op="join", n=1, R=1, M=7186, update=True), None),
        (dict(n=29, R=16, M=7168), None),
        (dict(target=Target("cpu", "cpu")), "runs on TPUs, not on cpu"),
        (dict(tokens=0), "needs at least one token"),
        (dict(dtype=jnp.dtype("float16")), "for bfloat16 and float32, not float16"),
        (
            dict(n=29, R=16, M=16384, heads=16),
            r"n=29, R=16, M=16384 and 16 heads need \d+.\d MiB of vector memory, of 56, .* 16 tokens",
        ),
    ],
)
def test_refuses_before_compilation_with_the_numbers(changes, reason):
    said = tpu.supports(spec(**changes))
    assert said is None if reason is None else re.search(reason, said)


@pytest.mark.parametrize("kernel", ["read_forward", "read_backward"])
def test_tiles_are_as_large_as_memory_allows(kernel):
    sizes = dict(n=9, R=8, M=4096, heads=1, dtype=jnp.bfloat16)
    tile = tpu.tile_of(kernel, **sizes, rows=8192)
    assert tpu.vector_memory(kernel, tile, **sizes) <= tpu.VECTOR_MEMORY
    assert tpu.vector_memory(kernel, 2 * tile, **sizes) > tpu.VECTOR_MEMORY
    assert tpu.tile_of(kernel, **sizes, rows=5) == 16


# What is compiled: (n, R, tokens, M, heads, dtype, unstacked).
COMPILED = [
    (3, 4, 1024, 2048, 1, "bfloat16", False),
    (2, 1, 300, 1000, 8, "float32", True),
    (3, 2, 5, 1280, 2, "bfloat16", True),
    (9, 8, 16384, 4096, 8, "bfloat16", False),
    (16, 1, 16384, 4096, 1, "bfloat16", True),
    (3, 2, 1000, 7186, 2, "bfloat16", True),
    (29, 2, 131, 1000, 1, "float32", False),
]


def compile_for(chip, cases):
    """Forward and backward of these of `COMPILED`, read and join; runs in a process of its own."""
    compile_each(chip, (COMPILED[i] for i in cases), compile_one)


def compile_one(n, R, tokens, M, heads, dtype, unstacked, sharding):
    def array(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    options = dict(heads=heads, implementation="tpu")
    source, lse = array(tokens, M, dtype=dtype), array(tokens, heads)

    def read(sources, queries):
        return depth_read(sources, queries, unstacked=unstacked, **options)

    def join(partial, update, o, lse, query, gain):
        return depth_join(partial, update, o, lse, query, norm_gain=gain, **options)

    for call, args in (
        (read, ((source,) * n, array(R, M))),
        (join, (source, source, source, lse, array(M), array(M))),
    ):

        def both(*args, call=call):
            out, pullback = jax.vjp(call, *args)
            return out, pullback(jax.tree.map(jnp.ones_like, out))

        jax.jit(both).lower(*args).compile()


@on_each_chip(len(COMPILED), few=dict(v5e=[0], v5p=[1], v6e=[2]))
@pytest.mark.sample("v5e")
def test_compiles_for(chip, cases):
    compile_elsewhere("tests.kernels.test_depth_mix_tpu", chip, cases)
