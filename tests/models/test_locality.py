"""Layers of different locality: against dense ones, against each other, and what must not leak."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from blockjax.errors import UsageError
from blockjax.models import Transformer
from blockjax.models.layer_spec import unstack
from tests.models.tiny import random_model, tiny_config

T, VOCAB = 40, 24


MODES = {
    "window": "beta:1,smallest=4",
    "fixed": "beta:1,mode=segment,smallest=4",
    "delimiter": "beta:1,mode=segment,smallest=4,boundary=delimiter,delimiters=3/5",
    "adaptive": "beta:1,mode=segment,smallest=4,boundary=adaptive",
    "bias": "beta:1,mode=bias,smallest=4",
}


def make(locality="", **options) -> Transformer:
    return random_model(tiny_config(depth=4, context=T, attention_block=16, locality=locality, **options))


def packed(seed=0):
    """Tokens, positions and segments [2, T]: two documents and padding; one document."""
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (2, T))
    segments = np.stack([np.repeat([0, 1, -1], [13, 20, T - 33]), np.full(T, 7)])
    positions = np.stack([np.concatenate([np.arange(n) for n in (13, 20, T - 33)]), np.arange(T)])
    return tuple(jnp.asarray(a, jnp.int32) for a in (tokens, positions, segments))


def logits(model, tokens, positions, segments, locality=None):
    graph, params = nnx.split(model)

    @jax.jit
    def run(params):
        model = nnx.merge(graph, params)
        return model.logits(
            model.hidden(tokens, positions=positions, segment_ids=segments, locality=locality)
        )

    return np.asarray(run(params))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.sample("adaptive", "bias")
def test_locality_zero_is_dense_bit_for_bit(mode):
    zero = logits(make(MODES[mode] + ",high=0.0"), *packed())
    np.testing.assert_array_equal(zero, logits(make(), *packed()))
    assert np.abs(zero - logits(make(MODES[mode]), *packed()))[:, 30:].max() > 1e-2


def test_a_window_as_long_as_the_row_is_dense():
    wide = logits(make(f"constant:1,smallest={T}"), *packed())
    np.testing.assert_array_equal(wide, logits(make(), *packed()))


def test_segments_and_windows_of_one_token():
    """Nothing but itself is visible either way."""
    options = "constant:1,smallest=1"
    one = logits(make(options), *packed())
    np.testing.assert_array_equal(one, logits(make(f"{options},mode=segment"), *packed()))
    tokens, *where = packed()
    other = logits(make(options), tokens.at[:, ::2].add(1) % VOCAB, *where)
    np.testing.assert_array_equal(one[:, 1::2], other[:, 1::2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.sample("window", "delimiter")
def test_no_token_reaches_an_earlier_output(mode):
    model = make(MODES[mode], residual="block_attn_res:size=4")
    graph, params = nnx.split(model)

    @jax.jit
    def run(params, tokens):
        model = nnx.merge(graph, params)
        return model(tokens), model.segments(tokens, jnp.broadcast_to(jnp.arange(T), tokens.shape))

    tokens = packed()[0]
    before = run(params, tokens)
    for t in (0, 7, 17, 18, 38):
        after = run(params, tokens.at[:, t].add(5) % VOCAB)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(a[:, :t], b[:, :t], err_msg=f"token {t}")
    assert np.any(before[0] != after[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.sample("window")
def test_scanned_unrolled_and_bucketed_layers_agree(mode):
    """A table with a run of equal layers, which share a bucket."""
    table = MODES[mode].replace("beta:1", "table:0.3/0.3/1/0")
    scan, unroll, bucket = (logits(make(table, stack=s), *packed()) for s in ("scan", "unroll", "bucket"))
    np.testing.assert_allclose(unroll, scan, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(bucket, scan, rtol=1e-4, atol=1e-4)


@pytest.mark.exhaustive
def test_gradients_of_scanned_and_bucketed_layers_agree():
    gradients = []
    for stack in ("scan", "bucket"):
        graph, params = nnx.split(make("table:0.3/0.3/1/0,smallest=4", stack=stack))
        loss = lambda params: jnp.sum(nnx.merge(graph, params)(packed()[0]) ** 2)  # noqa: B023, E731
        gradients.append(jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3), *gradients)


def test_one_compiled_layer_serves_all_windows():
    """The program has one attention, whatever the number of layers; a period of the pattern has several."""

    def loops(depth):
        config = tiny_config(depth=depth, locality="beta:5,smallest=4", context=T)
        graph, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
        tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
        run = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))
        return run.lower(params, tokens).as_text().count("stablehlo.while")

    assert loops(4) == loops(16)


def test_the_dial_moves_without_a_new_compilation():
    model = make(MODES["window"])
    graph, params = nnx.split(model)
    traces = []

    @jax.jit
    def run(params, locality):
        traces.append(1)
        model = nnx.merge(graph, params)
        tokens, positions, segments = packed()
        hidden = model.hidden(tokens, positions=positions, segment_ids=segments, locality=locality)
        return model.logits(hidden)

    table = model.config.local_rule.table(4)
    for dial in (0.0, 0.5, 1.0):
        fixed = make(MODES["window"].replace("smallest", f"high={dial},smallest"))
        np.testing.assert_allclose(run(params, dial * table), logits(fixed, *packed()), atol=1e-5)
    assert len(traces) == 1
    everywhere = run(params, np.full(4, 0.5, np.float32))
    np.testing.assert_array_equal(logits(model, *packed(), locality=0.5), everywhere)


def test_the_strength_of_a_bias_has_a_gradient():
    graph, params = nnx.split(make(MODES["bias"]))
    tokens = packed()[0]
    slope = jax.jit(jax.grad(lambda x: jnp.sum(nnx.merge(graph, params).hidden(tokens, locality=x) ** 2)))
    gradient = slope(np.float32([0.1, 0.2, 0.3, 0.4]))
    assert np.all(np.isfinite(gradient)) and np.all(gradient != 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.sample("adaptive", "delimiter")
def test_visible_pairs_by_brute_force(mode):
    model = make(MODES[mode])
    tokens, positions, documents = packed()
    segments = model.segments(tokens, positions)
    i, j = np.indices((T, T))
    pairs = 0
    for spec in model.config.layers():
        ids = documents if spec.group is None else np.asarray(documents) * 1000 + segments // spec.group
        ids = np.where(np.asarray(documents) < 0, -1 - np.arange(T), ids)
        seen = (ids[:, :, None] == ids[:, None, :]) & (j <= i)
        pairs += (seen & (i - j < (spec.window or T))).sum()
        made = spec.ids(documents, segments)
        same = (made[:, :, None] == made[:, None, :]) & (made[:, :, None] >= 0)
        np.testing.assert_array_equal((same & (j <= i))[1], seen[1])
    padding = 7 * 8 // 2 * 4 if mode == "bias" else None
    counted = float(model.visible_pairs(tokens, positions, documents))
    # Padding is counted as its positions say; what it sees has no weight in any loss.
    assert counted >= pairs and (padding is None or counted - pairs == padding - 7 * 4)


def test_rows_of_the_table():
    table = tiny_config(depth=3, locality="beta:1,smallest=4", context=64).table()
    assert [str(unstack(table, i)) for i in range(3)] == ["full causal", "window 16", "window 4"]
    words = {
        "constant:1,mode=segment": "own segment",
        "constant:0.5,mode=segment,smallest=4": "own 4 segments",
        "constant:0,mode=segment": "full causal",
        "constant:1,mode=bias": "bias 0.0625 a token",
    }
    for text, expected in words.items():
        assert str(tiny_config(locality=text, context=64).layers()[0]) == expected


def test_refused():
    for options, words in (
        (dict(locality="beta:5", pattern="8,full"), ["pattern='8,full'", "locality='beta:5'"]),
        (dict(stack="rolled"), ["stack='rolled'", "'bucket'"]),
        (dict(locality="table:0/1"), ["2 values for 4 layers"]),
    ):
        with pytest.raises(UsageError) as error:
            make(**options)
        assert all(word in str(error.value) for word in words), error.value
    with pytest.raises(UsageError, match="has no locality to move"):
        logits(make(), *packed(), locality=0.5)
    with pytest.raises(UsageError, match=r"shape \(3,\) must be one number or \[4\]"):
        logits(make(MODES["window"]), *packed(), locality=np.ones(3))
    with pytest.raises(UsageError, match="stack='bucket'"):
        graph, params = nnx.split(make(MODES["window"], stack="bucket"))
        jax.eval_shape(lambda x: nnx.merge(graph, params).hidden(packed()[0], locality=x), jnp.float32(1))
