"""Affine maps of a state: the monoid laws, and agreement with the maps applied one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blockjax.affine import Affine

FORMS = {"scalar": (1, 1), "diagonal": (4, 1), "full": (4, 4)}


def draw(seed, form):
    rng = np.random.default_rng(seed)
    return Affine(*(jnp.asarray(rng.normal(size=(2, *shape)), "float32") for shape in (FORMS[form], (4, 3))))


def close(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_monoid_laws(form):
    a, b, c = (draw(seed, form) for seed in range(3))
    close(c.after(b).after(a), c.after(b.after(a)))
    close(a.after(a.identity()), a)
    close(a.identity().after(a), a)
    assert not np.allclose(a.after(b).N, b.after(a).N)


@pytest.mark.parametrize("form", FORMS)
def test_folding_maps_is_applying_them_in_turn(form):
    maps, state = [draw(seed, form) for seed in range(5)], draw(9, form).N
    whole = functools.reduce(lambda earlier, later: later.after(earlier), maps)
    close([whole(state)], [functools.reduce(lambda S, one: one(S), maps, state)])


@pytest.mark.parametrize("form", FORMS)
def test_gradients_go_back_through_the_transposed_map(form):
    one, state, gradient = draw(0, form), draw(1, form).N, draw(2, form).N
    _, pullback = jax.vjp(one, state)
    close(pullback(gradient), [one.back(jnp.zeros_like(gradient))(gradient)])
