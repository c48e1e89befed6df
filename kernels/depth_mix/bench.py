"""`depth_mix` beside what a user would call instead, and beside the bytes that it has to move.

    python -m blockjax.kernels.depth_mix.bench [--case NAME ...] [--json out.json]

`mix` cases are one mix of n sources; they first check that outputs and gradients agree with each peer. The
`stack` is the residual stream of a whole decoder under Block AttnRes, with sublayers that return what they
are given. Times are medians over rounds in which all runners take turns, forward and forward + backward.
`of copy` is the time that the bytes alone would take, at the speed of a large copy, as a part of the time:
the arrays of M a token that a pass reads and writes, each once.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from blockjax.kernels.benching import arguments, copy_bandwidth, show_beside_copy
from blockjax.kernels.depth_mix.api import depth_join, depth_mix, depth_read
from blockjax.kernels.depth_mix.peers import PEERS, Runner, jax_runner, missing
from blockjax.kernels.depth_mix.spec import Spec, floor_bytes
from blockjax.kernels.platforms import target

EPS = 1e-6


@dataclass(frozen=True)
class Mix:
    """One mix of n sources [T, M]."""

    T: int
    M: int
    n: int
    dtype: str = "bfloat16"
    peers: tuple[str, ...] = ("fla",)

    def runners(self) -> dict[str, Runner]:
        keys = iter(jax.random.split(jax.random.key(0), self.n + 2))
        *sources, do = (
            jax.random.normal(next(keys), (self.T, self.M), self.dtype) for _ in range(self.n + 1)
        )
        query = (jax.random.normal(next(keys), (self.M,)) / self.M**0.5).astype(self.dtype)
        runners = {"ours": jax_runner(depth_mix, do, tuple(sources), query)}
        for name in self.peers:
            if (reason := missing(name)) is not None:
                print(f"{name} is left out: {reason}")
                continue
            peer = PEERS[name](tuple(sources), query, do)
            self.check(name, runners["ours"], peer)
            runners[name] = peer
        return runners

    def check(self, name: str, ours: Runner, peer: Runner) -> None:
        """Raises if op and peer do not compute the same: their times would mean nothing."""
        tolerance = 1e-3 if self.dtype == "float32" else 2e-2
        for i, (a, b) in enumerate(zip(ours.arrays(ours.both()), peer.arrays(peer.both()), strict=True)):
            error = np.linalg.norm(a - b) / np.linalg.norm(b)
            if not error <= tolerance:
                raise AssertionError(f"{self}: output {i} differs from that of {name} by {error:.1e}.")

    def bytes(self) -> tuple[int, int]:
        sizes = dict(tokens=self.T, M=self.M, heads=1)
        forward, backward = floor_bytes(Spec(target(), jnp.dtype(self.dtype), "read", self.n, 1, **sizes))
        return forward, forward + backward


@dataclass(frozen=True)
class Stack:
    """L sublayers in depth blocks of `size`, with x [T, M], and the mix that an output head reads."""

    T: int
    M: int
    L: int
    size: int
    dtype: str = "bfloat16"

    def runners(self) -> dict[str, Runner]:
        keys = jax.random.split(jax.random.key(0), 3)
        x, do = (jax.random.normal(key, (self.T, self.M), self.dtype) for key in keys[:2])
        queries = jax.random.normal(keys[2], (self.L + 1, self.M)) / self.M**0.5
        return {"ours": jax_runner(self.run, do, x, queries, jnp.ones((self.L, self.M)))}

    def run(self, x, queries, gains):
        sources = [x]
        for start in range(0, self.L, self.size):
            stop = min(start + self.size, self.L)
            read = depth_read(sources, queries[start:stop], unstacked=True)
            partial = update = None
            for i in range(start, stop):
                o, lse = read.o[i - start], read.lse[i - start]
                if update is None:
                    update = _rms_norm(o, gains[i])
                    continue
                if partial is None:
                    partial, update = update, None
                partial, update, _ = depth_join(partial, update, o, lse, queries[i], norm_gain=gains[i])
            sources.append(update if partial is None else partial + update)
        return depth_mix(sources, queries[-1])

    def bytes(self) -> tuple[int, int]:
        """Reads, joins, the norm of each block's first sublayer and the sum at its end; the gradient of a
        source, of which each of its readers forms a part, is read once more by all but the first."""
        forward, backward = 0, 0
        blocks = -(-self.L // self.size)
        for b in range(blocks):
            sublayers = min(self.size, self.L - b * self.size)
            # Of one source, what is read is the source itself.
            ops = [("read", b + 1, sublayers, False), *[("join", 1, 1, i > 0) for i in range(sublayers - 1)]]
            for op, n, R, update in [*ops]:
                f, g = self._floor(op, n, R, update)
                forward += f - (R * self._tensor if n == 1 and op == "read" else 0)
                backward += g
            forward += (2 + 3 * (sublayers > 1)) * self._tensor
            backward += 3 * self._tensor
        f, g = self._floor("read", blocks + 1, 1, False)
        summed = blocks * (blocks + 1) // 2 * self._tensor
        return forward + f, forward + f + backward + g + summed

    @property
    def _tensor(self) -> int:
        return self.T * self.M * jnp.dtype(self.dtype).itemsize

    def _floor(self, op, n, R, update):
        sizes = dict(tokens=self.T, M=self.M, heads=1, update=update)
        return floor_bytes(Spec(target(), jnp.dtype(self.dtype), op, n, R, **sizes))


def _rms_norm(h, gain):
    wide = h.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + EPS) * gain).astype(h.dtype)


CASES = {
    "cpu": {
        "mix": Mix(T=2048, M=1024, n=8, dtype="float32", peers=("xla",)),
        "stack": Stack(T=1024, M=512, L=16, size=4, dtype="float32"),
    },
    "gpu": {
        "mix-8": Mix(T=16384, M=4096, n=8),
        "mix-16": Mix(T=16384, M=4096, n=16),
        "mix-narrow": Mix(T=65536, M=2048, n=8),
        "stack": Stack(T=65536, M=2048, L=32, size=8),
    },
}
"""By platform."""


def main(argv: list[str] | None = None) -> None:
    parser, cases = arguments(__doc__, CASES)
    args = parser.parse_args(argv)
    bandwidth = copy_bandwidth(target()[0], args.rounds, args.calls)
    show_beside_copy("depth_mix", args, cases, bandwidth, lambda case: case.runners())


if __name__ == "__main__":
    main()
