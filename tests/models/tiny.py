"""Decoders of a few thousand parameters.

NumPy fills them: initialising one with JAX compiles longer than most tests run.
"""

import zlib

import jax
import numpy as np
from flax import nnx

from blockjax.models import Transformer, TransformerConfig


def tiny_config(**options) -> TransformerConfig:
    """Two layers of width 16 in float32, with fields replaced."""
    sizes = dict(vocab_size=24, depth=2, width=16, heads=4, kv_heads=2, head_dim=8, ffn=20)
    return TransformerConfig(**{**sizes, "attention_block": 32, "dtype": "float32", **options})


def random_params(config: TransformerConfig, seed: int = 0):
    """`(graph, parameters)`; gains differ from one, so that a missing one shows."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))

    def fill(path, leaf):
        # From its name: a parameter does not change with the others that a model has.
        rng = np.random.default_rng([seed, zlib.crc32(jax.tree_util.keystr(path).encode())])
        if path[-1].key == "gain":
            value = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            value = rng.normal(size=leaf.shape) * config.width**-0.5
        return jax.numpy.asarray(value, leaf.dtype)

    return graph, jax.tree_util.tree_map_with_path(fill, nnx.to_pure_dict(state))


def random_model(config: TransformerConfig, seed: int = 0) -> Transformer:
    return nnx.merge(*random_params(config, seed))
