"""What a run of tokens does to the state, by the kernel that sums pieces: as `xla/summary.py`, which has no
kernels and serves the delta rule and decays a channel here too.

Bytes: keys and values of those chunks that decays do not hide, where XLA reads and weighs all in float32. The
sums of pieces are handed on to the pass, which needs them too.
"""

import jax
from blockjax.kernels.linear_attention import hopper
from blockjax.kernels.linear_attention.spec import Inputs, Options, form
from blockjax.kernels.linear_attention.xla import summary

from blockjax.affine import Affine


def forward(inputs: Inputs, options: Options) -> tuple[Affine, jax.Array | None]:
    """The map of the state, float32, and what `forward_pass` takes as `added`."""
    if not _summed(inputs, options):
        return summary.forward(inputs, options)
    G, inputs, plan = _plan(inputs)
    added = plan.added(*map(hopper.whole, (inputs.k, inputs.v)), plan.cut.pieces)
    return Affine(plan.left()[:, ::G], plan.total(added)[:, ::G]), added


def backward(inputs: Inputs, do: jax.Array, options: Options) -> tuple[jax.Array, jax.Array | None]:
    """The gradient [B, K, Hk, Hv] of the state that enters, if nothing depends on the one that leaves.

    And what `backward_pass` takes as `added`.
    """
    if not _summed(inputs, options):
        return summary.backward(inputs, do, options)
    G, inputs, plan = _plan(inputs)
    q, do = map(hopper.whole, (inputs.q, do))
    added = plan.added(q, do, plan.cut.pieces, reverse=True, write=options.scale)
    total = plan.total(added, reverse=True)
    return total.reshape(total.shape[0], -1, G, *total.shape[2:]).sum(2), added


def _plan(inputs: Inputs):
    from blockjax.kernels.linear_attention.hopper import pieces

    G = hopper.queries(inputs)
    inputs = hopper.a_query(inputs, G)
    return G, inputs, pieces.Plan.of(inputs)


def _summed(inputs: Inputs, options: Options) -> bool:
    return options.kind == "decay" and form(inputs.log_decay) != "channel"
