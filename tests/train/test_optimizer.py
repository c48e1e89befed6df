import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from blockjax.models import Transformer, TransformerConfig, logical_axes
from blockjax.train.config import base_config
from blockjax.train.optimizer import is_matrix, make_optimizer, make_schedule, muon_dimensions


def settings(**values):
    config = base_config().optimizer
    config.update(schedule="stable_decay", warmup_steps=0, decay_fraction=0.0, clip_norm=0.0)
    config.update(values)
    return config


def steps_of(settings, steps: int) -> list[float]:
    schedule = make_schedule(settings, steps)
    return [float(schedule(k)) for k in range(steps + 1)]


def test_warm_up_then_cosine():
    rates = steps_of(settings(schedule="cosine", warmup_steps=4, final_scale=0.1), 104)
    np.testing.assert_allclose(rates[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    np.testing.assert_allclose([rates[54], rates[104]], [0.55, 0.1], rtol=1e-5)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_warm_up_then_stable_then_decay():
    values = settings(warmup_steps=10, decay_fraction=0.2, final_scale=0.5)
    rates = steps_of(values, 100)
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 11, rtol=1e-6)
    assert set(rates[10:81]) == {1.0}
    np.testing.assert_allclose(rates[80:], np.linspace(1, 0.5, 21), rtol=1e-6)


def test_a_decay_as_long_as_the_run_leaves_the_warm_up_whole():
    rates = steps_of(settings(warmup_steps=5, decay_fraction=1.0, final_scale=0.0), 25)
    np.testing.assert_allclose(rates[:6], np.arange(1, 7) / 6, rtol=1e-6)
    np.testing.assert_allclose(rates[5:], np.linspace(1, 0, 21), atol=1e-6)


CONFIG = TransformerConfig(
    vocab_size=24, depth=5, width=16, heads=4, kv_heads=2, head_dim=4, ffn=32, pattern="8,full"
)

# Which optimizer moves a parameter under Muon, the matrix it reads there, and whether it decays.
GOLDEN = """
embedding                     adamw
final_norm.gain               adamw
head                          adamw
{}.attention.k                muon 16 x 8    decays
{}.attention.k_norm.gain      adamw
{}.attention.o                muon 16 x 16   decays
{}.attention.q                muon 16 x 16   decays
{}.attention.q_norm.gain      adamw
{}.attention.v                muon 16 x 8    decays
{}.attention_norm.gain        adamw
{}.mlp.down                   muon 32 x 16   decays
{}.mlp.gate                   muon 16 x 32   decays
{}.mlp.up                     muon 16 x 32   decays
{}.mlp_norm.gain              adamw
"""
BLOCKS = ("periods.slot_0", "periods.slot_1", "tail.slot_0")


def golden() -> dict[str, list[str]]:
    rows = [line.split(maxsplit=1) for line in GOLDEN.strip().splitlines()]
    return {name.format(block): rest.split() for name, rest in rows for block in BLOCKS}


@pytest.fixture(scope="module")
def model():
    return Transformer(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def params(model):
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return jax.tree.map(lambda p: p + 0.5, params)  # no gain is 0 or 1


def by_name(tree) -> dict:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))[0]
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def first_update(model, params, grads, config):
    optimizer = make_optimizer(config, logical_axes(model), steps=10)
    return by_name(optimizer.update(grads, optimizer.init(params), params)[0])


