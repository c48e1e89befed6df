"""Times `linear_attention` over a sequence cut across the GPUs of one host, beside one device.

    python experiments/scaling_recurrence.py [--devices 1 2] [--kind decay delta] [--implementation hopper]

B1 N16 H128 in bfloat16, T tokens in all, forward and forward + backward: `decay` with the slopes of Lightning
Attention-2, `delta` with a gate and a decay for each token. Each number of devices is first compared with one
at 32768 tokens, outputs and gradients.
"""

import argparse
import functools
import json

import jax
import jax.numpy as jnp
from blockjax.kernels.benching import interleaved
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from blockjax.parallel import linear_attention

N, H = 16, 128
CHECKED = 32768
"""Tokens at which several devices are compared with one."""
TOLERANCE = 1e-2
"""Of outputs and gradients, relative to their norm: both round to bfloat16."""


class Program:
    """T tokens of a kind on the first `devices`, compiled, its arrays in their places."""

    def __init__(self, kind: str, T: int, devices: int, implementation: str | None = None):
        self.devices = devices
        mesh = jax.make_mesh((devices,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:devices])
        place = NamedSharding(mesh, P(None, "seq"))
        slopes = 2.0 ** (-8 * (jnp.arange(N) + 1) / N)

        # Random bits are the same however an array is cut.
        @functools.partial(jax.jit, out_shardings=place)
        def arrays():
            draw = lambda i, *shape: jax.random.normal(jax.random.key(i), (1, T, N, *shape))  # noqa: E731
            q, k, v, do = (draw(i, H).astype(jnp.bfloat16) for i in range(4))
            gates = {}
            if kind == "delta":
                k = (k / jnp.linalg.norm(k.astype(jnp.float32), axis=-1, keepdims=True)).astype(k.dtype)
                gates = dict(beta=jax.nn.sigmoid(draw(4)), log_decay=-slopes * jax.nn.softplus(draw(5)))
            return (q, k, v, gates), do

        def attend(q, k, v, gates):
            fixed = {} if gates else dict(log_decay=-slopes)
            return linear_attention(
                q, k, v, kind=kind, mesh=mesh, implementation=implementation, **gates, **fixed
            )

        def both(inputs, do):
            o, pullback = jax.vjp(attend, *inputs)
            return o, pullback(do)

        self.inputs, self.do = arrays()
        self.forward = jax.jit(attend).lower(*self.inputs).compile()
        self.both = jax.jit(both).lower(self.inputs, self.do).compile()

    def run(self, both: bool):
        return self.both(self.inputs, self.do) if both else self.forward(*self.inputs)


def check(kind: str, T: int, devices: list[int], implementation: str | None) -> None:
    """Raises AssertionError if a number of devices differs from one."""
    one, *others = (jax.device_get(Program(kind, T, n, implementation).run(both=True)) for n in [1, *devices])
    for n, found in zip(devices, others, strict=True):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(one), strict=True):
            a, b = (jnp.asarray(x, jnp.float32) for x in (a, b))
            error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
            if not error <= TOLERANCE:
                raise AssertionError(f"{kind} on {n} devices differs from one by {error:.1e}.")


def main(argv: list[str] | None = None) -> None:
    counts = [n for n in (1, 2, 4, 8) if n <= jax.device_count()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=counts, choices=counts)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--kind", nargs="+", choices=("decay", "delta"), default=["decay", "delta"])
    parser.add_argument("--implementation", help="a backend by name; default the one that the op chooses")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=8, help="a round")
    parser.add_argument("--json", help="also write the numbers to this file")
    args = parser.parse_args(argv)

    console, rows = Console(), []
    table = Table(title=f"linear_attention, T={args.tokens} N{N} H{H}, on {jax.devices()[0].device_kind}: ms")
    for column in ("kind", "devices", "fwd", "x", "fwd+bwd", "x"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind in args.kind:
        with console.status(f"{kind}: comparing with one device"):
            check(kind, min(CHECKED, args.tokens), [n for n in args.devices if n > 1], args.implementation)
        first = None
        for n in args.devices:
            with console.status(f"{kind} on {n}"):
                program = Program(kind, args.tokens, n, args.implementation)
                times = [
                    interleaved(
                        [(functools.partial(program.run, way), jax.block_until_ready)],
                        args.rounds,
                        args.calls,
                    )[0]
                    for way in (False, True)
                ]
            del program  # before the arrays of the next are made
            first = first or times
            rows.append(dict(kind=kind, devices=n, forward_ms=times[0], both_ms=times[1]))
            cells = [x for t, one in zip(times, first, strict=True) for x in (f"{t:.3f}", f"{one / t:.2f}")]
            table.add_row(kind, str(n), *cells, end_section=n == args.devices[-1])
    console.print(table)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"tokens": args.tokens, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
