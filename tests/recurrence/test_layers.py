"""Recurrent layers in the decoder: documents, states, decoding, and what a pattern says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from blockjax.errors import UsageError
from blockjax.models import Transformer, logical_axes
from blockjax.parallel.mesh import RULES
from blockjax.recurrence import MIXERS, Past, forget
from tests.models.tiny import random_model, tiny_config

T, VOCAB = 40, 24
PATTERNS = {
    "lightning": "lightning",
    "ssd": "ssd:state=6/conv=3",
    "gdn": "gdn:expand=2/negative=true",
    "kda": "kda:conv=3",
    "brt": "brt:window=8/states=3",
}
LINEAR = [pattern for kind, pattern in PATTERNS.items() if kind != "brt"]  # any cut, any alignment
HYBRID = "lightning:decay=fla/scale=0.3,gdn,ssd:state=6,8"


def make(pattern, **options) -> Transformer:
    return random_model(tiny_config(**dict(pattern=pattern, attention_block=16) | options))


def packed(seed=0):
    """Tokens, positions and segments [2, T]: two documents and padding; one document."""
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (2, T))
    segments = np.stack([np.repeat([0, 1, -1], [13, 20, T - 33]), np.full(T, 7)])
    positions = np.stack([np.concatenate([np.arange(n) for n in (13, 20, T - 33)]), np.arange(T)])
    return tuple(jnp.asarray(a, jnp.int32) for a in (tokens, positions, segments))


def logits(model, tokens, positions=None, segments=None):
    graph, params = nnx.split(model)
    return np.asarray(_logits(graph, params, tokens, positions, segments))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph, params, tokens, positions, segments):
    return nnx.merge(graph, params)(tokens, positions=positions, segment_ids=segments)


@pytest.mark.parametrize("pattern", [*LINEAR, HYBRID])
def test_documents_padding_and_the_future_are_not_seen(pattern):
    model = make(pattern, depth=4 if "," in pattern else 2)
    tokens, positions, segments = packed()
    before = logits(model, tokens, positions, segments)
    for segment in (0, 1, -1):
        theirs = segments == segment
        after = logits(model, jnp.where(theirs, (tokens + 1) % VOCAB, tokens), positions, segments)
        np.testing.assert_array_equal(before[~theirs], after[~theirs])
        if segment >= 0:
            assert (before[theirs] != after[theirs]).any(axis=-1).all()
    alone = logits(model, tokens[:1, 13:33])[0]
    np.testing.assert_allclose(before[0, 13:33], alone, atol=1e-4, rtol=1e-4)
    for t in (1, 15, T - 1):
        after = logits(model, tokens.at[:, t:].set((tokens[:, t:] + 5) % VOCAB), positions, segments)
        np.testing.assert_allclose(before[:, :t], after[:, :t], atol=1e-5)
        assert (before[1, t:] != after[1, t:]).any(axis=-1).all()


def test_gradients_of_a_document_do_not_reach_another():
    """Through values and gates of every kind; and they are those of the document alone."""
    model = make(HYBRID, depth=4)
    graph, params = nnx.split(model)
    tokens, positions, segments = packed()

    def loss(x, weights, positions, segments):
        model = nnx.merge(graph, params)
        model.embed = lambda tokens: x
        hidden = model.hidden(jnp.zeros(x.shape[:2], jnp.int32), positions=positions, segment_ids=segments)
        return jnp.sum(weights * hidden)

    x = model.embed(tokens)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)
    second = jnp.where((segments == 1)[..., None], weights, 0.0)
    gradient = jax.jit(jax.grad(loss))
    found = np.asarray(gradient(x, second, positions, segments))
    assert not found[np.asarray(segments != 1)].any()
    alone = gradient(x[:1, 13:33], weights[:1, 13:33], positions[:1, 13:33], segments[:1, 13:33])
    np.testing.assert_allclose(found[0, 13:33], alone[0], rtol=1e-3, atol=1e-4)
    assert np.abs(alone).max() > 0.1


@pytest.mark.parametrize("cut", [1, 2, 24])
@pytest.mark.parametrize("pattern", [*LINEAR, "gdn,lightning,gdn"])
@pytest.mark.sample(*(f"{kind}-24" for kind in LINEAR), "gdn,lightning,gdn-1")
def test_pieces_with_the_memory_passed_on_are_the_whole(pattern, cut):
    """Also through a tail, and where a document starts in the second piece."""
    model = make(pattern, depth=4 if "," in pattern else 2)
    tokens, _, segments = packed()
    graph, params = nnx.split(model)

    @jax.jit
    def advance(params, tokens, memory, segments):
        return nnx.merge(graph, params).advance(tokens, memory, segment_ids=segments)

    whole = jax.jit(lambda p: nnx.merge(graph, p).hidden(tokens, segment_ids=segments))(params)
    memory, parts = model.memory(2), []
    for piece in (slice(cut), slice(cut, T)):
        hidden, memory = advance(params, tokens[:, piece], memory, segments[:, piece])
        parts.append(hidden)
    real = np.asarray(segments >= 0)
    np.testing.assert_allclose(np.concatenate(parts, 1)[real], whole[real], atol=1e-4, rtol=1e-4)
    # Set back, the rows start anew.
    one, _ = advance(params, tokens[:, :cut], forget(memory, jnp.array([True, False])), segments[:, :cut])
    np.testing.assert_allclose(one[0], parts[0][0], atol=1e-4, rtol=1e-4)
    assert np.abs(one[1] - parts[0][1]).max() > 1e-3


@pytest.mark.parametrize("residual", ["prenorm", "block_attn_res:size=6"])
@pytest.mark.parametrize("stack", ["scan", "unroll", "bucket"])
@pytest.mark.sample("scan-block*", "unroll-prenorm", "bucket-prenorm")
def test_the_memory_is_the_same_however_layers_are_stacked(stack, residual):
    options = dict(depth=7, residual=residual, stack=stack)
    model, plain = (make("lightning,8,gdn", **options | more) for more in ({}, dict(stack="scan")))
    tokens = packed()[0]
    after = []
    for each in (model, plain):
        graph, params = nnx.split(each)
        after.append(jax.jit(lambda p: nnx.merge(graph, p).advance(tokens, each.memory(2)))(params))  # noqa: B023
    assert jax.tree.structure(after[0][1]) == jax.tree.structure(model.memory(2))
    for a, b, empty in zip(*map(jax.tree.leaves, (*after, (after[0][0], model.memory(2)))), strict=True):
        assert a.shape == empty.shape and a.dtype == empty.dtype
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.sample("gdn", "kda", "lightning", "ssd")
def test_a_layer_learns_through_all_its_parameters(kind):
    model = make(PATTERNS[kind])
    graph, params = nnx.split(model)
    tokens, _, segments = packed()

    @jax.jit
    def gradient(params):
        loss = lambda p: jnp.sum(nnx.merge(graph, p)(tokens, segment_ids=segments)[:, :33] ** 2)  # noqa: E731
        return jax.grad(loss)(params)

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-6, path


def test_a_layer_with_an_undecayed_head_sums_over_the_document():
    """Head 0 of fla's slopes never decays: with q = k = 1 its output is the running sum of values."""
    mixer = MIXERS["lightning"](decay="fla", scale=0.5)
    config = tiny_config(heads=2, head_dim=8)
    slopes = [-np.asarray(mixer.log_decay(config, layer)) for layer in (0, 1)]
    np.testing.assert_allclose(slopes, [[0, 4], [0, 2]])
    tnl = MIXERS["lightning"]().log_decay(tiny_config(heads=6, head_dim=8), 0)
    expected = 2.0 ** np.array([-2, -4, -6, -8, -1, -3])
    np.testing.assert_allclose(-np.asarray(tnl), expected * (1 + 1e-5), rtol=1e-6)


