"""`linear_attention`: the oracle against the definition in numpy, mistakes, and what no backend decides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blockjax.kernels.linear_attention import xla
from blockjax.kernels.linear_attention.api import checked, select
from jax.sharding import AxisType

import blockjax as bj
from blockjax.errors import UsageError
from tests.jaxprs import arrays
from tests.kernels.linear_attention_suite import FORMS, IDS, LinearAttentionSuite, assert_close, make


def in_numpy(q, k, v, log_decay=None, beta=None, initial_state=None, kind="decay", scale=1.0, ids=None):
    """One state at a time, as the definition says, in float64."""
    (B, T, N, Hk), (K, Hv) = q.shape, v.shape[2:]
    o, states = np.zeros((B, T, N, Hv)), np.zeros((B, K, Hk, Hv))
    for b, h in np.ndindex(B, K):
        S = np.zeros((Hk, Hv)) if initial_state is None else np.array(initial_state[b, h], "float64")
        last = None
        for t in range(T):
            here = 0 if ids is None else ids[b, t]
            if here < 0:
                continue
            if last not in (None, here):
                S = np.zeros_like(S)
            last = here
            if log_decay is not None:
                g = log_decay[h] if log_decay.ndim == 1 else log_decay[b, t, h]
                S = np.exp(np.reshape(g, (-1, 1))) * S
            key, value = np.array(k[b, t, h], "float64"), np.array(v[b, t, h], "float64")
            S = S + np.outer(key, value if kind == "decay" else beta[b, t, h] * (value - key @ S))
            for n in range(h * N // K, (h + 1) * N // K):
                o[b, t, n] = scale * q[b, t, n] @ S
        states[b, h] = S
    return o, states


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_the_oracle_is_the_definition(form):
    kind, decay = form
    args = {name: np.asarray(x) for name, x in make(kind=kind, decay=decay, N=4, Hv=12).items()}
    options = dict(kind=kind, scale=0.7)
    found = bj.linear_attention(
        **args, segment_ids=IDS, return_state=True, implementation="reference", **options
    )
    for ours, theirs in zip(found, in_numpy(**args, ids=IDS, **options), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


ARGS = make(kind="delta", N=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(q=ARGS["q"][0]), r"need 4 axes .* got \(37, 4, 8\)"),
        (dict(k=ARGS["k"][:, :30]), r"\(2, 30, 2, 8\) and v \(2, 37, 2, 8\) must agree in \[B, T\]"),
        (dict(q=ARGS["q"][..., :7]), "must agree in head size"),
        (
            dict(q=ARGS["q"][:, :, :3]),
            "has 2 heads: k .* needs a divisor, q .* a multiple or a divisor",
        ),
        (dict(v=ARGS["v"].astype("bfloat16")), "one floating dtype, got float32, float32 and bfloat16"),
        (dict(kind="gated"), "kind='gated' must be one of decay, delta"),
        (dict(kind="decay"), 'beta is for kind="delta"'),
        (dict(log_decay=ARGS["beta"][0]), r"log_decay must be floating \[2\] or \[2, 37, 2\] or .*\(37, 2\)"),
        (dict(beta=ARGS["beta"][..., 0]), r"beta must be floating \[2, 37, 2\]"),
        (dict(initial_state=ARGS["initial_state"][0]), r"initial_state must be floating \[2, 2, 8, 8\]"),
        (dict(segment_ids=IDS[0]), r"segment_ids must be integers \[2, 37\], got int32 \(37,\)"),
        (dict(chunk_size=48), "chunk_size=48 must be a power of two"),
        (dict(scale=ARGS["beta"]), "multiply q instead"),
        (dict(implementation="fast"), "no implementation 'fast'; choose from .*reference"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(UsageError, match=message):
        bj.linear_attention(**dict(kind="delta") | ARGS | changes)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_on_a_mesh(implementation):
    """Rows cut over devices by the caller; the gradient of a decay that all share is the sum of theirs."""
    args = make(kind="delta", decay="head", B=4, T=20, state=False)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    cut = {name: jax.P("data") if x.ndim > 1 else jax.P() for name, x in args.items()}

    def call(args):
        return bj.linear_attention(
            **args, kind="delta", return_state=True, chunk_size=8, implementation=implementation
        )

    sharded = jax.shard_map(call, mesh=mesh, in_specs=(cut,), out_specs=jax.P("data"))

    def both(call):
        out, pullback = jax.vjp(call, args)
        return out, pullback(jax.tree.map(jnp.cos, out))

    assert_close(jax.jit(lambda: both(sharded))(), jax.jit(lambda: both(call))())


def test_falls_back_to_xla_with_the_reason():
    with pytest.raises(UsageError, match="'tpu' cannot serve this call: it runs on TPUs, not on cpu"):
        bj.linear_attention(**ARGS, kind="delta", implementation="tpu")
    assert select(checked(**ARGS, kind="delta", segment_ids=None), "delta")[0] is xla


def test_heads_of_queries_and_keys_may_be_shared():
    """As in Mamba-2 and Gated DeltaNet: fewer of them than of values."""
    args = make(N=1, K=4, state=False)
    one = dict(args, k=args["k"][:, :, :2])
    found = bj.linear_attention(**one, implementation="reference")
    spread = dict(one, q=jnp.repeat(one["q"], 4, 2), k=jnp.repeat(one["k"], 2, 2))
    assert_close(found, bj.linear_attention(**spread, implementation="reference"), 1e-6)


def test_memory_is_linear_and_states_are_kept_once_a_span():
    """No array of T x T; what the backward pass sees beside the arguments is a state every 1024 tokens."""
    args = make(B=1, T=4096, N=1, K=1, Hk=16, Hv=16, state=False)

    def call(args):
        return bj.linear_attention(**args, implementation="xla")

    _, pullback = jax.vjp(call, args)
    kept = [x.shape for x in jax.tree.leaves(pullback)]
    assert kept.count((1, 4096, 1, 16)) == 3
    assert sum(map(np.prod, kept)) - 3 * 4096 * 16 <= 4 * 16 * 16 + 3 * 4096  # states, numbers per token
    program = jax.make_jaxpr(jax.grad(lambda args: jnp.sum(call(args) ** 2)))(args)
    assert max(x.size for x in arrays(program.jaxpr)) <= 4096 * 64


class TestXla(LinearAttentionSuite):
    implementation = "xla"
