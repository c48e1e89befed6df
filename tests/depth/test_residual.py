"""Residual rules of the decoder against the pre-norm model and against plain loops over sublayers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from blockjax.depth import Residual
from blockjax.errors import UsageError
from blockjax.models import Transformer
from tests.models.tiny import random_params, tiny_config

pytestmark = pytest.mark.usefixtures("dense_attention")

DEPTH, T = 3, 12
SUBLAYERS = 2 * DEPTH


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def config_of(residual, **options):
    # A large epsilon: a norm shows whether it reads a sum or a mean.
    sizes = dict(depth=DEPTH, dtype="float64", norm_eps=1e-2, attention_block=8, pattern="6,full")
    return tiny_config(residual=residual, **sizes | options)


def params_of(config, zero=None):
    """Graph and float64 parameters; the one of `depth` named `zero` is 0."""
    graph, params = random_params(config)
    params = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), params)
    if zero is not None:
        params["depth"][zero] = jnp.zeros_like(params["depth"][zero])
    return graph, params


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 24, (2, T)).astype(np.int32)
    return tokens, rng.normal(size=(2, T, 24))


def logits(graph, params, forward=lambda model, tokens: model(tokens)):
    tokens, _ = batch()
    return np.asarray(jax.jit(lambda params: forward(nnx.merge(graph, params), tokens))(params))


def logits_and_gradients(graph, params, forward=lambda model, tokens: model(tokens)):
    tokens, cotangent = batch()

    @jax.jit
    def run(params):
        def loss(params):
            logits = forward(nnx.merge(graph, params), tokens)
            return jnp.sum(logits * cotangent), logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, found), gradients = run(params)
    return np.asarray(found), jax.tree.map(np.asarray, gradients)


def close(a, b, tolerance=1e-12):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * 100), a, b)


@functools.cache
def prenorm():
    with jax.enable_x64(True):
        return logits_and_gradients(*params_of(config_of("prenorm")))


@pytest.mark.parametrize("size", range(1, SUBLAYERS + 1))
@pytest.mark.sample("1", "5")
def test_zero_queries_give_the_logits_of_the_prenorm_model(size):
    close(logits(*params_of(config_of(f"block_attn_res:size={size}"), zero="query")), prenorm()[0])


@pytest.mark.parametrize("residual", ["attn_res", "block_attn_res:size=4", "block_attn_res:blocks=2,heads=4"])
@pytest.mark.sample("block_attn_res:blocks=2,heads=4")
def test_zero_queries_give_its_gradients_too(residual):
    found, gradients = logits_and_gradients(*params_of(config_of(residual), zero="query"))
    del gradients["depth"]
    close((found, gradients), prenorm())


@pytest.mark.parametrize("residual", ["delta", "delta_block:size=4,heads=2"])
@pytest.mark.sample("delta_block*")
def test_closed_gates_are_the_prenorm_model(residual):
    found, gradients = logits_and_gradients(*params_of(config_of(residual), zero="gate"))
    assert np.any(gradients["depth"]["gate"]), "a gate that gets no gradient never opens"
    del gradients["depth"]
    close((found, gradients), prenorm())


def test_closed_gates_leave_every_bit():
    options = dict(dtype="float32", norm_eps=1e-6)
    found = logits(*params_of(config_of("delta_block:size=2", **options), zero="gate"))
    np.testing.assert_array_equal(found, logits(*params_of(config_of("prenorm", **options))))


@pytest.mark.parametrize("residual", ["attn_res", "delta"])
@pytest.mark.sample("attn_res")
def test_a_model_starts_there(residual):
    """Random queries, as published code has them, would start elsewhere."""
    tokens, _ = batch()

    @jax.jit
    def fresh():
        models = (
            Transformer(config_of(rule, depth=1, pattern="6"), rngs=nnx.Rngs(0))
            for rule in (residual, "prenorm")
        )
        return [model(tokens) for model in models]

    np.testing.assert_allclose(*fresh(), rtol=1e-6, atol=1e-6)
    assert np.abs(logits(*params_of(config_of(residual))) - prenorm()[0]).max() > 1e-2


def softmax_mean(model, sources, query):
    """One query [M] over sources [B, T, M]; the mean and the weights [sources, B, T, heads]."""
    heads, eps = model.config.residual_rule.heads, model.config.norm_eps
    stack = jnp.stack(sources)
    keys = stack / jnp.sqrt(jnp.mean(stack**2, axis=-1, keepdims=True) + eps)
    split = lambda x: x.reshape(*x.shape[:-1], heads, -1)  # noqa: E731
    weights = jax.nn.softmax(jnp.sum(split(keys) * split(query), axis=-1), axis=0)
    return jnp.sum(weights[..., None] * split(stack), axis=0).reshape(sources[0].shape), weights


def attn_res(model, tokens, *, absent_is_zero=False):
    """A bank of completed blocks and the running sum, sublayer by sublayer."""
    size, query = model.config.residual_rule.size, model.depth.query[...]
    bank, partial, read = [model.embed(tokens)], None, []

    def total(reader):
        own = [jnp.zeros_like(bank[0])] if absent_is_zero else []
        sources = [*bank, *(own if partial is None else [partial])]
        h, weights = softmax_mean(model, sources, query[reader])
        read.append(weights)
        return len(sources) * h

    for s, sublayer in enumerate(all_sublayers(model, tokens)):
        if s % size == 0 and s:
            bank, partial = [*bank, partial], None
        out = sublayer(total(s))
        partial = out if partial is None else partial + out
    return model.logits(model.final_norm(total(-1))), read


def delta(model, tokens, *, alternating=False):
    """The stream is kept; sources are how much it changed over each completed block."""
    size, query, gate = model.config.residual_rule.size, model.depth.query[...], model.depth.gate[...]
    stream = model.embed(tokens)
    sources, start, read = [stream], stream, []
    for s, sublayer in enumerate(all_sublayers(model, tokens)):
        if s % size == 0 and s:
            # As published, from what was stored last, which is itself a difference.
            sources.append(stream - (sources[-1] if alternating else start))
            start = stream
        mean, weights = softmax_mean(model, sources, query[s])
        read.append(weights)
        stream = stream + sublayer(stream + gate[s] * mean)
    return model.logits(model.final_norm(stream)), read


def all_sublayers(model, tokens):
    rope = model.rope(jnp.broadcast_to(jnp.arange(T), tokens.shape))
    for block, spec in model.layers():
        for sublayer in block.sublayers(rope, model.attend(spec, None)):
            yield lambda h, sublayer=sublayer: sublayer.run(sublayer.norm(h))[0]


def oracle(residual):
    return attn_res if "attn_res" in residual else delta


@pytest.mark.parametrize("residual", ["attn_res:heads=2", "block_attn_res:size=2", "delta:heads=4"])
@pytest.mark.sample("block_attn_res:size=2")
def test_logits_of_a_loop_over_sublayers(residual):
    model = params_of(config_of(residual))
    close(logits(*model), logits(*model, lambda *args: oracle(residual)(*args)[0]), 1e-11)


@pytest.mark.parametrize("residual", ["block_attn_res:size=4,heads=4", "delta_block:size=4,heads=2"])
@pytest.mark.sample("block_attn_res*")
def test_logits_and_gradients_of_a_loop_over_sublayers(residual):
    model = params_of(config_of(residual))
    expected = logits_and_gradients(*model, lambda *args: oracle(residual)(*args)[0])
    close(logits_and_gradients(*model), expected, 1e-11)


def test_deltas_of_deltas_would_show():
    model = params_of(config_of("delta_block:size=2"))
    mistaken = lambda *args: delta(*args, alternating=True)[0]  # noqa: E731
    assert np.abs(logits(*model) - logits(*model, mistaken)).max() > 1e-3


def test_an_absent_running_sum_takes_no_weight():
    """As a source of zeros it would; the norm behind it hides that from the logits."""
    graph, params = params_of(config_of("block_attn_res:size=3"))
    tokens, _ = batch()

    @jax.jit
    def weights(params):
        model = nnx.merge(graph, params)
        return model.inspect(tokens).depth_weights, attn_res(model, tokens, absent_is_zero=True)[1]

    found, wrong = jax.tree.map(np.asarray, weights(params))
    for s in (0, 3):
        completed = s // 3 + 1
        np.testing.assert_allclose(found[s, :completed].sum(0), 1, rtol=1e-12)
        assert np.all(wrong[s][:completed].sum(0) < 0.99)


@pytest.mark.parametrize("residual", ["block_attn_res:size=4", "delta_block:size=4,heads=2"])
@pytest.mark.sample("delta_block*")
def test_scanned_and_unrolled_layers_agree(residual):
    """Of the second block one layer is left: it has no scan, but is in the program of both."""
    scanned, unrolled = (config_of(residual, pattern="6", stack=stack) for stack in ("scan", "unroll"))
    graph, params = params_of(scanned)
    close(logits_and_gradients(graph, params), logits_and_gradients(params_of(unrolled)[0], params), 1e-11)


@pytest.mark.parametrize("stack", ["scan", "unroll"])
@pytest.mark.sample("scan")
def test_what_a_block_reads_is_not_kept_but_read_again(stack):
    """Beside the sources, remat keeps as much as for the pre-norm model: the running sum of each layer."""
    options = dict(pattern="6", depth=4, stack=stack)

    def kept(residual, remat):
        graph, params = params_of(config_of(residual, remat=remat, **options))
        tokens, _ = batch()
        residuals = jax.eval_shape(lambda p: jax.vjp(lambda p: nnx.merge(graph, p)(tokens), p)[1], params)
        shapes = [leaf.shape for leaf in jax.tree.leaves(residuals)]
        return sum(math.prod(s[:-3]) for s in shapes if s[-3:] == (2, T, 16))

    assert kept("block_attn_res:size=4", "full") <= kept("prenorm", "full") + 3
    graph, params = params_of(config_of("block_attn_res:size=4", **options))
    again, _ = params_of(config_of("block_attn_res:size=4", remat="full", **options))
    close(logits_and_gradients(again, params), logits_and_gradients(graph, params))


@pytest.mark.parametrize(
    "residual", ["block_attn_res:size=3", "block_attn_res:size=4,heads=4", "delta_block:size=4"]
)
@pytest.mark.sample("block_attn_res:size=4,heads=4")
def test_weights_of_every_token(residual):
    config = config_of(residual)
    graph, params = params_of(config)
    tokens, _ = batch()

    @jax.jit
    def weights(params):
        model = nnx.merge(graph, params)
        return model.inspect(tokens).depth_weights, oracle(residual)(model, tokens)[1]

    found, expected = jax.tree.map(np.asarray, weights(params))
    rule = config.residual_rule
    assert found.shape == (rule.readers, rule.blocks + 1, 2, T, rule.heads)
    for reader, (row, weights) in enumerate(zip(found, expected, strict=True)):
        there = ~np.isnan(row[:, 0, 0, 0])
        np.testing.assert_allclose(row[there], weights, rtol=1e-9, err_msg=f"reader {reader}")
        np.testing.assert_allclose(row[there].sum(0), 1, rtol=1e-12)
        assert np.isnan(row[~there]).all()


@pytest.mark.exhaustive
def test_one_source_is_read_exactly_and_its_query_learns_nothing():
    graph, params = params_of(config_of("block_attn_res:size=2"))
    tokens, _ = batch()
    found = jax.jit(lambda params: nnx.merge(graph, params).inspect(tokens).depth_weights)(params)
    np.testing.assert_array_equal(found[0, 0], 1.0)
    _, gradients = logits_and_gradients(graph, params)
    learns = np.any(gradients["depth"]["query"], axis=1)
    np.testing.assert_array_equal(learns, np.arange(SUBLAYERS + 1) > 0)


def test_sizes():
    for text, size, blocks, readers, heads in (
        ("prenorm", 10, 1, 0, 1),
        ("attn_res", 1, 10, 11, 1),
        ("block_attn_res:size=4", 4, 3, 11, 1),
        ("block_attn_res:size=40", 10, 1, 11, 1),
        ("block_attn_res:blocks=3", 4, 3, 11, 1),
        ("delta:heads=2", 1, 10, 10, 2),
        ("delta_block", 2, 5, 10, 1),
        ("block_attn_res:size=8,heads=4", 8, 2, 11, 4),
    ):
        rule = Residual.parse(text, 10)
        assert (rule.size, rule.blocks, rule.readers, rule.heads) == (size, blocks, readers, heads), text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("atn_res", ["'atn_res'", "'attn_res'"]),
        ("block_attn_res:sise=3", ["'sise'", "'size'"]),
        ("block_attn_res:size=-1", ["size=-1"]),
        ("delta_block:blocks=0", ["blocks=0"]),
        ("attn_res:size=2", ["'size'"]),
        ("attn_res:heads=0", ["heads=0"]),
        ("delta_block:size=2,heads=3", ["width=16", "3 heads"]),
        ("prenorm:heads=2", ["'heads'"]),
    ],
)
def test_refused(text, words):
    with pytest.raises(UsageError) as error:
        config_of(text)
    assert all(word in str(error.value) for word in words), error.value
