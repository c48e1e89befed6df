"""Batched generation: one prefill, then a token a sequence and step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blockjax.errors import UsageError
from blockjax.generate.cache import KVCache, cache_size
from blockjax.locality import SegmentState
from blockjax.models import LayerSpec, Transformer, TransformerConfig
from blockjax.models.tied import Tied
from blockjax.models.transformer import Block
from blockjax.parallel.mesh import constrain
from blockjax.recurrence import Past


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only the k most likely tokens; 0: all.
      top_p: only the most likely tokens that together reach this probability
        (arXiv:1904.09751); 1: all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UsageError(
                f"temperature={self.temperature} must be a number >= 0; 0 takes the most likely token."
            )
        if self.top_k < 0:
            raise UsageError(f"top_k={self.top_k} must not be negative; 0 keeps all tokens.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p} must lie in (0, 1]; 1 keeps all tokens.")


def sample(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws a token [B] int32 from logits [B, V]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32)
    # The largest becomes 0, so that a small temperature does not overflow.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        p = jax.nn.softmax(ordered, axis=-1)
        # Kept while the tokens before it do not yet reach top_p; the first always is.
        kept = jnp.cumsum(p, axis=-1) - p < sampling.top_p
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


Layers = Sequence[tuple[Block | Tied, LayerSpec]]


class Memory(NamedTuple):
    """What decoding remembers: a cache or a recurrent memory a layer, and where segments are, if any."""

    caches: list[Any]
    segments: SegmentState | None


def prefill(
    model: Transformer, layers: Layers, tokens: jax.Array, lengths: jax.Array, sizes: Sequence[int]
) -> tuple[jax.Array, Memory]:
    """Runs padded prompts.

    Args:
      layers: every layer with what it sees.
      tokens: [B, T] int32, padded on the right.
      lengths: [B] int32, at least 1.
      sizes: slots of each layer's cache, see `cache_size`.

    Returns:
      Logits [B, V] float32 after each prompt's last token, and what to remember of the prompts.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    documents = jnp.where(positions < lengths[:, None], 0, -1)
    boundaries, segments, state, caches = model.config.local_rule.boundaries, None, None, {}
    if boundaries is not None:
        segments, state = boundaries.prompt(tokens, lengths, model.embedding[...])

    def sees():
        for i, ((_, spec), size) in enumerate(zip(layers, sizes, strict=True)):
            if spec.mixer is not None:
                yield Past(None, documents, True, spec.layer)
                continue
            inner = model.attend(spec, spec.ids(documents, segments))

            def attend(q, k, v, i=i, inner=inner, size=size):
                caches[i] = KVCache.from_prompt(k, v, lengths, segments, size)
                return inner(q, k, v)

            yield attend

    hidden, memories = model.run_layers(model.embed(tokens), model.rope(positions), layers, sees())
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return model.logits(last)[:, 0], Memory([caches.get(i, x) for i, x in enumerate(memories)], state)


def decode(
    model: Transformer, layers: Layers, tokens: jax.Array, positions: jax.Array, memory: Memory
) -> tuple[jax.Array, Memory]:
    """Runs one token a sequence.

    Args:
      layers: as in `prefill`, made once: cutting a layer out of the stack may copy its weights.
      tokens, positions: [B] int32.
      memory: of the tokens so far.

    Returns:
      Logits [B, V] float32 of the next token, and the memory with this one in it.
    """
    config, caches = model.config, {}
    segments, state = None, memory.segments
    if state is not None:
        segments, state = config.local_rule.boundaries.step(state, tokens, model.embedding[...])

    def sees():
        for i, ((_, spec), cache) in enumerate(zip(layers, memory.caches, strict=True)):
            if spec.mixer is not None:
                yield Past(cache, None, True, spec.layer)
                continue

            def attend(q, k, v, i=i, spec=spec, cache=cache):
                caches[i] = cache.append(k, v, positions, segments)
                block, soft_cap = config.attention_block, config.soft_cap or None
                return caches[i].attend(q, spec, positions, block=block, soft_cap=soft_cap)

            yield attend

    x, rope = model.embed(tokens[:, None]), model.rope(positions[:, None])
    hidden, memories = model.run_layers(x, rope, layers, sees())
    return model.logits(hidden)[:, 0], Memory([caches.get(i, x) for i, x in enumerate(memories)], state)


