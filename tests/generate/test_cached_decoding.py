"""Prefill and cached decoding against the forward pass over everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blockjax.kernels.depth_mix import passes
from flax import nnx

from blockjax.generate import KVCache, decode, prefill
from blockjax.generate.cache import cache_size
from blockjax.generate.sampler import Memory, Sampling, Settings, _generate
from blockjax.models import Transformer
from tests.models.tiny import random_model, tiny_config

LENGTHS = np.array([1, 5, 17], np.int32)
STEPS = 25
TOTAL = 17 + STEPS

# Options, and the cache size of each layer: 4 is smaller than a prompt, 24 larger, 64 larger than all.
CASES = {
    "full": (dict(depth=2), [TOTAL, TOTAL]),
    "tail": (dict(depth=3, pattern="4,full", soft_cap=2.0), [4, TOTAL, 4]),
    "windows": (dict(depth=3, pattern="16,24,64", kv_heads=4), [16, 24, TOTAL]),
    "beta": (
        dict(depth=3, locality="beta:2,smallest=4", context=64, residual="block_attn_res:size=3,heads=2"),
        [TOTAL, 32, 4],
    ),
    "fixed": (
        dict(locality="table:0.5/1,mode=segment,smallest=6", context=54, residual="delta:heads=4"),
        [18, 6],
    ),
    "lines": (
        dict(locality="constant:1,mode=segment,smallest=4,boundary=delimiter,delimiters=3/5"),
        [8, 8],
    ),
    "adaptive": (
        dict(locality="table:0/1,mode=segment,smallest=4,boundary=adaptive", residual="attn_res:heads=2"),
        [TOTAL, 8],
    ),
    "bias": (dict(locality="table:0/1,mode=bias,smallest=4", residual="delta_block:size=3"), [TOTAL, TOTAL]),
    "loop": (dict(depth=4, pattern="4,full", loop="2*2"), [4, TOTAL, 4, TOTAL]),
    "narrow": (dict(depth=4, pattern="1,3", tied=True, qk_norm=False, kv_heads=1), [1, 3, 1, 3]),
}


def make(**options) -> Transformer:
    return random_model(tiny_config(**dict(vocab_size=32, ffn=24, attention_block=16) | options))


def cached(model, tokens):
    """Logits [steps + 1, B, V] of given tokens [B, TOTAL], fed one at a time after the prompts; caches."""
    graph, params = nnx.split(model)
    prompts = np.where(np.arange(LENGTHS.max()) < LENGTHS[:, None], tokens[:, : LENGTHS.max()], 9)
    boundaries = model.config.local_rule.boundaries
    sizes = [cache_size(spec, TOTAL, boundaries) for spec in model.config.layers()]

    @jax.jit
    def start(params):
        model = nnx.merge(graph, params)
        return prefill(model, list(model.layers()), jnp.asarray(prompts), jnp.asarray(LENGTHS), sizes)

    @jax.jit
    def step(params, token, positions, memory):
        model = nnx.merge(graph, params)
        return decode(model, list(model.layers()), token, positions, memory)

    logits, memory = start(params)
    results = [logits]
    for i in range(STEPS):
        logits, memory = step(params, tokens[np.arange(3), LENGTHS + i], LENGTHS + i, memory)
        results.append(logits)
    return np.stack(results), memory.caches


@pytest.mark.parametrize("case", CASES)
@pytest.mark.sample("tail", "loop", "bias")
def test_cached_logits_are_the_uncached_ones(case):
    options, sizes = CASES[case]
    model = make(**options)
    tokens = np.random.default_rng(0).integers(0, 32, (3, TOTAL)).astype(np.int32)
    logits, caches = cached(model, tokens)
    graph, params = nnx.split(model)
    expected = np.asarray(jax.jit(lambda params: nnx.merge(graph, params)(tokens))(params))
    for i, step in enumerate(logits):
        np.testing.assert_allclose(
            step, expected[np.arange(3), LENGTHS + i - 1], atol=1e-4, rtol=1e-4, err_msg=f"step {i}"
        )
    assert [cache.k.shape for cache in caches] == [(3, n, model.config.kv_heads, 8) for n in sizes]
    for cache, size in zip(caches, sizes, strict=True):
        for row, end in zip(np.asarray(cache.positions), LENGTHS + STEPS, strict=True):
            held = sorted(p for p in row if p >= 0)
            assert held == list(range(max(0, end - size), end))
            assert all(p % size == slot for slot, p in enumerate(row) if p >= 0)


@pytest.mark.parametrize("residual", ["attn_res", "block_attn_res:size=3", "delta_block:size=4"])
def test_a_token_is_mixed_in_one_launch_a_sublayer(residual, monkeypatch):
    """And one for the output head: sources are read when a block starts, for its first sublayer too."""
    model, launches = make(depth=4, residual=residual), []
    for name in ("read", "join"):
        op = getattr(passes, name)
        count = lambda *args, name=name, op=op: launches.append(name) or op(*args)  # noqa: E731
        monkeypatch.setattr(passes, name, count)
    graph, params = nnx.split(model)

    def step(params, tokens, memory):
        model = nnx.merge(graph, params)
        return decode(model, list(model.layers()), tokens, tokens, memory)

    caches = [KVCache(*[jnp.zeros((1, 9, 2, 8))] * 2, jnp.full((1, 9), -1), None)] * 4
    jax.eval_shape(step, params, jnp.zeros(1, jnp.int32), Memory(caches, None))
    rule = model.config.residual_rule
    head = rule.rule == "attn_res"
    assert launches.count("read") == rule.blocks + head
    assert len(launches) == (rule.sublayers + 1 if head else rule.blocks)


@pytest.mark.parametrize("size", [1, 4, 6, 9])
@pytest.mark.sample("4")
def test_a_cache_from_a_prompt_is_one_that_was_filled_token_by_token(size):
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(3, 6, 2, 4)), jnp.float32) for _ in "kv")
    lengths = jnp.array([1, 3, 6])
    segments = jnp.arange(18).reshape(3, 6)
    whole = KVCache.from_prompt(k, v, lengths, segments, size)
    for row, length in enumerate(lengths):
        nothing = jnp.zeros((1, size, 2, 4))
        one = KVCache(nothing, nothing, jnp.full((1, size), -1), jnp.zeros((1, size), jnp.int32))
        for t in range(length):
            pick = (slice(row, row + 1), slice(t, t + 1))
            one = one.append(k[pick], v[pick], jnp.array([t]), segments[row, t][None])
        np.testing.assert_array_equal(whole.positions[row], one.positions[0])
        used = one.positions[0] >= 0
        np.testing.assert_array_equal(whole.k[row][used], one.k[0][used])
        np.testing.assert_array_equal(whole.v[row][used], one.v[0][used])
        np.testing.assert_array_equal(whole.segments[row][used], one.segments[0][used])


def test_layers_are_cut_out_of_the_stack_once():
    """The loop over tokens reads each layer's weights, not the stack of all layers."""
    graph, params = nnx.split(make(depth=4, ffn=56))

    def run(params, tokens, lengths, key):
        return _generate(Settings(graph, 7, Sampling(0.0), 32, (9,) * 4), params, tokens, lengths, key, None)

    args = params, np.zeros((1, 3), np.int32), np.array([3]), jax.random.key(0)
    (call,) = jax.make_jaxpr(run)(*args).jaxpr.eqns
    loops = [e for e in call.params["jaxpr"].eqns if e.primitive.name == "scan" and e.params["length"] == 6]
    (shapes,) = ([v.aval.shape for v in loop.invars] for loop in loops)
    assert shapes.count((16, 56)) == 2 * 4 and (4, 16, 56) not in shapes