def test_a_model_of_many_layers_has_one_compiled_period():
    def loops(depth):
        config = tiny_config(depth=depth, pattern=HYBRID)
        graph, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
        run = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))
        lowered = run.lower(params, jax.ShapeDtypeStruct((1, T), jnp.int32))
        return lowered.as_text().count("stablehlo.while")

    assert loops(4) == loops(12)


@pytest.mark.parametrize("kind", MIXERS)
def test_parameters_are_counted_and_named(kind):
    config = tiny_config(pattern=f"{PATTERNS[kind]},full", depth=3, heads=2, kv_heads=1)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert config.num_params() == sum(leaf.size for leaf in jax.tree.leaves(params))
    known = dict(RULES)

    def check(leaf, names):
        assert len(names) == leaf.ndim and set(names) <= known.keys()

    jax.tree.map(check, params, logical_axes(model))


def test_work_of_a_token_by_hand():
    config = tiny_config()  # 4 heads of 8
    assert MIXERS["lightning"]().work(config).useful == 4 * (2 * 8 * 8 + 2 * 8 * 8)
    assert MIXERS["gdn"](expand=2).work(config).useful == 4 * 3 * (2 * 8 * 16)
    assert MIXERS["ssd"](state=6).work(config).useful == 4 * 2 * (2 * 6 * 8)
    for kind in MIXERS.keys() - {"brt"}:  # its attentions are full tiles
        work = MIXERS[kind]().work(config)
        assert work.executed > work.useful


