"""Each backend against the oracle, in the forms of decay it serves, at many sizes: `kernels/checking.py`."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from blockjax.kernels.checking import Result
from blockjax.kernels.checking import measure as measure_call
from blockjax.kernels.linear_attention.api import linear_attention

NAMES = "o", "state", "dq", "dk", "dv", "dstate", "dg", "dbeta"
"""Outputs and gradients; the last two where there are such arguments."""
LABELS = "form", "N, K", "Hk, Hv"
"""Of a case, see `Case.labels`."""


class Size(NamedTuple):
    kind: str
    decay: str
    T: int
    N: int
    K: int
    Hk: int
    Hv: int


SIZES = (
    Size("decay", "token", 300, 4, 2, 64, 64),
    Size("delta", "token", 300, 2, 2, 128, 128),
    Size("decay", "head", 1024, 4, 4, 128, 128),
    Size("decay", "none", 1000, 8, 2, 64, 128),
    Size("delta", "none", 200, 4, 2, 64, 128),
    Size("decay", "token", 777, 2, 1, 256, 256),
    Size("delta", "head", 500, 2, 1, 256, 512),
    Size("decay", "channel", 300, 4, 2, 64, 64),
    Size("delta", "channel", 300, 2, 2, 128, 128),
)


class Backend(NamedTuple):
    """What it is held to, in which dtype, the head dims it serves, and see `checking.measure`."""

    peer: str
    dtype: str
    widest: int = 512
    rounding: Mapping[str, float] = {}


# States are float32 and its products bfloat16; tolerances by norm of flash-linear-attention.
HOPPER = dict(state=5e-3, dk=8e-3, dstate=8e-3, dg=2e-2, dbeta=2e-2)
CHECKED = {
    "hopper": Backend("xla", "bfloat16", widest=128, rounding=HOPPER),
    "tpu": Backend("xla", "bfloat16"),
    "xla": Backend("reference", "float32"),
}


class Case(NamedTuple):
    implementation: str
    size: Size

    @property
    def labels(self) -> tuple[str, ...]:
        size = self.size
        return f"{size.kind} {size.decay}", f"{size.N}, {size.K}", f"{size.Hk}, {size.Hv}"


def cases(implementation: str, quick: bool = False) -> list[Case]:
    widest = CHECKED[implementation].widest
    served = [size for size in SIZES if max(size.Hk, size.Hv) <= widest]
    return [Case(implementation, size) for size in served[: 2 if quick else None]]


def measure(case: Case) -> Result:
    held = CHECKED[case.implementation]
    return measure_call(
        functools.partial(call, case), case.implementation, held.peer, make(case), names(case), held.rounding
    )


def names(case: Case) -> tuple[str, ...]:
    there = dict(dg=case.size.decay != "none", dbeta=case.size.kind == "delta")
    return tuple(name for name in NAMES if there.get(name, True))


def make(case: Case):
    """Random arguments, and cotangents of `o` and the last state; two documents a row."""
    (kind, decay, T, N, K, Hk, Hv), rng, B = case.size, np.random.default_rng(0), 2
    dtype = CHECKED[case.implementation].dtype

    def draw(*shape, dtype="float32"):
        return jnp.asarray(rng.normal(size=shape), dtype)

    keys = draw(B, T, K, Hk)
    keys /= jnp.linalg.norm(keys, axis=-1, keepdims=True)
    args = dict(q=draw(B, T, N, Hk, dtype=dtype), k=keys.astype(dtype), v=draw(B, T, K, Hv, dtype=dtype))
    args["initial_state"] = draw(B, K, Hk, Hv)
    if decay != "none":
        shape = dict(head=(K,), token=(B, T, K), channel=(B, T, K, Hk))[decay]
        args["log_decay"] = jnp.asarray(-0.2 * rng.uniform(size=shape), "float32")
    if kind == "delta":
        args["beta"] = jnp.asarray(rng.uniform(size=(B, T, K)), "float32")
    ids = jnp.asarray(np.arange(T) >= np.array([[T // 3], [T // 2]]), jnp.int32)
    return args, ids, (draw(B, T, N, Hv, dtype=dtype), draw(B, K, Hk, Hv))


def call(case: Case, implementation: str) -> Callable:
    """A function of what `make` returns: the outputs and gradients of `names`."""

    def both(args, ids, cotangents):
        def run(args):
            return linear_attention(
                **args, kind=case.size.kind, segment_ids=ids, return_state=True, implementation=implementation
            )

        out, pullback = jax.vjp(run, args)
        (gradients,) = pullback(cotangents)
        order = "q", "k", "v", "initial_state", "log_decay", "beta"
        return *out, *(gradients[name] for name in order if name in gradients)

    return both
