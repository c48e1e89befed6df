"""The TPU backend of `linear_attention`: the suite interpreted, uninitialized memory, compiled for chips."""

import re

import jax
import jax.numpy as jnp
import pytest
from blockjax.kernels.linear_attention import Spec, linear_attention, tpu
from blockjax.kernels.linear_attention.api import choose
from blockjax.kernels.platforms import Target
from jax.experimental.pallas import tpu as pltpu

from tests.compiling import compile_each, compile_elsewhere, on_each_chip
from tests.kernels.linear_attention_suite import (
    IDS,
    LinearAttentionSuite,
    assert_close,
    cotangents_of,
    make,
    run,
)

EXHAUSTIVE = pytest.mark.exhaustive


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(tpu, "INTERPRET", True)


@pytest.mark.usefixtures("interpreted")
class TestTpu(LinearAttentionSuite):
    implementation = "tpu"
    shortest = 16
    # No TPU multiplies float64.
    test_float64 = test_finite_differences = None


@pytest.mark.parametrize(("kind", "decay"), [("decay", "token"), ("delta", "channel")])
def test_no_races_and_nothing_read_before_it_is_written(kind, decay, monkeypatch):
    """With memory simulated that nobody has initialized; the last chunk is ragged."""
    simulated = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    monkeypatch.setattr(tpu, "INTERPRET", simulated)
    args = make(kind=kind, decay=decay, N=4, K=2, Hv=12)
    found, expected = (
        run(name, args, cotangents_of(args), IDS, kind=kind, chunk_size=chunk)
        for name, chunk in (("tpu", 16), ("reference", None))
    )
    assert_close(found, expected)


def spec(**changes):
    call = dict(target=Target("tpu", "TPU v5 lite"), dtype=jnp.dtype("bfloat16"), kind="decay", decay="token")
    return Spec(**call | dict(B=1, T=8192, N=16, K=16, Hk=128, Hv=128) | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(), None),
        (dict(Hk=64, Hv=64, N=3, K=3), None),
        (dict(Hk=256, Hv=512, N=32, K=4), None),
        (dict(target=Target("cpu", "cpu")), "runs on TPUs, not on cpu"),
        (dict(T=1), "16 tokens or more, not 1"),
        (dict(dtype=jnp.dtype("float16")), "for bfloat16 and float32, not float16"),
        (dict(kind="delta", decay="channel"), None),
        (dict(decay="channel", Hk=256, Hv=512, N=8, K=4), None),
        (
            dict(decay="channel", Hk=1024, Hv=2048, N=8, K=8),
            r"need \d+\.\d MiB of vector memory, of 56, in chunks of 64",
        ),
        (dict(Hk=72), "multiples of 64, not Hk=72, Hv=128"),
        (dict(chunk=512), "of 16 to 256 tokens, not 512"),
        (dict(Hk=1024, Hv=2048, N=8, K=8), r"need \d+\.\d MiB of vector memory, of 56, in chunks of 128"),
    ],
)
def test_refuses_before_compilation_with_the_numbers(changes, reason):
    said = tpu.supports(spec(**changes))
    assert said is None if reason is None else re.search(reason, said)


@pytest.mark.parametrize("decay", ["none", "head", "token", "channel"])
def test_serves_by_default(decay):
    assert choose(spec(kind="delta", decay=decay)) == "tpu"


# What is compiled: (kind, decay, B, T, N, K, Hk, Hv, dtype, documents, state, chunk).
COMPILED = [
    ("decay", "head", 2, 8192, 16, 16, 128, 128, "bfloat16", True, True, None),
    ("decay", "token", 1, 1000, 8, 8, 128, 64, "bfloat16", True, False, None),
    ("decay", "token", 1, 300, 8, 2, 128, 256, "float32", False, True, None),
    ("decay", "none", 1, 512, 3, 3, 64, 64, "bfloat16", False, False, 64),
    ("decay", "token", 1, 40, 4, 1, 192, 128, "bfloat16", True, True, 16),
    ("decay", "head", 1, 1024, 6, 6, 64, 128, "float32", False, True, 256),
    ("delta", "token", 1, 8192, 16, 16, 128, 128, "bfloat16", True, True, None),
    ("delta", "none", 1, 300, 4, 2, 64, 128, "float32", False, False, 32),
    ("delta", "head", 2, 512, 6, 6, 256, 512, "bfloat16", False, True, 128),
    ("delta", "token", 1, 200, 4, 2, 64, 128, "bfloat16", True, True, None),
    ("delta", "channel", 1, 200, 4, 2, 64, 128, "bfloat16", True, True, None),
    ("delta", "channel", 1, 8192, 16, 16, 128, 128, "bfloat16", True, True, None),
    ("delta", "channel", 1, 300, 4, 2, 128, 64, "float32", False, False, 32),
    ("delta", "channel", 2, 512, 6, 6, 256, 512, "bfloat16", False, True, 128),
    ("decay", "channel", 1, 300, 3, 3, 64, 64, "bfloat16", True, True, None),
    ("decay", "channel", 1, 1024, 6, 6, 64, 128, "float32", False, True, 256),
    ("decay", "channel", 1, 40, 4, 1, 192, 128, "bfloat16", True, True, 16),
]


def compile_for(chip, cases):
    """Forward and backward of these of `COMPILED`; runs in a process of its own."""
    compile_each(chip, (COMPILED[i] for i in cases), compile_one)


def compile_one(kind, decay, B, T, N, K, Hk, Hv, dtype, documents, state, chunk, sharding):
    def array(shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    shapes = dict(q=(B, T, N, Hk), k=(B, T, K, Hk), v=(B, T, K, Hv))
    args = {name: array(shape, dtype) for name, shape in shapes.items()}
    shape = dict(none=None, head=(K,), token=(B, T, K), channel=(B, T, K, Hk))[decay]
    optional = dict(log_decay=shape, beta=(B, T, K) if kind == "delta" else None)
    optional["initial_state"] = (B, K, Hk, Hv) if state else None
    args |= {name: array(shape) for name, shape in optional.items() if shape}
    ids = array((B, T), "int32") if documents else None

    def both(args, ids):
        call = lambda args: linear_attention(  # noqa: E731
            **args, kind=kind, segment_ids=ids, return_state=True, chunk_size=chunk, implementation="tpu"
        )
        out, pullback = jax.vjp(call, args)
        return out, pullback(jax.tree.map(jnp.ones_like, out))

    jax.jit(both).lower(args, ids).compile()


# Each chip compiles the decay rule, and the delta rule and decays a channel those that one can spare.
@on_each_chip(len(COMPILED), few=dict(v5e=[0, 10], v5p=[1, 7, 14], v6e=[2, 9, 16]))
@pytest.mark.sample("v5e")
def test_compiles_for(chip, cases):
    compile_elsewhere("tests.kernels.test_linear_attention_tpu", chip, cases)