def test_every_parameter_has_its_kind(model):
    axes = by_name(logical_axes(model))
    assert axes.keys() == golden().keys()
    shapes = by_name(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    for name, (kind, *words) in golden().items():
        dims = muon_dimensions(axes[name])
        assert (dims is not None, is_matrix(axes[name])) == (kind == "muon", "decays" in words), name
        if dims is not None:
            rows, columns = (
                int(np.prod([shapes[name].shape[i] for i in side]))
                for side in (dims.reduction_axis, dims.output_axis)
            )
            assert words[:3] == [str(rows), "x", str(columns)], name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_is_on_matrices_only(model, params, name):
    rate, decay = 0.5, 0.25
    config = settings(name=name, learning_rate=rate, adam_learning_rate=rate, weight_decay=decay)
    updates = first_update(model, params, jax.tree.map(jnp.zeros_like, params), config)
    for path, param in by_name(params).items():
        expected = -rate * decay * param if "decays" in golden()[path] else jnp.zeros_like(param)
        np.testing.assert_allclose(updates[path], expected, rtol=1e-6, atol=1e-12, err_msg=path)


def test_muon_orthogonalises_matrices_and_nothing_else(model, params):
    draw = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(draw.normal(size=p.shape), jnp.float32), params)
    config = settings(name="muon", learning_rate=1.0, adam_learning_rate=0.5, weight_decay=0.0)
    updates = first_update(model, params, grads, config)
    axes, named = by_name(logical_axes(model)), by_name(grads)
    for path, update in updates.items():
        dims = muon_dimensions(axes[path])
        if dims is None:  # Adam's first step is the sign of the gradient
            assert (np.sign(update) == -np.sign(named[path])).all(), path
            assert np.ptp(np.abs(update)) < 1e-3 * np.abs(update).max(), path
            continue
        layers = update if axes[path][0] == "layers" else update[None]
        rows = int(np.prod([update.shape[i] for i in dims.reduction_axis]))
        for layer in layers:
            # Five Newton-Schulz steps bring singular values near 1; optax scales by the shape.
            matrix = np.reshape(layer, (rows, -1)) / max(1, layer.size / rows / rows) ** 0.5
            values = np.linalg.svd(matrix, compute_uv=False)
            assert values.min() > 0.2 and values.max() < 1.4, (path, values)


@pytest.mark.parametrize(
    "axes", [("model", "ffn"), ("ffn", "model"), ("heads", "head_dim", "model")], ids=str
)
def test_stacked_layers_move_as_each_alone(axes):
    shape = dict(model=8, ffn=16, heads=2, head_dim=4)
    draw = np.random.default_rng(0)
    size = (3, *(shape[name] for name in axes))
    # Layers of very different size: a common norm would show.
    grads, params = (
        draw.normal(size=size) * np.logspace(-2, 1, 3).reshape(3, *[1] * len(axes)) for _ in "gp"
    )
    grads, params = np.float32(grads), np.float32(params)
    config = settings(name="muon", learning_rate=0.1, weight_decay=0.1)

    def moved(axes, params, grads):
        optimizer = make_optimizer(config, {"w": axes}, steps=10)
        state, tree = optimizer.init({"w": params}), {"w": params}
        for scale in (1.0, -0.5):  # the second step has momentum
            updates, state = optimizer.update({"w": scale * grads}, state, tree)
            tree = optax.apply_updates(tree, updates)
        return tree["w"]

    alone = np.stack([moved(axes, p, g) for p, g in zip(params, grads, strict=True)])
    np.testing.assert_allclose(moved(("layers", *axes), params, grads), alone, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_gradients_are_clipped_together(name):
    axes = {"w": ("model", "ffn"), "g": ("gain",)}
    params = {"w": jnp.ones((4, 4)), "g": jnp.ones(4)}
    draw = np.random.default_rng(0)
    small, large = ({k: jnp.asarray(draw.normal(size=p.shape)) for k, p in params.items()} for _ in "sl")
    small = jax.tree.map(lambda g: 0.01 * g, small)
    norm = float(optax.tree.norm(large))
    clipped = jax.tree.map(lambda g: g * 2.0 / norm, large)
    assert norm > 2.0

    def second_update(clip_norm, last):
        optimizer = make_optimizer(settings(name=name, clip_norm=clip_norm), axes, steps=10)
        _, state = optimizer.update(small, optimizer.init(params), params)
        return optimizer.update(last, state, params)[0]

    same = lambda a, b: all(np.allclose(a[k], b[k], rtol=1e-5, atol=0) for k in a)  # noqa: E731
    assert same(second_update(2.0, large), second_update(0.0, clipped))
    assert not same(second_update(0.0, large), second_update(0.0, clipped))
