import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blockjax.errors import UsageError
from blockjax.recurrence import phases as module


def weights(seed, L=8):
    x = np.random.default_rng(seed).normal(size=(L, 3)).cumsum(0)
    return 1 - x @ x.T / np.outer(*[np.linalg.norm(x, axis=1)] * 2)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_phases_are_the_best_of_all(count):
    for seed in range(5):
        w = weights(seed)
        found = module.phases(w, count)
        every = [[0, *cut] for cut in itertools.combinations(range(1, 8), count - 1)]
        costs = [module.cost(w, starts) for starts in every]
        assert found in every and module.cost(w, found) == pytest.approx(min(costs), abs=1e-12)
        assert count in (1, 8) or max(costs) > min(costs) + 0.01


def test_blocks_of_equal_layers_are_found():
    label = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    assert module.phases(label[:, None] != label, 3) == [0, 3, 5]
    with pytest.raises(UsageError, match=r"9 phases.*\(8, 8\)"):
        module.phases(weights(0), 9)


def test_dissimilarity_by_hand():
    x = np.random.default_rng(0).normal(size=(3, 2, 4, 5)).astype(np.float32)
    mask = np.array([[1, 1, 0, 1], [0, 1, 1, 1]], bool)
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    expected = [[np.mean(1 - (unit[i] * unit[j]).sum(-1)[mask]) for j in range(3)] for i in range(3)]
    np.testing.assert_allclose(module.dissimilarity(jnp.asarray(x), mask), expected, atol=1e-6)
    scaled = jnp.asarray(x) * jnp.array([1.0, 2.0, 30.0])[:, None, None, None]
    np.testing.assert_allclose(module.dissimilarity(scaled, mask), expected, atol=1e-6)


def test_the_loss_goes_from_the_teacher_to_the_block_itself():
    """A linear block by hand: forced steps start from the teacher, free ones from what came before."""
    teacher = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 3)), jnp.float32)
    block = lambda x, layer: 0.5 * x + layer  # noqa: E731
    tf = np.mean([np.mean((0.5 * teacher[i] + 2 + i - teacher[i + 1]) ** 2) for i in range(3)])
    x, ar = teacher[0], []
    for i in range(3):
        x = 0.5 * x + 2 + i
        ar.append(np.mean((x - teacher[i + 1]) ** 2))
    for forced in (0.0, 0.25, 1.0):
        found = module.surrogate_loss(block, teacher, forced, first=2)
        assert float(found) == pytest.approx(forced * tf + (1 - forced) * np.mean(ar), rel=1e-5)
    gradient = jax.grad(lambda t: module.surrogate_loss(lambda x, layer: 0 * x, t, 0.5))(teacher)
    assert not np.any(gradient)


def test_forcing_ends_after_its_share():
    found = [float(module.forcing(step, 100)) for step in (0, 5, 25, 90)]
    np.testing.assert_allclose(found, [1, 0.8, 0, 0], atol=1e-6)
