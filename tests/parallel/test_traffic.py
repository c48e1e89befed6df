"""What is counted is what is sent, and what the formulas of the schedules say."""

import functools
import importlib
import logging
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blockjax.kernels.platforms import Target

from blockjax.masks import BlockMask
from blockjax.parallel.attention import _log_choice, attention
from blockjax.parallel.circulate import Ring
from blockjax.parallel.layouts import Layout, work
from blockjax.parallel.shards import Job, Keys, Queries
from blockjax.parallel.traffic import choose, exchanged, traffic
from tests.hlo import collectives
from tests.jaxprs import equations

MIB = 2**20
attention_module = importlib.import_module("blockjax.parallel.attention")  # not the function of this name


def shards(P, mask, N, K, H, dtype="bfloat16", B=1):
    """A job over P places, and the shapes of one place's queries and keys."""
    layout = Layout.of("contiguous", mask.T, P, mask.bq)
    uses = work(mask, layout, layout) > 0
    blocks = layout.blocks(mask.bq)
    job = Job(Ring("seq", P, 1, uses), mask, blocks, blocks, None, {})
    n = mask.T // P
    q, k = (jax.ShapeDtypeStruct((B, n, heads, H), dtype) for heads in (N, K))
    return job, Queries(q, None, None, None), Keys(k, k, None, None)


@pytest.mark.parametrize(("K", "one_way"), [(32, 896), (8, 224), (1, 28)])
def test_bytes_are_those_of_the_formulas(K, one_way):
    """Eight places of 8192 tokens, 32 query heads of 128, bfloat16."""
    parts = shards(8, BlockMask.full(8 * 8192), 32, K, 128)

    def busiest(name, backward=False):
        return traffic(name, *parts, backward).busiest / MIB

    assert busiest("ring") == pytest.approx(one_way)
    assert busiest("all_gather") == pytest.approx(one_way / 2)
    assert busiest("two_stream_ring") == pytest.approx(one_way * 4 / 7), "an even ring ends with one stream"
    # One kernel head cannot be halved; else the last round of an even ring sends half of them each way.
    assert busiest("ring_dma") == pytest.approx(one_way * (4 / 7 if K % 2 else 1 / 2))
    # Queries and results make 7 hops, the local result none; half of the heads go each way. The first result
    # travels as its kernel rounded it, sums in float32.
    T, N, H = 8192, 32, 128
    queries = 7 * (2 * T * N * H + 4 * T * N) + (2 + 6 * 4) * T * N * H
    assert busiest("token_ring") * MIB == pytest.approx(queries / (1 if K % 2 else 2))
    # Straight home goes what the kernels rounded to bfloat16, with float32 statistics.
    direct = traffic("token_ring_direct", *parts, False), traffic("token_ring_direct", *parts, True)
    assert direct[0].injected == 7 * (2 * T * N * H + 2 * T * N * H + 4 * T * N)
    assert direct[1].injected == 7 * (4 * T * N * H + 8 * T * N + 2 * T * N * H)
    # Keys and values, and their float32 gradients: 4 and 8 bytes a feature.
    assert busiest("ring", backward=True) * MIB == pytest.approx(7 * (4 + 8) * T * K * H)


def test_halo_sends_the_window():
    parts = shards(8, BlockMask.window(8 * 8192, left=4096), 32, 8, 128)
    # 4095 tokens before a shard are 32 blocks of 128; the first place receives none.
    assert traffic("halo", *parts, False).injected == 4096 * 8 * 128 * 2 * 2 * 7 / 8


@pytest.mark.parametrize("name", ["ring", "two_stream_ring", "token_ring", "token_ring_direct", "halo"])
@pytest.mark.parametrize("left", [40, 12])
def test_counted_is_sent(name, left):
    P, mask = 4, BlockMask.window(64, left=min(left, 13) if name == "halo" else left, bq=8, bk=8)
    job, queries, keys = shards(P, mask, 4, 2, 8, "float32", B=2)
    arrays = [jnp.zeros((2, 64, n, 8)) for n in (4, 2, 2, 4)]
    mesh = jax.make_mesh((P,), ("seq",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:P])
    call = functools.partial(attention, mask=mask, mesh=mesh, schedule=name)

    def sent(f, *args):
        permutes = [e for e in equations(jax.make_jaxpr(f)(*args).jaxpr) if e.primitive.name == "ppermute"]
        return sum(e.invars[0].aval.size * 4 * len(e.params["perm"]) / P for e in permutes)

    forward = sent(call, *arrays[:3])
    both = sent(lambda q, k, v, do: jax.vjp(call, q, k, v)[1](do), *arrays)
    assert traffic(name, job, queries, keys, False).injected == forward
    assert traffic(name, job, queries, keys, True).injected == both - forward


