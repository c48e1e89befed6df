"""Decays a channel of the Hopper backend: what runs without a GPU, and its suite on one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blockjax.kernels.linear_attention import api, hopper, passes, reference
from blockjax.kernels.linear_attention.hopper import walk
from blockjax.kernels.linear_attention.spec import Inputs, Options

from tests.kernels.linear_attention_suite import (
    assert_close,
    assert_close_to_xla,
    both,
    cotangents_of,
    make,
    rand,
)
from tests.kernels.targets import H100


def plain_states(reverse, x):
    """What the kernel computes, rounded where it rounds."""
    S, before = x.state, [None] * x.across.shape[0]
    for c in reversed(range(len(before))) if reverse else range(len(before)):
        before[c] = S
        after = x.across[c].reshape(*S.shape[:2], 1) * S
        if x.added is not None:
            after += x.added[c].astype(S.dtype)
        if x.write is not None:
            write, seen, read = (a[c].astype(S.dtype) for a in (x.write, x.seen, x.read))
            values = seen - read @ S.astype(x.read.dtype).astype(S.dtype)
            after += write.swapaxes(-1, -2) @ values.astype(x.seen.dtype).astype(S.dtype)
        S = after
    return S, jnp.stack(before)


# Documents end inside a chunk, at its border, after one token, and one spans several chunks.
IDS = np.repeat([0, 1, 2, 3], [64, 1, 150, 85])


@pytest.mark.parametrize(("kind", "documents"), [("delta", True), ("decay", False)])
def test_what_is_around_the_kernel(kind, documents, monkeypatch):
    """With a kernel that is plain JAX: spans, the last of them shorter, and how steps are handed over."""
    monkeypatch.setattr(walk, "states", plain_states)
    monkeypatch.setattr(hopper, "SPAN_TOKENS", 2 * 150)
    args = make(kind=kind, decay="channel", B=1, T=300, Hk=64, Hv=3, rate=0.1)
    ids = jnp.asarray(IDS[None], "int32") if documents else None
    order = "q", "k", "v", "log_decay", "beta"
    inputs = Inputs(*(args.get(name) for name in order), None, args["initial_state"])

    @functools.partial(jax.jit, static_argnums=0)
    def both(backend, inputs):
        def run(x):
            return passes.run(backend, x._replace(documents=ids), Options(kind, 0.3))

        out, pullback = jax.vjp(run, inputs)
        return out, pullback(jax.tree.map(lambda x: rand((7, x.ndim), *x.shape), out))

    with jax.default_matmul_precision("highest"):
        assert_close(both(hopper, inputs), both(reference, inputs), 5e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("Hk", "Hv"), [(64, 128), (128, 64)])
@pytest.mark.parametrize("kind", ["delta", "decay"])
def test_what_the_kernel_rounds_is_within_tolerances(kind, Hk, Hv, monkeypatch):
    """bfloat16, so that products here are those of a GPU."""
    monkeypatch.setattr(walk, "states", plain_states)
    monkeypatch.setattr(api, "target", lambda: H100)
    args = make(kind=kind, decay="channel", B=1, T=1000, Hk=Hk, Hv=Hv, dtype="bfloat16", rate=0.2)
    assert_close_to_xla("hopper", args, None, kind)


# Together head dims, directions, terms of a step, and one or two warpgroups.
LOWERED = {
    "forward": dict(Hk=128, Hv=128, reverse=False),
    "backward": dict(Hk=128, Hv=128, added=True),
    "many heads": dict(heads=100, Hk=128, Hv=128, added=True),
    "narrow": dict(Hk=64, Hv=128, dtype="float16"),
    "decay": dict(Hk=128, Hv=64, added=True, delta=False, reverse=False),
}


@pytest.mark.parametrize("name", LOWERED)
def test_walk_lowers(name):
    call = dict(heads=2, added=False, delta=True, reverse=True, dtype="bfloat16") | LOWERED[name]
    heads, Hk, Hv, delta = (call[x] for x in ("heads", "Hk", "Hv", "delta"))

    def array(*shape, dtype=call["dtype"]):
        return jax.ShapeDtypeStruct(shape, dtype)

    keys = array(8, heads, 64, Hk) if delta else None
    operands = walk.Operands(
        state=array(heads, Hk, Hv, dtype="float32"),
        across=array(8, heads, Hk // 64, 64, dtype="float32"),
        added=array(8, heads, Hk, Hv) if call["added"] else None,
        write=keys,
        seen=array(8, heads, 64, Hv) if delta else None,
        read=keys,
    )
    walk.states.trace(call["reverse"], operands).lower(lowering_platforms=("cuda",))


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["delta", "decay"])
def test_lowers(kind, monkeypatch):
    """Forward, and of the backward the states again and their gradients."""
    monkeypatch.setattr(api, "target", lambda: H100)
    args = jax.eval_shape(
        lambda: make(kind=kind, decay="channel", B=1, T=1001, Hk=128, Hv=128, dtype="bfloat16")
    )
    ids = jax.ShapeDtypeStruct((1, 1001), "int32")
    out = jax.eval_shape(lambda: cotangents_of(args))
    run = jax.jit(functools.partial(both, "hopper", kind=kind))
    text = run.trace(args, out, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 3


@pytest.mark.gpu
class TestHopperChannels:
    @pytest.mark.parametrize("T", [64, 129, 1000, 4096])
    @pytest.mark.parametrize(("Hk", "Hv"), [(64, 64), (128, 64), (64, 128), (128, 128)])
    @pytest.mark.parametrize("documents", [False, True])
    def test_close_to_xla(self, documents, Hk, Hv, T):
        self.check("delta", documents, T, B=2, N=3, K=3, Hk=Hk, Hv=Hv)

    @pytest.mark.parametrize(("Hk", "Hv", "T"), [(64, 128, 4096), (128, 64, 129), (128, 128, 1000)])
    def test_decay_close_to_xla(self, Hk, Hv, T):
        self.check("decay", True, T, B=2, N=3, K=3, Hk=Hk, Hv=Hv)

    def test_several_spans(self, monkeypatch):
        monkeypatch.setattr(hopper, "SPAN_TOKENS", 2 * 200)
        self.check("delta", True, 1000, B=1, N=2, K=2, Hk=128, Hv=128)

    def test_two_warpgroups(self):
        self.check("delta", False, 200, B=2, N=40, K=40, Hk=128, Hv=128)

    def check(self, kind, documents, T, **sizes):
        """Products of bfloat16 here, of float32 in plain XLA: tolerances are by norm."""
        args = make(kind=kind, decay="channel", T=T, dtype="bfloat16", rate=0.2, **sizes)
        starts = np.random.default_rng(1).random((sizes["B"], T)) < 5 / T
        ids = jnp.asarray(np.cumsum(starts, 1), jnp.int32) if documents else None
        assert_close_to_xla("hopper", args, ids, kind)
