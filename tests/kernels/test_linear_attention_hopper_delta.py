"""The delta rule of the Hopper backend: what runs without a GPU, and its suite on one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blockjax.kernels.linear_attention import api, hopper, linear_attention, passes, reference, xla
from blockjax.kernels.linear_attention.hopper import TILE, delta, delta_backward, delta_forward
from blockjax.kernels.linear_attention.spec import Inputs, Options

from tests.kernels.linear_attention_suite import assert_close, assert_close_to_xla, make, rand
from tests.kernels.targets import H100


class Plain:
    """What the kernels compute, in plain JAX; NaN where they write nothing."""

    def __init__(self, numbers):
        coarse, fine, self.beta, self.enter, self.leave, *_ = jnp.moveaxis(numbers, 3, 0)[..., None]
        G = coarse + fine
        seen = jnp.tri(TILE, dtype=bool)
        self.D = jnp.exp(jnp.where(seen, G - G.swapaxes(-1, -2), -jnp.inf))
        self.across, self.chunks = self.enter[..., -1:, :], numbers.shape[2]

    def cut(self, x):
        """[B, T, K, H] to [B, K, chunks, 64, H]."""
        B, T, K, H = x.shape
        x = jnp.pad(x, ((0, 0), (0, self.chunks * TILE - T), (0, 0), (0, 0)))
        return x.reshape(B, -1, TILE, K, H).transpose(0, 3, 1, 2, 4)

    @staticmethod
    def tokens(x, T):
        B, K, _, _, H = x.shape
        return x.transpose(0, 2, 3, 1, 4).reshape(B, -1, K, H)[:, :T]

    @staticmethod
    def walk(cut, step, entries, reverse=False):
        """What `step(chunk, state)` returns besides the state, the states that leave pieces and at marks."""
        out, last, marks = [None] * cut.chunks, [], []
        for p, length in enumerate(cut.lengths()):
            S, at = (
                entries[:, :, p],
                [jnp.full_like(entries[:, :, p], jnp.nan)] * max(1, (cut.length - 1) // 4),
            )
            for i in reversed(range(length)) if reverse else range(length):
                S, out[p * cut.length + i] = step(p * cut.length + i, S)
                border = i if reverse else i + 1
                if border % 4 == 0 and 0 < border < length:
                    at[border // 4 - 1] = S
            last.append(S)
            marks.append(jnp.stack(at, 2))
        return [jnp.stack(x, 2) for x in zip(*out, strict=True)], jnp.stack(last, 2), jnp.stack(marks, 2)


def t(x):
    return x.swapaxes(-1, -2)


def plain_inverse(operands):
    x = Plain(operands.numbers)
    k = x.cut(operands.k)
    L = jnp.tril(k @ t(k) * x.D, -1)
    return -L @ jnp.linalg.inv(jnp.eye(TILE) + x.beta * L)


def forward(call, operands, v, entries, q=None):
    x, solve = Plain(operands.numbers), operands.solve
    k = x.cut(operands.k)
    q = jnp.zeros_like(k) if q is None else x.cut(q)

    def step(c, S):
        X = v[:, :, c] - x.enter[:, :, c] * (k[:, :, c] @ S)
        e = X + solve[:, :, c] @ (x.beta[:, :, c] * X)
        written = x.beta[:, :, c] * e
        o = x.enter[:, :, c] * (q[:, :, c] @ S) + (q[:, :, c] @ t(k[:, :, c]) * x.D[:, :, c]) @ written
        return x.across[:, :, c] * S + t(x.leave[:, :, c] * k[:, :, c]) @ written, (call.scale * o, e)

    return x.walk(call.cut, step, entries)


def plain_maps(call, operands):
    v, Hk = Plain(operands.numbers).cut(operands.v), operands.k.shape[-1]
    v = jnp.pad(v, [(0, 0)] * 4 + [(0, Hk)])
    start = jnp.pad(jnp.eye(Hk), ((0, 0), (v.shape[-1] - Hk, 0)))
    start = jnp.broadcast_to(start, (*v.shape[:2], call.cut.pieces, *start.shape))
    return forward(call, operands, v, start)[1]


def plain_outputs(call, operands):
    x, T = Plain(operands.numbers), operands.k.shape[1]
    (o, e), last, marks = forward(call, operands, x.cut(operands.v), operands.entries, operands.q)
    return x.tokens(o, T), x.tokens(e, T), last[:, :, -1], marks


def plain_back(call, operands, adding=False):
    x, T = Plain(operands.numbers), operands.k.shape[1]
    q, k, do = (x.cut(a) for a in operands[:3])
    e = jnp.zeros_like(do) if adding else x.cut(operands.errors)
    entries = operands.entries
    if adding:
        entries = jnp.zeros((*k.shape[:2], call.cut.pieces, k.shape[-1], do.shape[-1]))

    def step(c, R):
        kc, qc, dc, ec, D = k[:, :, c], call.scale * q[:, :, c], do[:, :, c], e[:, :, c], x.D[:, :, c]
        enter, leave, beta = x.enter[:, :, c], x.leave[:, :, c], x.beta[:, :, c]
        dw = t(qc @ t(kc) * D) @ dc + leave * (kc @ R)
        y = dw + t(operands.solve[:, :, c]) @ (beta * dw)
        dv = beta * y
        dk = leave * (ec @ t(R)) + t(dc @ t(ec) * D) @ qc - t(jnp.tril(dv @ t(ec) * D, -1)) @ kc
        sums = (y * ec).sum(-1), (kc * beta * dk).sum(-1)
        return x.across[:, :, c] * R + t(enter * qc) @ dc - t(enter * kc) @ dv, (dv, beta * dk, *sums)

    (dv, dk, *sums), last, marks = x.walk(call.cut, step, entries, reverse=True)
    if adding:
        return last[:, :, 1:]
    sums = [a.reshape(*a.shape[:2], 1, -1) for a in sums]
    return x.tokens(dv, T), x.tokens(dk, T), *sums, last[:, :, 0], marks


def plain_chain(operands):
    first, maps, added = operands
    Hv, reverse = first.shape[-1], added is not None
    out = [first]
    for p in reversed(range(1, maps.shape[2])) if reverse else range(maps.shape[2] - 1):
        M = maps[:, :, p, :, Hv:]
        out.append(t(M) @ out[-1] + added[:, :, p - 1] if reverse else M @ out[-1] + maps[:, :, p, :, :Hv])
    return jnp.stack(out[::-1] if reverse else out, 2)


def plain_ahead(call, operands):
    x, T = Plain(operands.numbers), operands.k.shape[1]
    q, k, do, dv, e, writes = (x.cut(a) for a in operands[:6])

    def step(c, S):
        kc, dc, dvc, ec, D = k[:, :, c], call.scale * do[:, :, c], dv[:, :, c], e[:, :, c], x.D[:, :, c]
        enter, written = x.enter[:, :, c], x.beta[:, :, c] * ec
        dq = enter * (dc @ t(S)) + (dc @ t(written) * D) @ kc
        dk = -enter * (dvc @ t(S)) - jnp.tril(dvc @ t(written) * D, -1) @ kc
        sums = (q[:, :, c] * dq + kc * dk).sum(-1)
        S = x.across[:, :, c] * S + t(x.leave[:, :, c] * kc) @ written
        return S, (dq, dk + writes[:, :, c], sums)

    (dq, dk, sums), _, _ = x.walk(call.cut, step, operands.entries)
    return x.tokens(dq, T), x.tokens(dk, T), sums.reshape(*sums.shape[:2], 1, -1)


@pytest.fixture
def plain_kernels(monkeypatch):
    monkeypatch.setattr(delta, "inverse", plain_inverse)
    monkeypatch.setattr(delta, "chain", plain_chain)
    monkeypatch.setattr(delta_forward, "maps", plain_maps)
    monkeypatch.setattr(delta_forward, "outputs", plain_outputs)
    monkeypatch.setattr(delta_backward, "added_back", lambda call, x: plain_back(call, x, adding=True))
    monkeypatch.setattr(delta_backward, "back", plain_back)
    monkeypatch.setattr(delta_backward, "ahead", plain_ahead)


# Documents end inside a chunk, at its border, after one token, and one spans several pieces.
IDS = np.repeat([0, 1, 2, 3], [128, 1, 500, 171])


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize("decay", ["none", "head", "token", "documents", "queries"])
@pytest.mark.sample("token", "documents", "queries")
def test_what_is_around_the_kernels(decay, monkeypatch):
    """With kernels that are plain JAX: pieces, the last of them shorter, marks in them, and the formulas."""
    monkeypatch.setattr(delta, "cut", lambda heads, K, chunks: delta.Cut(heads, K, chunks, 5))
    T = 800
    form, N = dict(documents="token", queries="token").get(decay, decay), 4 if decay == "queries" else 2
    args = make(kind="delta", decay=form, B=1, T=T, N=N, Hk=4, Hv=3, rate=0.1)
    ids = jnp.asarray(IDS[None], "int32") if decay == "documents" else None
    order = "q", "k", "v", "log_decay", "beta"
    inputs = Inputs(*(args.get(name) for name in order), ids, args["initial_state"])

    def both(backend):
        known = inputs._replace(documents=None)
        out, pullback = jax.vjp(
            lambda x: passes.run(backend, x._replace(documents=inputs.documents), Options("delta", 0.3)),
            known,
        )
        return out, pullback(jax.tree.map(lambda x: rand((7, x.ndim), *x.shape), out))

    with jax.default_matmul_precision("highest"):
        # The gradient of a decay that all tokens share is that of XLA, to rounding of a long sum.
        assert_close(both(hopper), both(xla if decay == "head" else reference), 5e-5)


# Together all head dims, forms, and lengths that are whole chunks, rows of the copy engine, neither.
LOWERED = {"token": dict(), "none": dict(decay="none", Hk=64, T=1000), "documents": dict(Hv=64, T=1001)}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", LOWERED)
def test_lowers(name, monkeypatch):
    """The solve, maps, their chain and outputs; of the backward, what pieces add, its chain and two walks."""
    monkeypatch.setattr(api, "target", lambda: H100)
    size = dict(B=1, T=1024, K=2, Hk=128, Hv=128, decay="token") | LOWERED[name]
    B, T, K, Hk, Hv = (size[x] for x in ("B", "T", "K", "Hk", "Hv"))
    shapes = dict(q=(B, T, K, Hk), k=(B, T, K, Hk), v=(B, T, K, Hv))
    args = {x: jax.ShapeDtypeStruct(shape, "bfloat16") for x, shape in shapes.items()}
    args["beta"] = jax.ShapeDtypeStruct((B, T, K), "float32")
    if size["decay"] == "token":
        args["log_decay"] = args["beta"]
    ids = jax.ShapeDtypeStruct((B, T), "int32") if name == "documents" else None

    def both(args, ids):
        def op(x):
            return linear_attention(
                **x, kind="delta", segment_ids=ids, return_state=True, implementation="hopper"
            )

        out, pullback = jax.vjp(op, args)
        return out, pullback(out)

    text = jax.jit(both).trace(args, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 8


@pytest.mark.gpu
class TestHopperDelta:
    """Products of bfloat16 here, of float32 in plain XLA: tolerances are by norm."""

    @pytest.mark.parametrize("T", [64, 129, 1000, 4096])
    @pytest.mark.parametrize(("Hk", "Hv"), [(64, 64), (128, 64), (64, 128), (128, 128)])
    @pytest.mark.parametrize("decay", ["none", "head", "token", "documents"])
    def test_close_to_xla(self, decay, Hk, Hv, T):
        self.check(decay, T, 3, Hk, Hv)

    @pytest.mark.parametrize("decay", ["head", "documents"])
    def test_queries_of_a_state(self, decay):
        self.check(decay, 1000, 6, 128, 64)

    def test_keys_that_are_alike(self):
        """Products of bfloat16 alone would solve this with errors of 1e-2."""
        args = make(kind="delta", decay="none", B=1, T=512, N=2, Hk=128, Hv=128, dtype="bfloat16")
        k = rand(1, 1, 1, 2, 128) + 0.1 * rand(2, *args["k"].shape)
        args["k"] = (k / jnp.linalg.norm(k, axis=-1, keepdims=True)).astype("bfloat16")
        assert_close_to_xla("hopper", args, None, kind="delta")

    def check(self, decay, T, N, Hk, Hv):
        form = "token" if decay == "documents" else decay
        args = make(kind="delta", decay=form, B=2, T=T, N=N, K=3, Hk=Hk, Hv=Hv, dtype="bfloat16", rate=0.2)
        starts = np.random.default_rng(1).random((2, T)) < 5 / T
        ids = jnp.asarray(np.cumsum(starts, 1), jnp.int32) if decay == "documents" else None
        assert_close_to_xla("hopper", args, ids, kind="delta")
