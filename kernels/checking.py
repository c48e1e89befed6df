"""How far a backend is from the oracle, for the `check.py` of each op.

The criterion, for each output and gradient: the error against the oracle in float32, by norm, is at most
twice that of a peer which computes in the same dtype, plus `ROUNDING`. Kernels are held to plain XLA, and XLA
to the oracle itself. Where a kernel multiplies in bfloat16 what XLA keeps in float32, an op says by how much
that may show.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from blockjax.kernels.platforms import target

ROUNDING = 1e-5


@dataclass(frozen=True)
class Result:
    """Each error as a part of what is allowed; whether a second run was equal bit for bit."""

    parts: dict[str, float]
    repeats: bool

    @property
    def wrong(self) -> list[str]:
        return [name for name, part in self.parts.items() if not part <= 1]

    @property
    def passed(self) -> bool:
        return self.repeats and not self.wrong


def measure(
    call: Callable[[str], Callable],
    name: str,
    peer: str,
    arrays,
    outputs: Sequence[str],
    rounding: Mapping[str, float] = {},
) -> Result:
    """Runs a backend, twice, its peer and the oracle.

    Args:
      call: gives for a backend a function of `arrays`, a tuple, that returns a tuple of arrays.
      outputs: their names.
      rounding: by name what stands in the place of `ROUNDING`.
    """
    ours = _compile(call(name), arrays)
    first, second = (jax.device_get(ours(*arrays)) for _ in range(2))
    repeats = all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))

    theirs = _compile(call(peer), arrays)(*arrays)
    arrays = widen(arrays)
    exact = _compile(call("reference"), arrays)(*arrays)
    parts = {
        output: part_of_allowed(*results, rounding.get(output, ROUNDING))
        for output, *results in zip(outputs, first, theirs, exact, strict=False)
    }
    return Result(parts, repeats)


def widen(tree):
    """With bfloat16 and float16 as float32."""
    narrow = jnp.bfloat16, jnp.float16
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.result_type(x) in narrow else x, tree)


def part_of_allowed(ours, peer, exact, rounding: float = ROUNDING) -> float:
    """The error of `ours` as a part of twice its peer's plus `rounding`: at most 1 if it is close enough."""
    return relative_error(ours, exact) / (2 * relative_error(peer, exact) + rounding)


def relative_error(x, exact) -> float:
    """`||x - exact|| / ||exact||` over what is finite; infinite if they differ in anything else."""
    x, exact = (np.asarray(a, "float64") for a in (x, exact))
    finite = np.isfinite(exact)
    if not np.array_equal(x[~finite], exact[~finite]) or not np.isfinite(x[finite]).all():
        return np.inf
    x, exact = x[finite], exact[finite]
    return float(np.linalg.norm(x - exact) / (np.linalg.norm(exact) or 1))


def _compile(function: Callable, arrays) -> Callable:
    # Products of float32 would be rounded to less on GPUs and TPUs, and tuning them takes minutes.
    wide = all(x.dtype == jnp.float32 for x in jax.tree.leaves(arrays))
    flags = {"xla_gpu_autotune_level": 0} if target().platform == "gpu" else None
    with jax.default_matmul_precision("highest" if wide else None):
        return jax.jit(function).lower(*arrays).compile(flags)
