"""`block_sparse_attention` beside dense XLA attention, in one process on the device at hand.

    python -m blockjax.kernels.block_sparse_attention.bench [--case NAME ...] [--json out.json]

Each case first checks that outputs and gradients agree with the peer, then times forward and forward +
backward: the median over rounds in which peer and op take turns, so that both see the same machine.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from blockjax.kernels.block_sparse_attention import block_sparse_attention
from rich.console import Console
from rich.table import Table

from blockjax.masks import BlockMask


@dataclass(frozen=True)
class Case:
    """One shape; `window` counts the query itself, None is causal; `documents` a row are segments."""

    B: int
    T: int
    N: int
    K: int
    H: int
    window: int | None = None
    documents: int = 1
    block: int = 128
    dtype: str = "float32"

    def mask(self) -> BlockMask:
        if self.window is None:
            return BlockMask.causal(self.T, bq=self.block, bk=self.block)
        return BlockMask.window(self.T, left=self.window, bq=self.block, bk=self.block)

    def segments(self):
        if self.documents == 1:
            return None
        starts = np.random.default_rng(0).random((self.B, self.T)) < (self.documents - 1) / self.T
        return jnp.asarray(np.cumsum(starts, 1), jnp.int32)


CASES = {
    "window": Case(B=1, T=4096, N=4, K=4, H=64, window=512),
    "window-gqa": Case(B=1, T=4096, N=8, K=2, H=64, window=512),
    "causal": Case(B=1, T=4096, N=4, K=4, H=64),
    "train-64": Case(B=16, T=512, N=4, K=4, H=64, documents=4),
    "train-32": Case(B=32, T=512, N=4, K=4, H=32, documents=4),
}


def dense(case: Case, segments):
    """The peer: `jax.nn.dot_product_attention`, with the window built in and a mask only for segments."""
    window = None if case.window is None else (case.window - 1, 0)
    mask = None if segments is None else (segments[:, None, :, None] == segments[:, None, None, :])

    def attend(q, k, v):
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=True, local_window_size=window, implementation="xla"
        )

    return attend


def measure(case: Case, rounds: int) -> dict:
    """Milliseconds of peer and op, their ratios, and the pairs a head sees and executes."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (case.N, case.K, case.K, case.N)
    q, k, v, do = (
        jax.random.normal(key, (case.B, case.T, n, case.H), case.dtype)
        for key, n in zip(keys, heads, strict=True)
    )
    mask, segments = case.mask(), case.segments()

    def sparse(q, k, v):
        return block_sparse_attention(q, k, v, mask, q_segment_ids=segments)

    def both_ways(attend):
        def loss(q, k, v):
            return jnp.sum(attend(q, k, v).astype(jnp.float32) * do)

        return jax.jit(attend), jax.jit(jax.value_and_grad(loss, (0, 1, 2)))

    (dense_fwd, dense_both), (sparse_fwd, sparse_both) = both_ways(dense(case, segments)), both_ways(sparse)
    error = max(
        float(jnp.abs(a - b).max())
        for a, b in zip(dense_both(q, k, v)[1], sparse_both(q, k, v)[1], strict=True)
    )
    error = max(error, float(jnp.abs(dense_fwd(q, k, v) - sparse_fwd(q, k, v)).max()))
    if error > 1e-3 * case.T**0.5:
        raise AssertionError(
            f"{case} disagrees with dense attention by {error:.1e}; its timing means nothing."
        )
    times = interleaved([dense_fwd, sparse_fwd, dense_both, sparse_both], (q, k, v), rounds)
    return {
        "dense_fwd_ms": times[0],
        "fwd_ms": times[1],
        "fwd_ratio": times[0] / times[1],
        "dense_fwd_bwd_ms": times[2],
        "fwd_bwd_ms": times[3],
        "fwd_bwd_ratio": times[2] / times[3],
        "visible_pairs": mask.visible_pairs(),
        "executed_pairs": float(mask.executed_pairs()),
        "error": error,
    }


def interleaved(functions, args, rounds: int) -> list[float]:
    """Median milliseconds of each compiled function, called in turn."""
    times = [[] for _ in functions]
    for _ in range(rounds + 1):
        for f, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(f(*args))
            taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken[1:]) for taken in times]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--json", help="also write the numbers to this file")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)

    device = jax.devices()[0].device_kind
    table = Table(title=f"block_sparse_attention and dense XLA attention on {device}, milliseconds")
    columns = (
        "case",
        "dense fwd",
        "fwd",
        "ratio",
        "dense fwd+bwd",
        "fwd+bwd",
        "ratio",
        "visible",
        "executed",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "case" else "right")
    results = {}
    for name in args.case:
        r = results[name] = measure(CASES[name], args.rounds)
        ms = [f"{r[x]:.1f}" for x in ("dense_fwd_ms", "fwd_ms", "dense_fwd_bwd_ms", "fwd_bwd_ms")]
        ratios = [f"{r[x]:.2f}x" for x in ("fwd_ratio", "fwd_bwd_ratio")]
        pairs = [f"{r[x]:.3g}" for x in ("visible_pairs", "executed_pairs")]
        table.add_row(name, ms[0], ms[1], ratios[0], ms[2], ms[3], ratios[1], *pairs)
    Console().print(table)
    if args.json:
        cases = {name: {**vars(CASES[name]), **r} for name, r in results.items()}
        with open(args.json, "w") as file:
            json.dump({"device": device, "jax": jax.__version__, "cases": cases}, file, indent=2)


if __name__ == "__main__":
    main()
