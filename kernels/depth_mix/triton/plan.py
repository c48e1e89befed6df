"""How the work of each kernel is cut. The numbers are the fastest of some that were timed on an H100."""

from dataclasses import dataclass, replace

import jax
from blockjax.kernels.depth_mix.spec import JoinOptions, ReadOptions

HELD = 64 << 10
"""Bytes of sources that a program keeps in registers from one look to the next."""

CARRIED = 64
"""Elements of a tile for each thread, over all sources: registers for twice as many would leave one program
on a multiprocessor."""

SUMS = 72
"""Sums over a row, one a query and source, that a warp keeps while it goes over the columns."""

SHARED_MEMORY = {"8.0": 163, "8.6": 99, "8.7": 163, "8.9": 99, "12.0": 99, "12.1": 99}
"""KiB that a program may use, by compute capability; others have 227."""


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
      BC: columns of a tile, in kernels that do not take whole rows.
      pieces: of BC columns, if each has programs of its own.
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
    warps: int = 1
    stages: int = 1
    BC: int = 1
    pieces: int = 0

    @property
    def grid(self) -> tuple[int, ...]:
        return (self.pieces, self.programs) if self.pieces else (self.programs,)

    @property
    def width(self) -> int:
        """Elements of a row that a thread has."""
        return max(1, self.HP * self.DP // (32 * self.warps))

    def spread(self, width: int) -> "Sizes":
        """With as many warps as give each thread `width` elements of a row, if that many there may be."""
        return replace(self, warps=min(16, max(1, self.HP * self.DP // (32 * width))))

    def pipelined(self, stages: int, row_bytes: int) -> "Sizes":
        """In at most so many stages, of which all but one wait in shared memory."""
        capability = getattr(jax.devices()[0], "compute_capability", "")
        room = (SHARED_MEMORY.get(capability, 227) - 8) << 10
        return replace(self, stages=max(1, min(stages, 1 + room // row_bytes)))


def read_forward(rows: tuple[jax.Array, ...], R: int, options: ReadOptions) -> Sizes:
    """One query: two sources at a time, which leaves room for more programs. Several: all, or nearly so."""
    sizes = _sizes(rows, R, options)
    if R == 1:
        return replace(sizes, group=2).spread(16)
    sizes = sizes.spread(next((width for width in (16, 8) if width * sizes.n <= CARRIED), 4))
    return replace(sizes, group=max(1, CARRIED // sizes.width))


def forward_queries(rows: tuple[jax.Array, ...], R: int, options: ReadOptions) -> int:
    """How many of R one launch can serve: where sources come in several groups, means are carried between."""
    sizes = read_forward(rows, R, options)
    return R if sizes.n <= sizes.group else max(1, CARRIED // 2 // sizes.width)


def backward_queries(n: int) -> int:
    """How many one launch can serve, for n sources."""
    return max(1, SUMS // n)


def read_backward(rows: tuple[jax.Array, ...], options: ReadOptions) -> Sizes:
    """For one query."""
    row = rows[0].shape[1] * rows[0].dtype.itemsize
    sizes = replace(_sizes(rows, 1, options), programs=min(len(rows[0]), multiprocessors()))
    held = len(rows) * row <= HELD
    sizes = sizes.spread(16) if held else replace(sizes, group=1).spread(8)
    # Sources, the cotangent, and the mean where it is read.
    return sizes.pipelined(2, (len(rows) + 2 - held) * sizes.HP * sizes.DP * rows[0].dtype.itemsize)


def logit_gradients(rows: tuple[jax.Array, ...], R: int, options: ReadOptions) -> Sizes:
    sizes = _sizes(rows, R, options)
    return replace(sizes, BC=min(256, max(8, sizes.DP)))


def source_gradients(rows: tuple[jax.Array, ...], R: int, options: ReadOptions) -> Sizes:
    sizes = _sizes(rows, R, options)
    BC = min(512, sizes.DP)
    pieces = sizes.heads * -(-sizes.D // BC)
    programs = max(1, min(sizes.T, 4 * multiprocessors() // pieces))
    return replace(sizes, BC=BC, pieces=pieces, programs=programs, warps=max(1, BC // 128))


def join_forward(row: jax.Array, options: JoinOptions) -> Sizes:
    return _sizes((row,), 1, options).spread(16)


def join_backward(row: jax.Array, options: JoinOptions) -> Sizes:
    sizes = replace(_sizes((row,), 1, options), programs=min(len(row), 2 * multiprocessors())).spread(8)
    # Running sum, mean and two cotangents; programs of a multiprocessor share its memory.
    return sizes.pipelined(3, 2 * 4 * sizes.HP * sizes.DP * row.dtype.itemsize)


def multiprocessors() -> int:
    """Of the GPU at hand; of an H100 where there is none and programs are only compiled."""
    return getattr(jax.devices()[0], "core_count", 132)


def _sizes(rows: tuple[jax.Array, ...], R: int, options) -> Sizes:
    (T, M), heads = rows[0].shape, options.heads
    return Sizes(
        **dict(n=len(rows), R=R, T=T, M=M, heads=heads, D=M // heads),
        **dict(HP=_power(heads), DP=_power(M // heads), group=len(rows), programs=T),
        unstacked=getattr(options, "unstacked", True),
    )


def _power(x: int) -> int:
    """The next power of two."""
    return 1 << (x - 1).bit_length()
