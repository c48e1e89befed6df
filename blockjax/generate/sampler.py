"""Batched generation: one prefill, then a token a sequence and step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blockjax.errors import UsageError
from blockjax.generate.cache import KVCache, cache_size
from blockjax.models import LayerSpec, Transformer
from blockjax.models.transformer import Block
from blockjax.parallel.mesh import constrain


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


def prefill(
    model: Transformer, tokens: jax.Array, lengths: jax.Array, max_tokens: int
) -> tuple[jax.Array, list[KVCache]]:
    """Runs padded prompts.

    Args:
      tokens: [B, T] int32, padded on the right.
      lengths: [B] int32, at least 1.
      max_tokens: longest sequence that the caches must serve.

    Returns:
      Logits [B, V] float32 after each prompt's last token, and a cache a layer.
    """
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    segments = jnp.where(positions < lengths[:, None], 0, -1)
    rope, x, caches = model.rope(positions), model.embed(tokens), []
    for block, spec in model.layers():

        def attend(q, k, v, spec=spec):
            caches.append(KVCache.from_prompt(k, v, lengths, cache_size(spec, max_tokens)))
            return model.attend(spec.mask(T, model.config.attention_block), segments)(q, k, v)

        x = block(x, rope, attend)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return model.logits(model.final_norm(last))[:, 0], caches


def decode(
    model: Transformer,
    layers: Sequence[tuple[Block, LayerSpec]],
    tokens: jax.Array,
    positions: jax.Array,
    caches: list[KVCache],
) -> tuple[jax.Array, list[KVCache]]:
    """Runs one token a sequence.

    Args:
      layers: `list(model.layers())`, made once: cutting a layer out of the stack may copy its weights.
      tokens, positions: [B] int32.
      caches: one a layer.

    Returns:
      Logits [B, V] float32 of the next token, and the caches with this one in them.
    """
    rope, x, new = model.rope(positions[:, None]), model.embed(tokens[:, None]), []
    for (block, spec), cache in zip(layers, caches, strict=True):

        def attend(q, k, v, spec=spec, cache=cache):
            new.append(cache.append(k, v, positions))
            return new[-1].attend(
                q, spec, positions, block=model.config.attention_block, soft_cap=model.config.soft_cap or None
            )

        x = block(x, rope, attend)
    return model.logits(model.final_norm(x))[:, 0], new


def generate(
    model: Transformer,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    *,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    stop: int | None = None,
    vocab_size: int | None = None,
) -> list[np.ndarray]:
    """Continues a batch of prompts of unequal length.

    Args:
      prompts: token ids, each at least one.
      max_new_tokens: most tokens to add.
      seed: of the draws.
      stop: id that ends a sequence; not part of the result.
      vocab_size: ids below this may be drawn; the model may have padded rows.

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
    graph, params = nnx.split(model)
    new = _generate(
        graph,
        params,
        tokens,
        lengths,
        jax.random.key(seed),
        max_new_tokens,
        sampling,
        vocab_size,
    )
    return [row[: _first(row, stop)] for row in np.asarray(new)]


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7))
def _generate(graph, params, tokens, lengths, key, count, sampling, vocab_size) -> jax.Array:
    """New tokens [B, count]."""
    model = nnx.merge(graph, params)
    layers = list(model.layers())
    logits, caches = prefill(model, tokens, lengths, tokens.shape[1] + count)

    def draw(logits: jax.Array, i: jax.Array) -> jax.Array:
        return sample(logits[:, :vocab_size], jax.random.fold_in(key, i), sampling)

    def step(carry, i):
        token, caches = carry
        logits, caches = decode(model, layers, token, lengths + i - 1, caches)
        token = draw(logits, i)
        return (token, caches), token

    first = draw(logits, jnp.int32(0))
    _, rest = jax.lax.scan(step, (first, caches), jnp.arange(1, count))
    new = jnp.concatenate([first[None], rest]).T
    return constrain(new, (None, None))  # whole on every process


def _first(row: np.ndarray, stop: int | None) -> int | None:
    hits = np.flatnonzero(row == stop)
    return int(hits[0]) if len(hits) else None
