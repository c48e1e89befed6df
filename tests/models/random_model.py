"""Models filled by NumPy: initialising one with JAX compiles longer than most tests run."""

import jax
import numpy as np
from flax import nnx

from blockjax.models import Transformer, TransformerConfig


def random_params(config: TransformerConfig, seed: int = 0):
    """`(graph, parameters)`; gains differ from one, so that a missing one shows."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if path[-1].key == "gain":
            value = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            value = rng.normal(size=leaf.shape) * config.width**-0.5
        return jax.numpy.asarray(value, leaf.dtype)

    return graph, jax.tree_util.tree_map_with_path(fill, nnx.to_pure_dict(state))


def random_model(config: TransformerConfig, seed: int = 0) -> Transformer:
    return nnx.merge(*random_params(config, seed))