def generate(
    model: Transformer,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    *,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    stop: int | None = None,
    vocab_size: int | None = None,
    locality: jax.Array | np.ndarray | float | None = None,
    least_locality: float = 0.0,
) -> list[np.ndarray]:
    """Continues a batch of prompts of unequal length.

    Args:
      prompts: token ids, each at least one.
      max_new_tokens: most tokens to add.
      seed: of the draws.
      stop: id that ends a sequence; not part of the result.
      vocab_size: ids below this may be drawn; the model may have padded rows.
      locality: of all layers, or [L], instead of the schedule of the config; another one does
        not compile anew.
      least_locality: `locality` is never below it. Caches hold what a layer of this locality sees.

    Returns:
      The new ids of each prompt.

    Raises:
      UsageError: no or empty prompts, ids that the model does not have, or a number out of range.
    """
    if not prompts or min(len(p) for p in prompts) == 0 or max_new_tokens < 1:
        raise UsageError(
            f"Generation needs prompts of at least one token and max_new_tokens={max_new_tokens} >= 1."
        )
    rows = model.config.vocab_size
    vocab_size = rows if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= rows:
        raise UsageError(f"vocab_size={vocab_size} must lie in 1..{rows}, the rows of the model's embedding.")
    least, most = (int(f([f(p) for p in prompts])) for f in (np.min, np.max))
    if least < 0 or most >= rows:
        raise UsageError(f"Prompts hold ids from {least} to {most}; the model knows 0..{rows - 1}.")
    lengths = np.array([len(p) for p in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    sizes = _cache_sizes(model.config, tokens.shape[1] + max_new_tokens, locality, least_locality)
    graph, params = nnx.split(model)
    table = model.config.table(locality)
    settings = Settings(graph, max_new_tokens, sampling, vocab_size, sizes)
    new = _generate(
        settings, params, tokens, lengths, jax.random.key(seed), None if locality is None else table
    )
    return [row[: _first(row, stop)] for row in np.asarray(new)]


class Settings(NamedTuple):
    """What generation is compiled for."""

    graph: nnx.GraphDef
    count: int
    sampling: Sampling
    vocab_size: int
    cache_sizes: tuple[int, ...]


def _cache_sizes(config: TransformerConfig, max_tokens: int, locality, least: float) -> tuple[int, ...]:
    widest = config.layers()
    if locality is not None:
        if not np.all(np.asarray(locality) >= least):
            raise UsageError(
                f"locality {np.min(locality):g} is below least_locality={least:g}, "
                "for which the caches are made; lower least_locality."
            )
        widest = config.layers(least)
    return tuple(cache_size(spec, max_tokens, config.local_rule.boundaries) for spec in widest)


@functools.partial(jax.jit, static_argnums=0)
def _generate(settings: Settings, params, tokens, lengths, key, table: LayerSpec | None) -> jax.Array:
    """New tokens [B, count]; `table` replaces the layer table of the config."""
    model = nnx.merge(settings.graph, params)
    layers = list(model.layers())
    if table is not None:
        layers = [(block, spec) for (block, _), spec in zip(layers, model.config.rows(table), strict=True)]
    logits, memory = prefill(model, layers, tokens, lengths, settings.cache_sizes)

    def draw(logits: jax.Array, i: jax.Array) -> jax.Array:
        return sample(logits[:, : settings.vocab_size], jax.random.fold_in(key, i), settings.sampling)

    def step(carry, i):
        token, memory = carry
        logits, memory = decode(model, layers, token, lengths + i - 1, memory)
        token = draw(logits, i)
        return (token, memory), token

    first = draw(logits, jnp.int32(0))
    _, rest = jax.lax.scan(step, (first, memory), jnp.arange(1, settings.count))
    new = jnp.concatenate([first[None], rest]).T
    return constrain(new, (None, None))  # whole on every process


def _first(row: np.ndarray, stop: int | None) -> int | None:
    hits = np.flatnonzero(row == stop)
    return int(hits[0]) if len(hits) else None
