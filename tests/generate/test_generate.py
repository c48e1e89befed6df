"""`generate` against greedy decoding without a cache; samplers against their distributions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from blockjax.errors import UsageError
from blockjax.generate import Sampling, generate, sample
from blockjax.generate.sampler import _generate
from blockjax.models import Transformer, logical_axes
from blockjax.parallel import make_mesh, shardings
from tests.models.tiny import random_model, tiny_config

GREEDY = Sampling(temperature=0.0)
PROMPTS = [np.array([3]), np.array([7, 1, 4, 4, 0]), np.arange(17) % 11]
COUNT = 14


def make(seed=0) -> Transformer:
    return random_model(tiny_config(vocab_size=32, ffn=24, pattern="6,full", attention_block=16), seed)


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def greedy(model):
    return generate(model, PROMPTS, COUNT, sampling=GREEDY)


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, params, tokens):
    return nnx.merge(graph, params)(tokens)


def uncached(model, prompts, count, vocab_size=None):
    """Greedy decoding by whole forward passes."""
    tokens = np.zeros((len(prompts), max(map(len, prompts)) + count), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    graph, params = nnx.split(model)
    ends = np.array([len(p) for p in prompts])
    for i in range(count):
        logits = np.asarray(forward(graph, params, tokens))[..., :vocab_size]
        tokens[np.arange(len(prompts)), ends + i] = logits[np.arange(len(prompts)), ends + i - 1].argmax(-1)
    return [row[end : end + count] for row, end in zip(tokens, ends, strict=True)]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_greedy_generation_is_that_of_whole_forward_passes(model, greedy):
    assert_same(greedy, uncached(model, PROMPTS, COUNT))
    assert len({tuple(row) for row in greedy}) == 3


def test_a_prompt_does_not_depend_on_its_neighbours(model, greedy):
    others = [PROMPTS[1], np.arange(17)[::-1], PROMPTS[0]]
    continued = generate(model, others, COUNT, sampling=GREEDY)
    assert_same([continued[0], continued[2]], [greedy[1], greedy[0]])


def test_one_new_token(model, greedy):
    assert_same(generate(model, PROMPTS, 1, sampling=GREEDY), [row[:1] for row in greedy])


def test_stop_ends_a_sequence_and_is_not_part_of_it(model, greedy):
    stop = int(greedy[0][5])
    stopped = generate(model, PROMPTS, COUNT, sampling=GREEDY, stop=stop)
    for row, whole in zip(stopped, greedy, strict=True):
        assert stop not in row
        np.testing.assert_array_equal(row, whole[: len(row)])
        assert len(row) == COUNT or whole[len(row)] == stop
    assert len(stopped[0]) <= 5


def test_ids_beyond_vocab_size_are_not_drawn(model, greedy):
    limit = int(max(row.max() for row in greedy))
    limited = generate(model, PROMPTS, COUNT, sampling=GREEDY, vocab_size=limit)
    assert_same(limited, uncached(model, PROMPTS, COUNT, vocab_size=limit))
    assert max(row.max() for row in limited) < limit


def test_a_seed_decides_the_text(model):
    texts = [generate(model, PROMPTS, COUNT, sampling=Sampling(2.0), seed=seed) for seed in (0, 0, 1)]
    assert_same(texts[0], texts[1])
    assert all((a != b).any() for a, b in zip(texts[0], texts[2], strict=True))
    # Rows draw on their own.
    rows = generate(model, [PROMPTS[2]] * 3, COUNT, sampling=Sampling(2.0))
    assert len({tuple(row) for row in rows}) == 3


def test_calls_of_the_same_shapes_compile_once(model):
    generate(model, PROMPTS, COUNT, sampling=Sampling(2.0))
    compiled = _generate._cache_size()
    assert compiled > 0
    for seed, other in enumerate((model, make(seed=1))):
        generate(other, [p[::-1] for p in PROMPTS], COUNT, sampling=Sampling(2.0), seed=seed, stop=2)
    assert _generate._cache_size() == compiled


def test_a_dial_moves_without_a_new_compilation():
    dialled = random_model(tiny_config(vocab_size=32, locality="beta:1,smallest=4", context=64))
    table, texts, compiled = dialled.config.local_rule.table(2), {}, []
    for dial in (0.0, 0.5, 1.0):
        texts[dial] = generate(dialled, PROMPTS, COUNT, sampling=GREEDY, locality=dial * table)
        compiled.append(_generate._cache_size())
        fixed = tiny_config(vocab_size=32, locality=f"beta:1,smallest=4,high={dial}", context=64)
        assert_same(texts[dial], uncached(random_model(fixed), PROMPTS, COUNT))
    assert len(set(compiled)) == 1
    assert any((a != b).any() for a, b in zip(texts[0.0], texts[1.0], strict=True))

    # Caches that hold a window of 16 are enough from a locality of 0.5 on.
    few = generate(dialled, PROMPTS, COUNT, sampling=GREEDY, locality=0.5, least_locality=0.5)
    assert_same(few, generate(dialled, PROMPTS, COUNT, sampling=GREEDY, locality=0.5))
    with pytest.raises(UsageError, match=r"locality 0.25 is below least_locality=0.5"):
        generate(dialled, PROMPTS, COUNT, locality=0.25, least_locality=0.5)


@pytest.mark.exhaustive
def test_three_prompts_on_eight_devices(model, greedy):
    """Neither 3 sequences nor the one token of a step divide over the devices."""
    mesh = make_mesh(dict(fsdp=2, seq=2, tensor=2))
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    params = jax.device_put(params, shardings(mesh, params, logical_axes(model)))
    with jax.set_mesh(mesh):
        assert_same(generate(nnx.merge(graph, params), PROMPTS, COUNT, sampling=GREEDY), greedy)


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([], {}, ["prompts"]),
        ([np.array([], int)], {}, ["at least one token"]),
        (PROMPTS, dict(max_new_tokens=0), ["max_new_tokens=0"]),
        ([np.array([3, 32])], {}, ["3 to 32", "0..31"]),
        ([np.array([-1, 5])], {}, ["-1 to 5"]),
        (PROMPTS, dict(vocab_size=33), ["vocab_size=33", "1..32"]),
        (PROMPTS, dict(vocab_size=0), ["vocab_size=0"]),
    ],
)
def test_bad_requests_are_refused(model, prompts, options, words):
    with pytest.raises(UsageError) as error:
        generate(model, prompts, **(dict(max_new_tokens=4) | options))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=-0.1),
        dict(temperature=float("nan")),
        dict(temperature=float("inf")),
        dict(top_k=-1),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(top_p=float("nan")),
    ],
)
def test_bad_sampling_is_refused_with_the_number(options):
    ((name, value),) = options.items()
    with pytest.raises(UsageError, match=f"{name}={value}"):
        Sampling(**options)


P = np.array([0.05, 0.4, 0.1, 0.25, 0.2])  # by size: 1, 3, 4, 2, 0
DRAWS = 20_000


def frequencies(sampling, shift=0.0):
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(P, jnp.float32)) + shift, (DRAWS, len(P)))
    tokens = sample(logits, jax.random.key(0), sampling)
    assert tokens.shape == (DRAWS,) and tokens.dtype == jnp.int32
    return np.bincount(tokens, minlength=len(P)) / DRAWS


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (dict(), [0, 1, 2, 3, 4]),
        (dict(top_k=1), [1]),
        (dict(top_k=3), [1, 3, 4]),
        (dict(top_k=5), [0, 1, 2, 3, 4]),
        (dict(top_k=9), [0, 1, 2, 3, 4]),
        (dict(top_p=1e-6), [1]),
        (dict(top_p=0.39), [1]),
        (dict(top_p=0.41), [1, 3]),
        (dict(top_p=0.64), [1, 3]),
        (dict(top_p=0.9), [1, 3, 4, 2]),
        (dict(top_p=0.96), [0, 1, 2, 3, 4]),
        (dict(top_k=2, top_p=0.6), [1]),  # 0.4 of the 0.65 that top_k leaves
        (dict(top_k=2, top_p=0.63), [1, 3]),
        (dict(temperature=0.5), [0, 1, 2, 3, 4]),
        (dict(temperature=2.0, top_k=3), [1, 3, 4]),
        (dict(temperature=0.5, top_p=0.5), [1]),  # of p^2, 0.16 in 0.275
        (dict(temperature=1e-30), [1]),
    ],
)
def test_frequencies_are_those_of_the_kept_tokens(options, kept):
    sampling = Sampling(**options)
    with np.errstate(under="ignore"):
        expected = np.where(np.isin(np.arange(5), kept), P / P.max(), 0.0) ** (1 / sampling.temperature)
    expected /= expected.sum()
    for shift in (0.0, 50.0):
        ours = frequencies(sampling, shift)
        assert set(np.flatnonzero(ours)) == set(np.flatnonzero(expected)) == set(kept)
        np.testing.assert_allclose(ours, expected, atol=5 * np.sqrt(0.25 / DRAWS))


def test_temperature_zero_takes_the_most_likely():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(50, 9)), jnp.float32)
    tokens = sample(logits, jax.random.key(0), GREEDY)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