@pytest.mark.real
@pytest.mark.parametrize("name", ["ring", "two_stream_ring", "token_ring", "token_ring_direct", "halo"])
@pytest.mark.sample("halo")
def test_compiled_programs_send_that_and_hold_no_more(name):
    """Collective permutes alone, of the bytes that are counted, and nothing of tokens x tokens."""
    P, T = 4, 384
    mask = BlockMask.window(T, left=13, bq=8, bk=8) if name == "halo" else BlockMask.causal(T, bq=8, bk=8)
    job, queries, keys = shards(P, mask, 4, 2, 8, "float32")
    mesh = jax.make_mesh((P,), ("seq",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:P])
    call = functools.partial(attention, mask=mask, mesh=mesh, schedule=name)
    place = jax.sharding.NamedSharding(mesh, jax.P(None, "seq"))
    q, k, v, do = (jax.device_put(np.ones((1, T, n, 8), "float32"), place) for n in (4, 2, 2, 4))
    # Apart: in one program the compiler sends once what both passes send alike.
    forward = jax.jit(call).lower(q, k, v)
    _, pullback = jax.vjp(jax.jit(call), q, k, v)
    backward = jax.jit(lambda pullback, do: pullback(do)).lower(pullback, do)
    for lowered, is_backward in ((forward, False), (backward, True)):
        text = lowered.compile().as_text()
        assert {(op, depth) for op, _, depth in collectives(text)} == {("collective-permute", 0)}
        permute = r"= f32\[([\d,]*)\]\S* collective-permute\(.*_pairs=({[{}\d,]*})"
        sent = [
            4 * math.prod(map(int, shape.split(","))) * (pairs.count("{") - 1) / P
            for shape, pairs in re.findall(permute, text)
        ]
        counted = traffic(name, job, queries, keys, is_backward).injected
        assert sum(sent) == pytest.approx(counted, rel=0.01)
        shapes = {tuple(map(int, x.split(","))) for x in re.findall(r"\w+\[([\d,]+)\]", text)}
        assert not [shape for shape in shapes if sum(n >= T // P for n in shape) > 1]


def test_the_least_is_chosen_and_said(caplog):
    mask = BlockMask.causal(64, bq=8, bk=8)
    mesh = jax.make_mesh((4,), ("seq",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    _log_choice.cache_clear()
    q, k = jnp.zeros((1, 64, 4, 8)), jnp.zeros((1, 64, 1, 8))
    with caplog.at_level(logging.INFO):
        jax.eval_shape(functools.partial(attention, mask=mask, mesh=mesh), q, k, k)
    assert "attention over 4 devices: two_stream_ring forward, ring backward; MiB" in caplog.text
    assert "; forward with ulysses=2 " in caplog.text


@pytest.mark.parametrize(("P", "K", "linked", "least"), [(4, 8, True, 4), (2, 8, True, 1), (8, 1, False, 1)])
def test_tokens_are_exchanged_for_heads_where_that_sends_less(P, K, linked, least, monkeypatch):
    monkeypatch.setattr(attention_module, "target", lambda: Target("gpu" if linked else "tpu", ""))
    chosen = []
    monkeypatch.setattr(attention_module, "_log_choice", lambda devices, ulysses, *_: chosen.append(ulysses))
    mesh = jax.make_mesh((P,), ("seq",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:P])
    q, k = (jax.ShapeDtypeStruct((1, 128 * P, n, 8), "bfloat16") for n in (32, K))
    mask = BlockMask.causal(128 * P, bq=8, bk=8)
    jax.eval_shape(functools.partial(attention, mask=mask, mesh=mesh, layout="zigzag"), q, k, k)
    assert chosen == [least]


def test_an_exchange_is_counted_as_compiled():
    P, N, K, H, T = 4, 8, 4, 8, 64
    mesh = jax.make_mesh((P,), ("seq",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:P])
    call = functools.partial(attention, mask=BlockMask.causal(T, bq=8, bk=8), mesh=mesh, ulysses=P)
    arrays = [jnp.zeros((1, T, n, H)) for n in (N, K, K)]
    exchanges = [
        math.prod(e.invars[0].aval.shape) * 4
        for e in equations(jax.make_jaxpr(lambda *x: call(*x, return_lse=True))(*arrays).jaxpr)
        if e.primitive.name == "all_to_all"
    ]
    q, k = (jax.ShapeDtypeStruct((1, T, n // P, H), "float32") for n in (N, K))
    counted = exchanged(Queries(q, None, None, None), Keys(k, k, None, None), P, P, linked=True)
    assert counted == sum(exchanges) * (P - 1) / P


@pytest.mark.parametrize(("K", "mover"), [(8, "two_stream_ring"), (32, "token_ring")])
def test_queries_move_in_the_backward_of_as_many_key_heads(K, mover):
    """4 + 8 bytes a feature of keys and values against 4 + 4 of queries: even at one and a half heads."""
    parts = shards(8, BlockMask.causal(8 * 1024), 32, K, 128)
    assert next(iter(choose(*parts, linked=False)["backward"])) == mover


def test_what_no_one_uses_is_not_sent():
    mask = BlockMask.causal(64, bq=8, bk=8)
    job, queries, keys = shards(4, mask, 4, 4, 8)
    sends = traffic("ring", job, queries, keys, False).sends
    # Of a causal mask, the last place's keys go nowhere, those of the first to all others.
    assert [x.bytes / (keys.k.size * 2 * 2) for x in sends] == [3 / 4, 2 / 4, 1 / 4]
    assert np.array_equal(job.ring.uses, np.tril(np.ones((4, 4), bool)))
