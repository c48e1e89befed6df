"""What attention and depth attention do on a validation batch, for metrics and pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blockjax.locality.statistics import AttentionStatistics, attention_statistics, sample_queries
from blockjax.models import TransformerConfig
from blockjax.train.step import Batch, Dial, context

QUERIES = 16  # sampled from each sequence


class Findings(NamedTuple):
    """What `make_inspect_step` found.

    Attributes:
      attention: each [L, N] float32, of the layers that are attentions; None without any.
      depth_weights: [readers, heads, sources] float32, mean over tokens; None under `prenorm`.
      depth_entropy: [readers] float32, of the weights at each token in bits, mean over tokens and heads;
        None under `prenorm`.
      token_weights: [T, sources] float32 of the last reader, mean over heads, for each token of the first
        sequence; None under `prenorm`.
    """

    attention: AttentionStatistics | None
    depth_weights: jax.Array | None = None
    depth_entropy: jax.Array | None = None
    token_weights: jax.Array | None = None


def make_inspect_step(
    graph: nnx.GraphDef, dial: Dial = lambda step: None
) -> Callable[[Any, jax.Array, Batch], Findings]:
    """`(params, step, batch) -> Findings`.

    Fidelity is the share of attention within the nearest set of the model's locality: its smallest
    window, or the query's own segment.
    """

    def inspect(params, step: jax.Array, batch: Batch) -> Findings:
        model = nnx.merge(graph, params)
        config, documents = model.config, batch["segment_ids"]
        near = config.nearest
        near_ids = near.ids(documents, model.segments(batch["tokens"], batch["positions"]))
        queries = sample_queries(documents, QUERIES, jax.random.key(0))

        def probe(q, k, spec, ids) -> AttentionStatistics:
            bias = spec.bias(config.heads)
            return attention_statistics(
                q,
                k,
                queries=queries,
                predicate=spec.predicate,
                local=near.predicate,
                segment_ids=ids,
                local_segment_ids=near_ids,
                soft_cap=config.soft_cap or None,
                slope=None if bias is None else bias.slope,
            )

        found = model.inspect(batch["tokens"], **context(batch), locality=dial(step), probe=probe)
        weights = found.depth_weights
        if weights is None:
            return Findings(found.probes)
        real = (documents >= 0)[..., None]
        mean = jnp.mean(weights, axis=(2, 3), where=real)
        bits = jnp.nansum(jax.scipy.special.entr(weights), axis=1) / jnp.log(2)
        entropy = jnp.mean(bits, axis=(1, 2, 3), where=real)
        return Findings(found.probes, mean.swapaxes(1, 2), entropy, jnp.mean(weights[-1, :, 0], axis=-1).T)

    return inspect


def scalars(findings: Findings, config: TransformerConfig) -> dict[str, float]:
    """Findings as metrics: means over heads per layer; per sublayer two weights and the entropy."""
    values, residual = {}, config.residual_rule
    layers = [i for i, spec in enumerate(config.layers()) if spec.mixer is None]
    found = {} if findings.attention is None else findings.attention._asdict()
    for name, per_layer in found.items():
        for layer, heads in zip(layers, np.asarray(per_layer), strict=True):
            values[f"attention/{name}/layer_{layer:02}"] = float(np.mean(heads))
    if findings.depth_weights is not None:
        for reader, weights in enumerate(np.asarray(findings.depth_weights).mean(1)):
            name = "head" if reader == residual.sublayers else f"sublayer_{reader:03}"
            there = weights[~np.isnan(weights)]
            values[f"depth/embedding_weight/{name}"] = float(there[0])
            values[f"depth/newest_weight/{name}"] = float(there[-1])
            values[f"depth/entropy/{name}"] = float(findings.depth_entropy[reader])
    return values
