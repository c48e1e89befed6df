"""`linear_attention` beside what a user would call instead, and beside the bytes that it has to move.

    python -m blockjax.kernels.linear_attention.bench [--case NAME ...] [--implementation NAME]

Each case first checks that outputs and gradients agree with each peer. Times are medians over rounds in which
all runners take turns, forward and forward + backward. `of copy` is the time that the bytes alone would take,
at the speed of a large copy, as a part of the time: q, k, v, o and their gradients, each once; the backward
reads q, k, v and do again.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from blockjax.kernels.benching import arguments, copy_bandwidth, show_beside_copy
from blockjax.kernels.linear_attention.peers import PEERS, Arrays, Runner, missing, ours
from blockjax.kernels.platforms import target


@jax.jit
def _distance(a, b):
    """`||a - b|| / ||b||`, on the device."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.linalg.norm(a - b) / jnp.linalg.norm(b)


@dataclass(frozen=True)
class Case:
    """One shape with N heads of H channels; `decay` is "none", "head" or "token", the latter for delta."""

    B: int
    T: int
    N: int
    H: int
    decay: str = "head"
    kind: str = "decay"
    dtype: str = "bfloat16"
    peers: tuple[str, ...] = ("jla", "fla")

    @property
    def gates(self) -> tuple[str, ...]:
        """Those of tokens, sorted."""
        given = dict(beta=self.kind == "delta", log_decay=self.decay == "token")
        return tuple(name for name, there in given.items() if there)

    def arrays(self) -> Arrays:
        *keys, key = jax.random.split(jax.random.key(0), 5)
        shape = self.B, self.T, self.N, self.H
        q, k, v, do = (jax.random.normal(key, shape, self.dtype) for key in keys)
        # The slopes of Lightning Attention-2 in the first layer, and as much for each token on average.
        slopes = 2.0 ** (-8 * (jnp.arange(self.N) + 1) / self.N)
        fixed = dict(log_decay=-slopes) if self.decay == "head" else {}
        gates = {}
        if self.decay == "token":
            gates["log_decay"] = -slopes * jax.random.exponential(key, shape[:3])
        if self.kind == "delta":
            k = (k / jnp.linalg.norm(k.astype(jnp.float32), axis=-1, keepdims=True)).astype(self.dtype)
            gates["beta"] = jax.random.uniform(jax.random.fold_in(key, 1), shape[:3])
        return Arrays(self.kind, q, k, v, do, fixed, gates)

    def runners(self, implementation: str | None) -> dict[str, Runner]:
        arrays = self.arrays()
        runners = {"ours": ours(arrays, implementation)}
        for name in self.peers:
            if (reason := missing(name)) is not None:
                print(f"{name} is left out: {reason}")
                continue
            peer = PEERS[name](arrays)
            self.check(name, runners["ours"], peer)
            runners[name] = peer
        return runners

    def check(self, name: str, ours: Runner, peer: Runner) -> None:
        """Raises if op and peer do not compute the same: their times would mean nothing."""
        tolerance = 1e-3 if self.dtype == "float32" else 2e-2
        names = "o", "dq", "dk", "dv", *(f"d{gate}" for gate in self.gates)
        results = ours.arrays(ours.both()), peer.arrays(peer.both())
        for what, a, b in zip(names, *results, strict=True):
            error = _distance(a, b)
            if not error <= tolerance:
                raise AssertionError(f"{self}: {what} differs from that of {name} by {error:.1e}.")

    def bytes(self) -> tuple[int, int]:
        """Forward, and forward + backward."""
        tensor = self.B * self.T * self.N * self.H * jnp.dtype(self.dtype).itemsize
        gates = self.B * self.T * self.N * 4 * len(self.gates)
        return 4 * tensor + gates, 11 * tensor + 3 * gates


_gpu = functools.partial(Case, B=1, N=16, H=128)
LENGTHS = {"8k": 8192, "32k": 32768, "128k": 131072}
CASES = {
    "cpu": {
        "head": Case(B=1, T=2048, N=4, H=64, dtype="float32", peers=("xla",)),
        "token": Case(B=1, T=2048, N=4, H=64, decay="token", dtype="float32", peers=("xla",)),
        "delta": Case(B=1, T=512, N=4, H=64, decay="token", kind="delta", dtype="float32", peers=("xla",)),
    },
    "gpu": {
        **{f"head-{name}": _gpu(T=T) for name, T in LENGTHS.items()},
        "head-512k": _gpu(T=524288, peers=()),
        "head-batch": _gpu(B=4, T=4096),
        "token-32k": _gpu(T=32768, decay="token"),
        "none-32k": _gpu(T=32768, decay="none"),
        "delta-32k": _gpu(T=32768, decay="token", kind="delta", peers=("jla",)),
    },
}
"""By platform."""


def main(argv: list[str] | None = None) -> None:
    parser, cases = arguments(__doc__, CASES)
    parser.add_argument("--implementation", help="a backend by name; default the one that the op chooses")
    args = parser.parse_args(argv)
    bandwidth = copy_bandwidth(target()[0], args.rounds, args.calls)
    show_beside_copy(
        "linear_attention", args, cases, bandwidth, lambda case: case.runners(args.implementation)
    )


if __name__ == "__main__":
    main()
