import dataclasses

import jax
import numpy as np
import pytest

from blockjax.models import TransformerConfig
from blockjax.parallel.mesh import make_mesh
from blockjax.train.flops import FlopCounter, peak_flops
from tests.models.tiny import random_model

CONFIG = TransformerConfig(
    vocab_size=10,
    depth=3,
    width=4,
    heads=2,
    kv_heads=1,
    head_dim=2,
    ffn=6,
    pattern="3*2,full",
    attention_block=4,
)
T = 8


def brute_force_pairs(segments: np.ndarray) -> int:
    """Pairs within a segment that windows of 3, 3 and all earlier tokens leave visible."""
    q, k = np.meshgrid(np.arange(T), np.arange(T), indexing="ij")
    same = (segments[:, None] == segments[None]) & (k <= q)
    return 2 * int((same & (q - k < 3)).sum()) + int(same.sum())


def test_useful_and_executed_by_hand():
    attention, mlp, gains = 4 * 2 * (2 + 1 + 1 + 2), 3 * 4 * 6, 4 + 4 + 2 + 2
    weights = 3 * (attention + mlp + gains) + 4 + 4 * 10  # and the last gain and the head
    # A pair costs q.k and p.v, 2 * H each; the backward 2.5 times that.
    pair = 3.5 * 4 * 2 * 2
    segments = np.array([0, 0, 0, 0, 0, 1, 1, 1])
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2]])
    pairs = brute_force_pairs(segments)
    assert random_model(CONFIG).visible_pairs(positions, positions) == pairs
    counter = FlopCounter(CONFIG, T)
    assert counter.useful(T, pairs) == 6 * weights * T + pair * pairs
    # Blocks of 4 x 4: both kinds of layer visit all three at or below the diagonal.
    assert counter.executed(T) == 6 * weights * T + pair * 3 * (3 * 16)


@pytest.mark.parametrize("window", [1, 3, 4, 9, 64])
def test_executed_is_never_below_useful(window):
    config = dataclasses.replace(CONFIG, pattern=f"{window},full", attention_block=16)
    positions = np.arange(64)[None]
    counter = FlopCounter(config, 64)
    pairs = float(random_model(config).visible_pairs(positions, positions))
    assert counter.executed(64) >= counter.useful(64, pairs)


def test_the_peak_is_of_the_machine_whatever_the_mesh():
    alone, source = peak_flops()
    assert "measured" in source
    with jax.set_mesh(make_mesh({"data": -1})):
        inside, _ = peak_flops()
    assert 0.4 < inside / alone < 2.5


def test_executed_follows_a_locality_that_moves():
    config = dataclasses.replace(CONFIG, pattern="full", locality="constant:1,smallest=4", context=64)
    counter, dense = FlopCounter(config, 64), FlopCounter(dataclasses.replace(CONFIG, pattern="full"), 64)
    assert counter.executed(64, np.zeros(3)) == dense.executed(64) > 2 * counter.executed(64)
    assert counter.executed(64) == counter.executed(64, np.ones(3))


def test_layers_of_a_loop_count_each_time():
    """As many FLOPs as the untied model, but for three gains each time; the pairs of every time."""
    config = dataclasses.replace(CONFIG, depth=5, pattern="3", loop="1,2*2")
    untied = dataclasses.replace(config, loop="")
    looped, plain = FlopCounter(config, T), FlopCounter(untied, T)
    gains = 6 * T * 4 * 3 * 4  # four layers
    assert looped.useful(T, 7.0) == plain.useful(T, 7.0) + gains
    assert looped.executed(T) == plain.executed(T) + gains
    positions = np.arange(T)[None]
    pairs = [float(random_model(c).visible_pairs(positions, positions)) for c in (config, untied)]
    assert pairs[0] == pairs[1] > 0