def test_visible_pairs_are_of_attentions_only():
    tokens, positions, segments = packed()
    pairs = [
        float(make(pattern, depth=4).visible_pairs(tokens, positions, segments))
        for pattern in (HYBRID, "8", "gdn")
    ]
    assert pairs[0] == pairs[1] / 4 > 0 == pairs[2]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("lightnin", ["'lightnin'", "'lightning'"]),
        ("gdn:expan=2", ["'expan'", "'expand'", "gdn"]),
        ("gdn:conv=x", ["conv=x", "int"]),
        ("lightning:decay=none", ["decay='none'", "'tnl'", "'fla'"]),
        ("lightning:scale=0", ["scale=0.0"]),
        ("ssd:expand=3", ["expand=3", "head_dim=32", "width=16"]),
        ("kda:conv=1", ["conv=1", "kda", "at least 2"]),
        ("512:expand=2", ["'512:expand=2'"]),
        ("full:expand=2", ["full"]),
    ],
)
def test_patterns_that_say_nothing_are_refused(pattern, words):
    with pytest.raises(UsageError) as error:
        tiny_config(pattern=pattern, head_dim=32 if "ssd" in pattern else 8)
    assert all(word in str(error.value) for word in words), error.value


def test_a_pattern_reads_as_it_prints():
    config = tiny_config(pattern="lightning:decay=fla/scale=0.5*2, gdn ,64", depth=4)
    assert [str(spec) for spec in config.layers()] == [
        *["lightning:decay=fla/scale=0.5"] * 2,
        "gdn",
        "window 64",
    ]
    assert [spec.layer for spec in config.layers()] == [0, 1, None, None]


def test_locality_moves_attentions_only():
    config = tiny_config(pattern="gdn,full", locality="constant:1,smallest=4", context=T)
    assert [spec.window for spec in config.layers()] == [None, 4]
    model = random_model(dataclasses.replace(config, depth=4))
    tokens, positions, _ = packed()
    assert model.visible_pairs(tokens, positions) == 2 * make("4", depth=1).visible_pairs(tokens, positions)
    other = make("gdn,4", depth=4)
    np.testing.assert_allclose(logits(model, tokens), logits(other, tokens), atol=1e-4, rtol=1e-4)


def test_a_memory_ends_with_the_last_token_that_is_not_padding():
    past = Past(ids=jnp.array([[0, 0, -1], [0, 1, 1], [-1, -1, -1]]))
    np.testing.assert_array_equal(past.end(3), [2, 3, 0])
