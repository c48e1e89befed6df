"""The Hopper backend: what runs without a GPU, and its suite on one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blockjax.kernels.linear_attention import api, hopper, passes, reference, xla
from blockjax.kernels.linear_attention.hopper import TILE, parts, pieces, sweep
from blockjax.kernels.linear_attention.spec import Inputs, Options, Spec
from blockjax.kernels.platforms import Target

from blockjax import parallel
from tests.kernels.linear_attention_suite import (
    assert_close,
    assert_close_to_xla,
    both,
    cotangents_of,
    make,
    rand,
)
from tests.kernels.targets import H100


def spec(**changes):
    sizes = dict(B=1, T=8192, N=8, K=8, Hk=128, Hv=128)
    call = dict(target=H100, dtype=jnp.dtype("bfloat16"), kind="decay", decay="head") | sizes
    return Spec(**call | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(), None),
        (dict(target=Target("gpu", "NVIDIA H200"), decay="token", documents=True, T=1001), None),
        (dict(dtype=jnp.dtype("float16"), Hk=64, decay="none", chunk=64), None),
        (dict(target=Target("cpu", "cpu")), "runs on NVIDIA Hopper GPUs .* not on cpu"),
        (dict(target=Target("gpu", "NVIDIA A100-SXM4-80GB")), "not on NVIDIA A100"),
        (dict(dtype=jnp.dtype("float32")), "needs bfloat16 or float16, not float32"),
        (dict(kind="delta", decay="token"), None),
        (dict(kind="delta", decay="channel"), None),
        (dict(Hv=256), r"head dims must be in \(64, 128\), got 128 and 256"),
        (dict(N=16), None),
        (dict(T=1), "at least 64 tokens, got 1"),
        (dict(chunk=128), "chunks have 64 tokens, not 128"),
    ],
)
def test_refuses_before_compilation_with_the_numbers(changes, reason):
    said = hopper.supports(spec(**changes))
    assert said is None if reason is None else re.search(reason, said)


@pytest.mark.parametrize("heads", [1, 7, 16, 64, 131, 132, 133, 1000])
@pytest.mark.parametrize("chunks", [1, 5, 64, 513])
def test_pieces_cover_the_chunks(heads, chunks):
    cut = pieces.cut(heads, 1, chunks)
    assert sum(cut.lengths()) == chunks and min(cut.lengths()) >= 1
    assert cut.pieces <= parts.MOST_PIECES


@pytest.mark.parametrize(("B", "N", "count"), [(1, 16, 8), (4, 16, 2), (1, 132, 1)])
def test_pieces_fill_the_chip(B, N, count):
    assert pieces.cut(B * N, N, 512).pieces == count


def weights(call, decays, B, K, chunks):
    """What a token sees of the state, what it leaves, the weights of pairs [..., 64, 64], across, outside."""
    if decays.tokens is None:
        lane = jnp.arange(1, TILE + 1, dtype=jnp.float32)
        sums = jnp.broadcast_to(decays.rate[None, :, None, None] * lane, (B, K, chunks, TILE))
        enter, leave, ids = jnp.exp2(sums), jnp.exp2(sums[..., -1:] - sums), jnp.zeros_like(sums)
        across, steps = enter[..., -1], jnp.arange(chunks) % call.cut.length
        last = jnp.minimum(call.cut.length, chunks - jnp.arange(chunks) + steps) - 1
        outside = jnp.exp2(decays.rate[:, None] * TILE * (steps if call.reverse else last - steps))
        outside = jnp.broadcast_to(outside, (B, K, chunks))
    else:
        enter, leave, sums, ids = jnp.moveaxis(decays.tokens.reshape(B, K, chunks, 4, TILE), 3, 0)
        across, outside = decays.across, decays.outside
    seen = jnp.tri(TILE, dtype=bool) & (ids[..., :, None] == ids[..., None, :])
    pairs = jnp.exp2(jnp.where(seen, sums[..., :, None] - sums[..., None, :], -jnp.inf))
    if call.reverse:
        enter, leave, pairs = leave, enter, pairs.swapaxes(-1, -2)
    return enter, leave, pairs, across, outside


def chunked(x, chunks):
    """[B, T, K, H] to [B, K, chunks, 64, H]."""
    B, T, K, H = x.shape
    x = jnp.pad(x, ((0, 0), (0, chunks * TILE - T), (0, 0), (0, 0)))
    return x.reshape(B, chunks, TILE, K, H).transpose(0, 3, 1, 2, 4)


def plain_sweep(call, operands):
    """What the kernel `sweep` computes."""
    q, k, v, entries, decays, x = operands
    cut, (B, T, K, _) = call.cut, q.shape
    q, k, w = (chunked(a, cut.chunks) for a in (q, k, v))
    enter, leave, pairs, across, _ = weights(call, decays, B, K, cut.chunks)
    out, states = [None] * cut.chunks, []
    for p, length in enumerate(cut.lengths()):
        S, order = entries[:, :, p], range(p * cut.length, p * cut.length + length)
        for c in reversed(order) if call.reverse else order:
            scores = jnp.einsum("bkic,bkjc->bkij", q[:, :, c], k[:, :, c]) * pairs[:, :, c]
            read = jnp.einsum("bkic,bkcv->bkiv", q[:, :, c], S) * enter[:, :, c, :, None]
            out[c] = call.read * read + call.pair * scores @ w[:, :, c]
            added = jnp.einsum("bkic,bkiv->bkcv", k[:, :, c], leave[:, :, c, :, None] * w[:, :, c])
            S = across[:, :, c, None, None] * S + call.write * added
        states.append(S)
    o = jnp.stack(out, 2)
    sums = None
    if x is not None:
        sums = jnp.sum(o * chunked(x, cut.chunks), -1).reshape(B, K, 1, -1)
    o = o.transpose(0, 2, 3, 1, 4).reshape(B, -1, K, v.shape[-1])[:, :T]
    return o, states[0 if call.reverse else -1], sums


def plain_summaries(call, pieces, operands):
    """What the kernel `summaries` computes; NaN where it does not look."""
    k, v, decays, counts = operands
    cut, (B, _, K, _) = call.cut, k.shape
    k, v = (chunked(a, cut.chunks) for a in (k, v))
    _, leave, _, _, outside = weights(call, decays, B, K, cut.chunks)
    out = []
    for p in range(cut.pieces)[-pieces:] if call.reverse else range(pieces):
        here = np.arange(cut.lengths()[p])
        here = (here if call.reverse else here[::-1]) < counts[:, :, p, None]
        at = slice(p * cut.length, p * cut.length + here.shape[-1])
        w = jnp.where(here, outside[:, :, at], 0)[..., None] * leave[:, :, at] * call.write
        out.append(jnp.einsum("bknic,bkni,bkniv->bkcv", k[:, :, at], w, v[:, :, at]))
    return jnp.stack(out, 2)


@pytest.fixture
def plain_kernels(monkeypatch):
    monkeypatch.setattr(sweep, "sweep", plain_sweep)
    monkeypatch.setattr(pieces, "summaries", plain_summaries)


# Documents end inside a chunk, at its border, after one token, and one spans several pieces.
IDS = np.repeat([3, 3, 5, 6, 7], [30, 98, 1, 300, 21])


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize("T", [450, 448])
@pytest.mark.parametrize("decay", ["none", "head", "token", "documents", "steep", "queries"])
@pytest.mark.sample("*-450", "none-448")
def test_what_is_around_the_kernels(decay, T, monkeypatch):
    """With kernels that are plain JAX: pieces, decays, states between, which walk gives which gradient."""
    monkeypatch.setattr(parts, "LEAST_CHUNKS", 1)
    form = dict(documents="token", steep="head", queries="token").get(decay, decay)
    args = make(decay=form, B=1, T=T, N=4 if decay == "queries" else 2, Hk=4, Hv=3)
    if decay == "steep":
        args["log_decay"] = jnp.asarray([-3.0, -0.0])
    ids = np.cumsum(np.diff(IDS[:T], prepend=3) != 0)[None].astype("int32") if decay == "documents" else None
    inputs = Inputs(args["q"], args["k"], args["v"], args.get("log_decay"), None, ids, args["initial_state"])
    assert pieces.Plan.of(inputs).cut.pieces > 3

    def passes_of(backend):
        known = inputs._replace(documents=None)
        out, pullback = jax.vjp(
            lambda x: passes.run(backend, x._replace(documents=inputs.documents), Options("decay", 0.3)),
            known,
        )
        return out, pullback(cotangents_of(args))

    with jax.default_matmul_precision("highest"):
        # The gradient of a decay that all tokens share is that of XLA, to rounding of a long sum.
        oracle = xla if decay in ("head", "steep") else reference
        assert_close(passes_of(hopper), passes_of(oracle), 5e-5)


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize("decay", ["head", "token", "documents", "queries"])
def test_a_run_in_short(decay, monkeypatch):
    """As XLA has it, of pieces of which the last is shorter; a second document hides the state before."""
    monkeypatch.setattr(parts, "LEAST_CHUNKS", 1)
    args = make(decay="head" if decay == "head" else "token", B=1, T=450, N=4, Hk=4, Hv=3, rate=0.05)
    N = 4 if decay == "queries" else 2
    q, do = args["q"][:, :, :N], rand((9, 9), 1, 450, N, 3)
    ids = (
        np.cumsum(np.diff(IDS[:450], prepend=3) != 0)[None].astype("int32") if decay == "documents" else None
    )
    inputs = Inputs(q, args["k"], args["v"], args["log_decay"], None, ids)
    with jax.default_matmul_precision("highest"):
        ours, theirs = (
            (
                backend.summary.forward(inputs, Options("decay", 0.3))[0],
                backend.summary.backward(inputs, do, Options("decay", 0.3))[0],
            )
            for backend in (hopper, xla)
        )
    assert_close(ours, theirs, 5e-5)


@pytest.fixture
def for_hopper(monkeypatch):
    monkeypatch.setattr(api, "target", lambda: H100)


# Together all head dims, forms, and lengths that are whole chunks, rows of the copy engine, neither.
LOWERED = {
    "head": dict(decay="head"),
    "none": dict(decay="none", Hk=128, Hv=64, T=1000),
    "token": dict(decay="token", Hk=64, Hv=128, dtype="float16"),
    "documents": dict(decay="token", Hk=64, Hv=64, T=1001, documents=True),
}


@pytest.mark.usefixtures("for_hopper")
@pytest.mark.parametrize("name", LOWERED)
@pytest.mark.sample("head", "documents")
def test_lowers(name):
    """Two summaries, one walk forward and three backward."""
    options = dict(B=2, T=1024, K=2, Hk=128, Hv=128, dtype="bfloat16", documents=False) | LOWERED[name]
    B, T, K, Hk, Hv = (options[x] for x in ("B", "T", "K", "Hk", "Hv"))
    args = {
        x: jax.ShapeDtypeStruct((B, T, K, H), options["dtype"]) for x, H in (("q", Hk), ("k", Hk), ("v", Hv))
    }
    shape = dict(head=(K,), token=(B, T, K)).get(options["decay"])
    if shape is not None:
        args["log_decay"] = jax.ShapeDtypeStruct(shape, "float32")
    args["initial_state"] = jax.ShapeDtypeStruct((B, K, Hk, Hv), "float32")
    ids = jax.ShapeDtypeStruct((B, T), "int32") if options["documents"] else None

    out = jax.ShapeDtypeStruct((B, T, K, Hv), options["dtype"]), args["initial_state"]
    run = jax.jit(both, static_argnums=0)
    text = run.trace("hopper", args, out, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 6


@pytest.mark.usefixtures("for_hopper")
def test_lowers_over_devices():
    """Each pass sums pieces once, for the run in short and for the walks."""
    mesh = jax.make_mesh((2,), ("seq",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    args = {x: jax.ShapeDtypeStruct((1, 16384, 2, 64), "bfloat16") for x in "qkv"}

    def both(args, rates):
        o, pullback = jax.vjp(lambda x: parallel.linear_attention(**x, mesh=mesh, log_decay=rates), args)
        return o, pullback(o)

    traced = jax.jit(both).trace(args, jax.ShapeDtypeStruct((2,), "float32"))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(".call @summaries") == 2 and text.count(".call @sweep") == 4


@pytest.mark.gpu
class TestHopper:
    """Products of bfloat16 here, of float32 in plain XLA: tolerances are by norm."""

    @pytest.mark.parametrize("T", [64, 129, 1000, 4096])
    @pytest.mark.parametrize(("Hk", "Hv"), [(64, 64), (128, 64), (64, 128), (128, 128)])
    @pytest.mark.parametrize("decay", ["none", "head", "token", "documents"])
    def test_close_to_xla(self, decay, Hk, Hv, T):
        self.check(decay, T, 3, Hk, Hv)

    @pytest.mark.parametrize("decay", ["head", "documents"])
    def test_queries_of_a_state(self, decay):
        self.check(decay, 1000, 6, 128, 64)

    def check(self, decay, T, N, Hk, Hv):
        form = "token" if decay == "documents" else decay
        args = make(decay=form, B=2, T=T, N=N, K=3, Hk=Hk, Hv=Hv, dtype="bfloat16", rate=0.2)
        starts = np.random.default_rng(1).random((2, T)) < 5 / T
        ids = jnp.asarray(np.cumsum(starts, 1), jnp.int32) if decay == "documents" else None
        assert_close_to_xla("hopper", args, ids)
