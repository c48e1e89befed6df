"""`block_sparse_attention` beside what a user would call instead, in one process on the device at hand.

    python -m blockjax.kernels.block_sparse_attention.bench [--case NAME ...] [--json out.json]

Each case first checks that outputs and gradients agree with each peer, then times forward and forward +
backward: the median over rounds in which peers and op take turns, so that all see the same machine. Rates
count visible pairs only: 4 H FLOPs forward and 14 H forward + backward, a pair and head.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from blockjax.kernels.benching import arguments, compare, show
from blockjax.kernels.block_sparse_attention import block_sparse_attention
from blockjax.kernels.block_sparse_attention.peers import PEERS, Runner, jax_runner, missing
from blockjax.kernels.platforms import target

from blockjax.errors import UsageError
from blockjax.masks import BlockMask, Causal


def make_mask(text: str, T: int, N: int, block: int) -> BlockMask:
    """`causal`, `window:LEFT`, or lists of blocks below the diagonal of each head: `random:DENSITY`."""
    form, _, number = text.partition(":")
    sizes = dict(bq=block, bk=block)
    if form == "causal":
        return BlockMask.causal(T, **sizes)
    if form == "window" and number.isdigit():
        return BlockMask.window(T, left=int(number), **sizes)
    if form == "random" and number:
        n = -(-T // block)
        listed = np.tril(np.random.default_rng(0).random((N, n, n)) < float(number)) | np.eye(n, dtype=bool)
        return BlockMask.from_block_bool(listed, T, T, **sizes, predicate=Causal())
    raise UsageError(f"The mask {text!r} must be causal, window:LEFT or random:DENSITY.")


def top_k_mask(scores: jax.Array, density: float, block: int) -> BlockMask:
    """The best blocks of each head and row by `scores` [N, n, n], on and below the diagonal; inside jit."""
    _, n, _ = scores.shape
    i = jnp.arange(n)
    scores = jnp.where(i[:, None] >= i, scores, -jnp.inf).at[:, i, i].set(jnp.inf)
    counts = jnp.ceil(density * (i + 1)).astype(jnp.int32)
    _, index = jax.lax.top_k(scores, int(np.ceil(density * n)))
    return BlockMask.from_indices(
        index, jnp.broadcast_to(counts, index.shape[:2]), bq=block, bk=block, predicate=Causal()
    )


@dataclass(frozen=True)
class Case:
    """One shape; `documents` a row are segments; `mask` as in `make_mask`, or `top_k:DENSITY`."""

    B: int
    T: int
    N: int
    K: int
    H: int
    mask: str = "causal"
    peers: tuple[str, ...] = ("xla",)
    documents: int = 1
    block: int = 128
    dtype: str = "float32"

    def segments(self):
        if self.documents == 1:
            return None
        starts = np.random.default_rng(0).random((self.B, self.T)) < (self.documents - 1) / self.T
        return jnp.asarray(np.cumsum(starts, 1), jnp.int32)

    def scores(self):
        """Of blocks, where lists are built in each call; else None."""
        n = self.T // self.block
        is_top_k = self.mask.startswith("top_k")
        return jax.random.uniform(jax.random.key(1), (self.N, n, n)) if is_top_k else None

    def build(self, scores) -> BlockMask:
        if scores is None:
            return make_mask(self.mask, self.T, self.N, self.block)
        return top_k_mask(scores, float(self.mask.partition(":")[2]), self.block)


_gpu = functools.partial(Case, B=1, N=32, K=8, H=128, dtype="bfloat16", peers=("cudnn",))
LENGTHS = {"16k": 16384, "32k": 32768}
CASES = {
    "cpu": {
        "window": Case(B=1, T=4096, N=4, K=4, H=64, mask="window:512"),
        "window-gqa": Case(B=1, T=4096, N=8, K=2, H=64, mask="window:512"),
        "causal": Case(B=1, T=4096, N=4, K=4, H=64),
        "train-64": Case(B=16, T=512, N=4, K=4, H=64, documents=4),
        "train-32": Case(B=32, T=512, N=4, K=4, H=32, documents=4),
    },
    "gpu": {
        f"{name}-{length}": make(T=T)
        for name, make in {
            "causal": _gpu,
            "causal-h64": functools.partial(_gpu, H=64),
            "causal-h256": functools.partial(_gpu, H=256),
            "window": functools.partial(_gpu, mask="window:1024", peers=("cudnn", "flex")),
            "random": functools.partial(_gpu, mask="random:0.13", peers=("flex",)),
            "top_k": functools.partial(_gpu, mask="top_k:0.13", peers=("flex",)),
        }.items()
        for length, T in LENGTHS.items()
    },
}
"""By platform; a TPU has those of a CPU."""


def measure(case: Case, rounds: int, calls: int) -> dict:
    """Milliseconds and TFLOP/s of op and peers, and the pairs that a head sees and executes."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (case.N, case.K, case.K, case.N)
    arrays = [
        jax.random.normal(key, (case.B, case.T, n, case.H), case.dtype)
        for key, n in zip(keys, heads, strict=True)
    ]
    segments, scores = case.segments(), case.scores()
    mask = case.build(None) if scores is None else jax.device_get(jax.jit(case.build)(scores))

    def attend(q, k, v, *scores):
        inside = case.build(*scores) if scores else mask
        return block_sparse_attention(q, k, v, inside, q_segment_ids=segments)

    runners = {"ours": jax_runner(attend, arrays if scores is None else [*arrays, scores])}
    for name in case.peers:
        if (reason := missing(name)) is not None:
            print(f"{name} is left out: {reason}")
            continue
        peer = PEERS[name](mask, segments, arrays)
        try:
            check(case, name, runners["ours"], peer)
        except (ValueError, RuntimeError) as error:
            print(f"{name} is left out: {str(error).splitlines()[0]}")
            continue
        runners[name] = peer
    runs = compare(runners, rounds, calls)
    flops = 4 * case.B * case.N * case.H * float(mask.visible_pairs())
    for run in runs.values():
        for way, count in (("fwd", flops), ("fwd_bwd", 3.5 * flops)):
            run[f"{way}_tflops"] = count / run[f"{way}_ms"] * 1e-9
    return {
        "visible_pairs": float(mask.visible_pairs()),
        "executed_pairs": float(mask.executed_pairs()),
        "runs": runs,
    }


def check(case: Case, name: str, ours: Runner, peer: Runner) -> None:
    """Raises if op and peer do not compute the same: their times would mean nothing."""
    tolerance = 1e-3 if case.dtype == "float32" else 2e-2
    pairs = zip(ours.arrays(ours.both()), peer.arrays(peer.both()), ("o", "dq", "dk", "dv"), strict=True)
    for a, b, what in pairs:
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        if not error <= tolerance:
            raise AssertionError(f"{case}: {what} differs from that of {name} by {error:.1e}.")


def main(argv: list[str] | None = None) -> None:
    parser, cases = arguments(__doc__, CASES)
    args = parser.parse_args(argv)
    show(
        args,
        cases,
        lambda case: measure(case, args.rounds, args.calls),
        f"block_sparse_attention on {target()[1]}: milliseconds, and times as fast as each peer",
        ("TFLOP/s", lambda result, run, way: f"{run[f'{way}_tflops']:.3g}"),
        jax=jax.__version__,
    )


if __name__ == "__main__":
    main()
