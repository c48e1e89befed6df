"""How kernels of Pallas Mosaic GPU run: some warpgroups of a CTA multiply, and one copies."""

from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from blockjax.kernels.platforms import vary, varying_axes
from jax import lax


def run(kernel: Callable, out, shared, ctas: int, wgs: int, operands):
    """Runs `kernel(operands, *out, shared)` in thread blocks of `wgs` warpgroups and one that copies."""
    out = plgpu.kernel(
        kernel,
        out_type=out,
        scratch_types=[shared],
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=wgs + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )(operands)
    # In a loop whose results are stacked, XLA would fuse the store with a copy of the kernel and run both.
    out = lax.optimization_barrier(out)
    # Inside `shard_map` a kernel's results have the type of something that is equal everywhere.
    axes = varying_axes(operands)
    return jax.tree.map(lambda x: vary(x, axes), out)


def share_out(wg, wgs: int, multiply: Callable, copy: Callable) -> None:
    """Runs `multiply` in the first `wgs` warpgroups, and in the last `copy`, which needs few registers."""

    def multiplying():
        plgpu.set_max_registers(232, action="increase")
        multiply()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def copying():
        plgpu.set_max_registers(40, action="decrease")
        copy()

    pl.when(wg < wgs)(multiplying)
    pl.when(wg == wgs)(copying)
