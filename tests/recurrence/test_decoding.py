"""Prefill and token by token against the forward pass over everything, for models with recurrent layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from blockjax.generate import decode, generate, prefill
from blockjax.generate.cache import cache_size
from blockjax.generate.sampler import Sampling
from tests.models.tiny import random_model, tiny_config

LENGTHS = np.array([1, 5, 9], np.int32)
STEPS = 9
TOTAL = 9 + STEPS
HYBRIDS = {
    "linear": dict(pattern="lightning,ssd:state=6,5", depth=4, residual="block_attn_res:size=3"),
    "delta": dict(pattern="gdn,kda:conv=3", depth=3),
    "loop": dict(pattern="gdn,4", depth=4, loop="2*2"),
    "states": dict(pattern="brt:window=4/states=3/gate=lstm,full", depth=2),
}


@pytest.mark.parametrize("case", HYBRIDS)
@pytest.mark.sample("delta", "states")
def test_a_token_at_a_time_is_the_whole(case):
    model = random_model(tiny_config(attention_block=16, **HYBRIDS[case]))
    tokens = np.random.default_rng(0).integers(0, 24, (3, TOTAL)).astype(np.int32)
    graph, params = nnx.split(model)
    sizes = [cache_size(spec, TOTAL, None) for spec in model.config.layers()]
    prompts = jnp.asarray(np.where(np.arange(9) < LENGTHS[:, None], tokens[:, :9], 9))

    @jax.jit
    def start(params):
        model = nnx.merge(graph, params)
        whole = model(tokens)
        return whole, *prefill(model, list(model.layers()), prompts, jnp.asarray(LENGTHS), sizes)

    @jax.jit
    def step(params, token, positions, memory):
        model = nnx.merge(graph, params)
        return decode(model, list(model.layers()), token, positions, memory)

    expected, logits, memory = start(params)
    expected = np.asarray(expected)
    for i in range(STEPS):
        message = f"token {i}"
        np.testing.assert_allclose(
            logits, expected[np.arange(3), LENGTHS + i - 1], rtol=1e-3, atol=1e-4, err_msg=message
        )
        logits, memory = step(params, tokens[np.arange(3), LENGTHS + i], jnp.asarray(LENGTHS + i), memory)


@pytest.mark.exhaustive
def test_generation_does_not_depend_on_the_batch():
    model = random_model(tiny_config(pattern="lightning,brt:window=2/states=3", attention_block=16))
    prompts = [np.arange(1, 4), np.arange(5, 12)]
    greedy = functools.partial(generate, model, max_new_tokens=5, sampling=Sampling(0.0))
    together = greedy(prompts)
    for prompt, expected in zip(prompts, together, strict=True):
        np.testing.assert_array_equal(greedy([prompt])[0], expected)
