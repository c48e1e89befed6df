"""Generation: caches, samplers, and the loop over them."""

from blockjax.generate.cache import KVCache
from blockjax.generate.sampler import Sampling, decode, generate, prefill, sample

__all__ = ["KVCache", "Sampling", "decode", "generate", "prefill", "sample"]
