"""How the work of each kernel is cut: warps of a program, rows it holds, programs."""

from dataclasses import dataclass

import jax
from blockjax.kernels.depth_mix.spec import JoinOptions, ReadOptions


@dataclass(frozen=True)
class Sizes:
    """What a kernel is compiled for.

    Attributes:
      n, R, T, M, heads: as in `spec.Spec`, T being its tokens.
      D, HP, DP: width of a head; heads and D, padded to powers of two.
      unstacked: whether R arrays, or one stacked array, hold the means.
      group: sources whose rows are held at the same time.
      programs: each takes every programs-th token.
      warps: of a program.
      stages: of the software pipeline over tokens; 1 for none.
    """

    n: int
    R: int
    T: int
    M: int
    heads: int
    D: int
    HP: int
    DP: int
    unstacked: bool
    group: int
    programs: int
    warps: int
    stages: int
    eps: float
    norm_eps: float


def read_forward(n: int, R: int, T: int, M: int, options: ReadOptions) -> Sizes:
    return _sizes(n, R, T, M, options, group=min(n, 8), programs=T, width=16)


def read_backward(n: int, R: int, T: int, M: int, options: ReadOptions) -> tuple[Sizes, list[slice]]:
    sizes = _sizes(n, R, T, M, options, group=n, programs=min(T, 2 * multiprocessors()), width=8)
    return sizes, [slice(0, R)]


def join_forward(T: int, M: int, options: JoinOptions) -> Sizes:
    return _sizes(1, 1, T, M, options, group=1, programs=T, width=16)


def join_backward(T: int, M: int, options: JoinOptions) -> Sizes:
    return _sizes(1, 1, T, M, options, group=1, programs=min(T, 4 * multiprocessors()), width=8)


def multiprocessors() -> int:
    """Of the GPU at hand; of an H100 where there is none and programs are only compiled."""
    return getattr(jax.devices()[0], "core_count", 132)


def _sizes(n, R, T, M, options, *, group, programs, width, stages=1) -> Sizes:
    """`width`: elements of a row for each thread."""
    heads = options.heads
    padded = _power(heads) * _power(M // heads)
    return Sizes(
        **dict(n=n, R=R, T=T, M=M, heads=heads, D=M // heads, HP=_power(heads), DP=_power(M // heads)),
        **dict(unstacked=getattr(options, "unstacked", True), group=group, programs=programs),
        **dict(warps=min(16, max(1, padded // (32 * width))), stages=stages),
        **dict(eps=options.eps, norm_eps=getattr(options, "norm_eps", 0.0)),
    )


def _power(x: int) -> int:
    """The next power of two."""
    return 1 << (x - 1).bit_length()
