"""How the benchmarks of all ops take time: `bench.py` of each op says what is compared."""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp


def interleaved(runs: list[tuple[Callable, Callable]], rounds: int, calls: int = 1) -> list[float]:
    """Median milliseconds of each (start, wait): in each round, `calls` starts in a row and one wait."""
    times = [[] for _ in runs]
    for _ in range(rounds + 1):
        for (start, wait), taken in zip(runs, times, strict=True):
            begin = time.perf_counter()
            for _ in range(calls):
                out = start()
            wait(out)
            taken.append(1e3 * (time.perf_counter() - begin) / calls)
    return [statistics.median(taken[1:]) for taken in times]


def copy_bandwidth(platform: str, rounds: int, calls: int) -> float:
    """Bytes a second of a large elementwise pass, counting what it reads and what it writes."""
    x = jnp.ones((1 << 30 if platform == "gpu" else 1 << 26) // 4, jnp.float32)
    run = jax.jit(lambda x: x + 1)
    (ms,) = interleaved([(lambda: run(x), jax.block_until_ready)], rounds, calls)
    return 2 * x.nbytes / ms * 1e3
