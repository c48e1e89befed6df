"""One call as the Hopper kernels receive it: what is static, and its operands in global memory."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blockjax.kernels.block_sparse_attention import plan
from blockjax.kernels.block_sparse_attention.hopper import WG_ROWS, splits_keys
from blockjax.kernels.block_sparse_attention.hopper.tiles import LOG2_E, Rows, Scores, Side, Steps
from blockjax.kernels.block_sparse_attention.spec import Inputs

from blockjax.masks.predicates import Predicate


class Mask(NamedTuple):
    """What a kernel asks of a mask beyond its walk."""

    predicates: tuple[Predicate, ...]
    q_offset: Any
    kv_offset: Any


@dataclass(frozen=True)
class Call:
    """The static side.

    `T` counts rows of q, `S` the keys that exist: the rows of k may be more.

    `held` are the query rows of a CTA of the forward and of dQ. `leaves` of the mask are numbers where they
    are known, and None where they are traced.
    """

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    Hv: int
    dtype: Any
    bq: int
    bk: int
    scores: Scores
    held: Rows
    tree: Any
    leaves: tuple[int | None, ...]

    @staticmethod
    def of(inputs: Inputs, scale: float, soft_cap: float | None) -> "Call":
        mask = inputs.mask
        B, T, N, H = inputs.q.shape
        S, (K, Hv) = mask.S, inputs.v.shape[2:]
        leaves, tree = jax.tree.flatten(_mask(inputs))
        return Call(
            **dict(B=B, T=T, S=S, N=N, K=K, H=H, Hv=Hv, dtype=inputs.q.dtype, bq=mask.bq, bk=mask.bk),
            scores=Scores(scale, soft_cap),
            held=Rows.of(mask.bq, 1 if mask.lists_shape[1] == N else N // K),
            tree=tree,
            leaves=tuple(None if isinstance(x, jax.core.Tracer) else int(x) for x in leaves),
        )

    @property
    def split_keys(self) -> bool:
        return splits_keys(self.H, self.Hv)

    @property
    def held_keys(self) -> Rows:
        """The keys of a CTA of dK and dV."""
        return Rows.of(min(self.bk, WG_ROWS) if self.split_keys else self.bk, 1)

    @property
    def G(self) -> int:
        return self.N // self.K

    def mask(self, scalars) -> Mask:
        """The mask inside a kernel, where `scalars` refers to its traced leaves."""
        traced = iter(range(self.leaves.count(None)))
        leaves = [scalars[next(traced)] if x is None else x for x in self.leaves]
        return jax.tree.unflatten(self.tree, leaves)

    def key_limit(self, gathered: int) -> int | None:
        """S where a partial tile may hold keys from S on, which do not exist."""
        return self.S if gathered > 1 or self.S % max(self.bk, 128) else None


class Operands(NamedTuple):
    """Arrays in global memory; references inside a kernel.

    `walk`, `q_side` and `k_side` are as the kernel holds and moves; `order` says which block to start first,
    [b, h, n], or is None where they start in the order of their tokens; `slope` is in units of ln 2 and None
    without a bias.
    """

    q: Any
    k: Any
    v: Any
    walk: plan.Walk
    order: Any
    q_side: Side
    k_side: Side
    scalars: Any
    slope: Any


class LaidCotangents(NamedTuple):
    """As the kernels read them: `lse` in units of ln 2, and +inf where a row sees nothing.

    The last two are `[B, groups, units, 64]` for the rows that dQ holds, and `[B, N, tokens]`, padded as by
    `Steps.pad`, for dK and dV.
    """

    do: Any
    lse: Any
    delta: Any


def operands(call: Call, inputs: Inputs, steps: Steps, transposed: bool = False) -> Operands:
    """Of a kernel that holds queries and moves along keys by `steps`, or if `transposed` the reverse."""
    q_side, k_side = (
        (inputs.q_positions, inputs.q_segment_ids),
        (inputs.kv_positions, inputs.kv_segment_ids),
    )
    slope = None if inputs.slope is None else inputs.slope.astype(jnp.float32) * LOG2_E
    if transposed:
        walk, held, length, block = plan.columns(inputs), call.held_keys, call.S, call.bk
        q_side, k_side = Side.moving(*q_side, steps), Side.held(*k_side, held)
    else:
        walk, held, length, block = plan.rows(inputs), call.held, call.T, call.bq
        q_side, k_side = Side.held(*q_side, held), Side.moving(*k_side, steps)
        if slope is not None:
            slope = held.arrange(jnp.broadcast_to(slope[None, :, None], (1, call.N, held.tokens)))[0, :, 0]
    order = None
    # Where a ragged last block has fewer tiles than others they start in the order of their tokens.
    if isinstance(walk, plan.ListWalk) and (block <= held.cta_tokens or length % block == 0):
        order = plan.longest_first(walk, call.K if transposed else call.N)
    traced = [x for x in jax.tree.leaves(_mask(inputs)) if isinstance(x, jax.core.Tracer)]
    scalars = jnp.stack([jnp.asarray(x, jnp.int32) for x in traced]) if traced else None
    return Operands(inputs.q, inputs.k, inputs.v, walk, order, q_side, k_side, scalars, slope)


def _mask(inputs: Inputs) -> Mask:
    return Mask(inputs.mask.predicates, inputs.mask.q_offset, inputs.mask.kv_offset)
