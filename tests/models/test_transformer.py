"""The decoder against plain formulas, and what must not depend on what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from blockjax.errors import UsageError
from blockjax.models import PRESETS, LayerSpec, Transformer, logical_axes, preset
from blockjax.models.transformer import REMAT, apply_rope, rope_table
from tests.models.tiny import random_model, tiny_config

VOCAB = tiny_config().vocab_size
T = 40  # the last block is ragged


# Options of the config, and the window of each layer.
CASES = {
    "full": (dict(depth=3, kv_heads=1), [None] * 3),
    "windowed": (dict(pattern="8*3,full", depth=8, tied=True), [8, 8, 8, None] * 2),
    "tail": (dict(pattern="8,full", depth=5, soft_cap=2.0), [8, None, 8, None, 8]),
    "part_of_a_period": (dict(pattern="5,full", depth=1, qk_norm=False, kv_heads=4), [5]),
}


def make(**options) -> Transformer:
    return random_model(tiny_config(**options))


def packed(seed=0):
    """Tokens, positions and segments [2, T]: two documents and padding; one document."""
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (2, T))
    segments = np.stack([np.repeat([0, 1, -1], [13, 20, T - 33]), np.full(T, 7)])
    positions = np.stack([np.concatenate([np.arange(n) for n in (13, 20, T - 33)]), np.arange(T)])
    return tuple(jnp.asarray(a, jnp.int32) for a in (tokens, positions, segments))


def run(model, tokens, positions=None, segments=None):
    graph, params = nnx.split(model)
    return np.asarray(_run(graph, params, tokens, positions, segments))


@functools.partial(jax.jit, static_argnums=0)
def _run(graph, params, tokens, positions, segments):
    return nnx.merge(graph, params)(tokens, positions=positions, segment_ids=segments)


def norm(x, gain):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * gain


def rotate(x, positions):
    """Pairs of features as complex numbers, turned by position * base^(-2i / H)."""
    half = x.shape[-1] // 2
    z = jax.lax.complex(x[..., :half], x[..., half:])
    angle = positions[:, :, None, None] * 10_000.0 ** (-np.arange(half) / half)
    z = z * jnp.exp(1j * angle)
    return jnp.concatenate([z.real, z.imag], -1)


def reference(params, config, windows, tokens, positions, segments):
    """The decoder with dense attention, a layer at a time."""
    stacked, period = params["periods"], len(params["periods"])
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    same = (segments[:, :, None] == segments[:, None]) & (segments[:, :, None] >= 0)
    x = params["embedding"][tokens] * config.width**0.5
    for layer, window in enumerate(windows):
        repeat, slot = divmod(layer, period)
        if repeat < len(windows) // period:
            p = jax.tree.map(lambda a: a[repeat], stacked[f"slot_{slot}"])  # noqa: B023
        else:
            p = params["tail"][f"slot_{slot}"]
        a, h = p["attention"], norm(x, p["attention_norm"]["gain"])
        q, k, v = (jnp.tensordot(h, a[name], 1) for name in "qkv")
        if config.qk_norm:
            q, k = norm(q, a["q_norm"]["gain"]), norm(k, a["k_norm"]["gain"])
        q, k = rotate(q, positions), rotate(k, positions)
        visible = same & (j <= i) & (i - j < (window or T))
        k, v = (jnp.repeat(y, config.heads // config.kv_heads, axis=2) for y in (k, v))
        z = jnp.einsum("binh,bjnh->nbij", q, k) / config.head_dim**0.5
        if config.soft_cap:
            z = config.soft_cap * jnp.tanh(z / config.soft_cap)
        seen = jax.nn.softmax(jnp.where(visible, z, -1e30), -1) * visible
        x = x + jnp.einsum("nbij,bjnh,nhm->bim", seen, v, a["o"])
        m, h = p["mlp"], norm(x, p["mlp_norm"]["gain"])
        gate = h @ m["gate"]
        x = x + (gate / (1 + jnp.exp(-gate)) * (h @ m["up"])) @ m["down"]
    x = norm(x, params["final_norm"]["gain"])
    return x @ (params["embedding"].T if config.tied else params["head"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.sample("tail")
def test_logits_and_gradients_are_those_of_the_formulas(case):
    options, windows = CASES[case]
    model, inputs = make(**options), packed()
    assert [spec.window for spec in model.config.layers()] == windows
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(2, T, 24)), jnp.float32)

    def ours(params):
        tokens, positions, segments = inputs
        logits = nnx.merge(graph, params)(tokens, positions=positions, segment_ids=segments)
        return jnp.sum(weights * logits), logits

    def plain(params):
        logits = reference(params, model.config, windows, *inputs)
        return jnp.sum(weights * logits), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    (_, expected), expected_grads = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    for (path, g), e in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        scale = np.abs(e).max()
        assert scale > 1e-3, path
        np.testing.assert_allclose(g, e, rtol=1e-3, atol=1e-4 * scale, err_msg=str(path))


def test_rope_depends_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 32)), jnp.float32) for _ in "qk")

    def score(pq, pk):
        turned = (apply_rope(x, rope_table(jnp.array([[p]]), 32, 10_000.0)) for x, p in ((q, pq), (k, pk)))
        return float(jnp.vdot(*turned))

    for distance in (0, 1, 17):
        scores = [score(p + distance, p) for p in (0, 5, 900)]
        np.testing.assert_allclose(scores, scores[0], atol=1e-3)
    assert abs(score(1, 0) - score(2, 0)) > 0.1
    np.testing.assert_allclose(score(3, 3), jnp.vdot(q, k), rtol=1e-5)


@pytest.fixture(scope="module")
def mixed():
    """Windowed layers, full layers and a tail."""
    return make(pattern="8,full", depth=5)


def test_logits_do_not_depend_on_where_positions_start(mixed):
    tokens, positions, segments = packed()
    shifted = run(mixed, tokens, positions + 100, segments)
    np.testing.assert_allclose(run(mixed, tokens, positions, segments), shifted, atol=1e-3)


def test_default_positions_and_segments_are_one_document(mixed):
    tokens = packed()[0]
    zeros = jnp.zeros_like(tokens)
    explicit = run(mixed, tokens, jnp.broadcast_to(jnp.arange(T), tokens.shape), zeros)
    np.testing.assert_allclose(run(mixed, tokens), explicit, atol=1e-6)


def test_documents_of_a_row_do_not_see_each_other(mixed):
    tokens, positions, segments = packed()
    before = run(mixed, tokens, positions, segments)
    for segment in (0, 1, -1):
        theirs = segments == segment
        after = run(mixed, jnp.where(theirs, (tokens + 1) % 24, tokens), positions, segments)
        np.testing.assert_array_equal(before[~theirs], after[~theirs])
        assert (before[theirs] != after[theirs]).any(axis=-1).all()


def test_a_packed_document_reads_as_it_does_alone(mixed):
    tokens, positions, segments = packed()
    row = run(mixed, tokens, positions, segments)[0, 13:33]
    alone = run(mixed, tokens[:1, 13:33])[0]
    np.testing.assert_allclose(row, alone, atol=1e-4)


def test_the_future_is_not_seen(mixed):
    tokens = packed()[0]
    before = run(mixed, tokens)
    for t in (1, 15, 16, 31, T - 1):
        after = run(mixed, tokens.at[:, t:].set((tokens[:, t:] + 5) % 24))
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert (before[:, t:] != after[:, t:]).any(axis=-1).all()


@pytest.mark.parametrize("window", [1, 8, 17])
def test_a_window_reaches_that_many_tokens(window):
    model, tokens, t = make(depth=1, pattern=str(window)), packed()[0], 11
    changed = run(model, tokens) != run(model, tokens.at[:, t].set((tokens[:, t] + 1) % 24))
    reached = np.flatnonzero(changed[0].any(-1))
    np.testing.assert_array_equal(reached, np.arange(t, t + window))


def test_padding_has_finite_logits_and_gives_no_gradient():
    model = make(depth=1)
    graph, params = nnx.split(model)
    tokens, positions, segments = packed()
    segments = segments.at[1].set(-1)  # a row of padding only

    @jax.jit
    def grad(params, tokens):
        def loss(params):
            logits = nnx.merge(graph, params)(tokens, positions=positions, segment_ids=segments)
            return jnp.sum(jnp.where(segments[..., None] >= 0, logits, 0.0) ** 2)

        return jax.grad(loss)(params)

    assert np.isfinite(run(model, tokens, positions, segments)).all()
    grads, other = grad(params, tokens), grad(params, jnp.where(segments >= 0, tokens, 0))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)


def test_bfloat16_keeps_parameters_and_logits_in_float32():
    model = make(dtype="bfloat16")
    tokens = packed()[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    hidden = nnx.eval_shape(lambda: model.hidden(tokens))
    assert hidden.dtype == jnp.bfloat16
    logits = run(model, tokens)
    assert logits.dtype == np.float32
    exact = run(make(), tokens)
    assert 1e-4 < np.abs(logits - exact).max() < 0.2


def test_embeddings_and_logits_start_with_unit_variance():
    model = Transformer(tiny_config(depth=1, width=64), rngs=nnx.Rngs(0))
    tokens = packed()[0]
    assert abs(float(jnp.std(model.embed(tokens))) - 1) < 0.2
    assert abs(run(model, tokens).std() - 1) < 0.3


def abstract(config):
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))


def count(model) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("pattern", "depth"), [("full", 3), ("8*3,full", 6), ("8*3,full", 2)])
def test_num_params_is_the_number_of_parameters(tied, qk_norm, pattern, depth):
    options = dict(tied=tied, qk_norm=qk_norm, pattern=pattern, depth=depth)
    config = tiny_config(**options)
    assert config.num_params() == count(abstract(config))
    embedding = 0 if tied else config.vocab_size * config.width
    assert config.num_params(embedding=False) == config.num_params() - embedding


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_of_their_name(name):
    """The two smallest are named for a vocabulary of bytes, the others for one of 32k."""
    config = preset(name, vocab_size=257 if name in ("nano", "10m", "30m") else 1 << 15)
    assert count(abstract(config)) == config.num_params()
    if name != "nano":
        named = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
        assert abs(config.num_params() / named - 1) < 0.2
    assert config.num_params() < 1e6 or name != "nano"


def test_every_dimension_of_every_parameter_is_named():
    config = tiny_config(pattern="8*3,full", depth=6)
    sizes = dict(
        vocab=config.vocab_size,
        model=config.width,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        ffn=config.ffn,
        layers=1,
    )
    model = abstract(config)
    shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def check(leaf, names):
        assert len(names) == leaf.ndim
        assert all(name == "gain" or sizes[name] == n for name, n in zip(names, leaf.shape, strict=True))

    jax.tree.map(check, shapes, logical_axes(model))


def test_the_scan_unit_is_a_period():
    model = abstract(tiny_config(pattern="8*3,full", depth=14))
    assert (len(model.periods), len(model.tail)) == (4, 2)
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(nnx.state(model.periods)))


def test_layers_are_unstacked_in_order(mixed):
    params = nnx.to_pure_dict(nnx.state(mixed))
    stacked, tail = params["periods"], params["tail"]
    expected = [jax.tree.map(lambda a: a[r], stacked[f"slot_{s}"]) for r in (0, 1) for s in (0, 1)]  # noqa: B023
    blocks, specs = zip(*mixed.layers(), strict=True)
    assert specs == mixed.config.layers()
    for block, params in zip(blocks, [*expected, tail["slot_0"]], strict=True):
        jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(block)), params)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(depth=0), ["depth=0", "at least 1"]),
        (dict(heads=4, kv_heads=3), ["heads=4", "kv_heads=3"]),
        (dict(head_dim=7), ["head_dim=7", "even"]),
        (dict(dtype="float16"), ["float16", "bfloat16"]),
        (dict(pattern="8*0"), ["'8*0'", "512*3,full"]),
        (dict(pattern="8,,full"), ["''"]),
        (dict(pattern="-3"), ["'-3'"]),
        (dict(pattern="ful"), ["'ful'"]),
        (dict(soft_cap=-1.0), ["soft_cap=-1.0"]),
        (dict(remat="ful"), ["'ful'", "'full'"]),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(UsageError) as error:
        abstract(tiny_config(**options))
    assert all(word in str(error.value) for word in words)


def test_unknown_presets_and_fields_name_the_nearest():
    with pytest.raises(UsageError, match="125m"):
        preset("126m")
    with pytest.raises(UsageError, match="'heads'"):
        preset("nano", head=3)


def test_masks_of_layers():
    assert LayerSpec().mask(64, 128).visible_pairs() == 64 * 65 / 2
    assert LayerSpec(8).mask(64, 16).visible_pairs() == 64 * 8 - 28
    assert LayerSpec(64).mask(64, 16).visible_pairs() == LayerSpec().mask(64, 16).visible_pairs()


def objective(**options):
    model = make(**options)
    graph, state = nnx.split(model)
    tokens, positions, segments = packed()

    def loss(params):
        return jnp.sum(nnx.merge(graph, params)(tokens, positions=positions, segment_ids=segments) ** 2)

    return loss, nnx.to_pure_dict(state)


def test_remat_changes_no_gradient():
    grads = {}
    for remat in REMAT:
        loss, params = objective(remat=remat)
        grads[remat] = jax.jit(jax.grad(loss))(params)
    for remat in REMAT:
        for a, b in zip(jax.tree.leaves(grads["none"]), jax.tree.leaves(grads[remat]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(a).max())


@pytest.mark.exhaustive
def test_remat_keeps_less():
    def kept(remat):
        """Shapes of the arrays that the forward keeps for the backward, parameters aside."""
        loss, params = objective(remat=remat, pattern="8,full", depth=5)
        residuals = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
        ours = {leaf.shape for leaf in jax.tree.leaves(params)}
        return [leaf.shape for leaf in jax.tree.leaves(residuals) if leaf.shape not in ours]

    shapes = {remat: kept(remat) for remat in REMAT}
    size = {remat: sum(map(np.prod, shapes[remat])) for remat in REMAT}
    assert size["full"] < 0.5 * size["dots"] < 0.5 * 0.9 * size["none"]
    assert size["dots"] < 0.95 * size["matmuls"] < 0.95 * 0.95 * size["none"]
    # Nothing of the inside of a layer, in the scan or in the tail, is kept under "full".
    inner = {name: [s for s in shapes[name] if s[-1:] == (20,) and T in s] for name in REMAT}
    assert inner["none"] and inner["dots"] and not inner["full"]
