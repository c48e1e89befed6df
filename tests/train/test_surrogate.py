"""A tied surrogate: the cut, the start, both losses, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from blockjax.errors import UsageError
from blockjax.recurrence.phases import cost, dissimilarity, forcing
from blockjax.train import surrogate
from blockjax.train.config import base_config
from tests.models.tiny import random_model, tiny_config

pytestmark = pytest.mark.usefixtures("dense_attention")

T = 12


def batch(seed=0):
    rng = np.random.default_rng(seed)
    ids = np.stack([np.repeat([0, 1], [5, T - 5]), np.repeat([3, -1], [9, T - 9])]).astype(np.int32)
    positions = np.stack([np.r_[:5, : T - 5], np.r_[:9, : T - 9]]).astype(np.int32)
    tokens = rng.integers(0, 24, (2, T)).astype(np.int32)
    return {
        "tokens": jnp.asarray(tokens),
        "positions": jnp.asarray(positions),
        "segment_ids": jnp.asarray(ids),
    }


def inputs(x):
    return dict(positions=x["positions"], segment_ids=x["segment_ids"])


@pytest.fixture(scope="module")
def teacher():
    return random_model(tiny_config(depth=3, attention_block=16))


@pytest.fixture(scope="module")
def target(teacher):
    x = batch()
    return jax.jit(lambda model: model.activations(x["tokens"], **inputs(x)))(teacher)


def test_activations_lead_from_the_embedding_to_the_head(teacher, target):
    x = batch()
    assert target.shape == (4, 2, T, 16)
    np.testing.assert_allclose(target[0], teacher.embed(x["tokens"]), rtol=1e-6)
    hidden = jax.jit(lambda model: model.hidden(x["tokens"], **inputs(x)))(teacher)
    np.testing.assert_allclose(teacher.final_norm(target[-1]), hidden, rtol=1e-4, atol=1e-5)
    assert min(np.abs(a - b).max() for a, b in zip(target[1:], target[:-1], strict=True)) > 0.1


def test_phases_are_of_the_outputs_of_layers(teacher, target):
    """Of two batches alike, the mean is that of one; padding does not count."""
    found = surrogate.find_phases(teacher, [batch(), batch()], 2)
    expected = dissimilarity(target[1:], batch()["segment_ids"] >= 0)
    np.testing.assert_allclose(found.weights, expected, atol=1e-5)
    costs = {cut: cost(expected, [0, cut]) for cut in (1, 2)}
    best = min(costs, key=costs.get)
    assert found.starts == [0, best]


@pytest.mark.exhaustive
def test_with_a_phase_for_each_layer_it_is_the_teacher(teacher, target):
    """Copied weights; gains start next to one, and are one without their last weights."""
    x = batch()
    model = surrogate.start(teacher, [0, 1, 2])
    assert model.config.loop == "1*1,1*1,1*1"
    run = jax.jit(lambda model: model.activations(x["tokens"], **inputs(x)))
    np.testing.assert_allclose(run(model), target, rtol=2e-2, atol=2e-2)
    model.condition.outer[...] *= 0
    np.testing.assert_allclose(run(model), target, rtol=1e-5, atol=1e-5)
    alone = surrogate.blocks_alone(model, target, x, 0.5)
    assert float(alone) < 1e-9 and float(surrogate.whole(model, target, x)) < 1e-9


def test_one_phase_alone_is_the_whole(teacher, target):
    """Without forcing, a block alone over all layers starts from the embedding, as the whole does."""
    x, model = batch(), surrogate.start(teacher, [0])
    alone = jax.jit(surrogate.blocks_alone)(model, target, x, 0.0)
    assert float(alone) == pytest.approx(float(jax.jit(surrogate.whole)(model, target, x)), rel=1e-5)
    forced = jax.jit(surrogate.blocks_alone)(model, target, x, 1.0)
    steps = [target[i + 1] - surrogate_step(model, target[i], i, x) for i in range(3)]
    assert float(forced) == pytest.approx(float(np.mean(np.square(steps))), rel=1e-4)
    assert abs(float(forced) - float(alone)) > 1e-3


def surrogate_step(model, x, i, data):
    """What the only block makes of x at time i."""
    layers = list(model.layers())
    see = model.sees(layers[i][1], data["segment_ids"])
    return model.through(x, layers[i][0], model.rope(data["positions"]), see)


@pytest.mark.exhaustive
def test_it_learns_first_alone_then_whole(teacher):
    """Losses and errors fall; embedding, final norm and head stay the teacher's."""
    steps, optimizer = 20, base_config().optimizer
    optimizer.update(learning_rate=5e-3, warmup_steps=2, weight_decay=1e-4)
    model, fixed = surrogate.start(teacher, [0, 1]), batch()
    errors, losses = [surrogate.layer_errors(model, teacher, fixed)], {}

    def alone(student, activations, batch, step):
        return surrogate.blocks_alone(student, activations, batch, forcing(step, steps))

    def whole(student, activations, batch, step):
        return surrogate.whole(student, activations, batch)

    for loss in (alone, whole):
        seen = losses.setdefault(loss.__name__, [])
        model = surrogate.train(
            loss, model, teacher, [fixed] * steps, optimizer, steps,
            say=lambda step, value, seen=seen: seen.append(value),
        )  # fmt: skip
        errors.append(surrogate.layer_errors(model, teacher, fixed))
    assert len(losses["alone"]) == len(losses["whole"]) == steps
    assert losses["whole"][-1] < 0.8 * losses["whole"][0]
    assert errors[0][-1] > errors[1][-1] > errors[2][-1] and errors[2].mean() < 0.8 * errors[0].mean()
    for name in ("embedding", "final_norm", "head"):
        parts = (nnx.to_pure_dict(nnx.state(x))[name] for x in (model, teacher))
        jax.tree.map(np.testing.assert_array_equal, *parts)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(pattern="8,full"), ["model.pattern", "'8,full'"]),
        (dict(loop="1,1*3"), ["model.loop", "'1,1*3'"]),
        (dict(residual="delta"), ["model.residual", "'delta'"]),
        (dict(locality="constant:1,smallest=4"), ["model.locality", "constant"]),
    ],
)
def test_teachers_of_several_kinds_of_layers_are_refused(options, words):
    with pytest.raises(UsageError) as error:
        surrogate.surrogate_config(tiny_config(depth=4, **options), [0, 2])
    assert all(word in str(error.value) for word in words)
