"""Finds the fastest tiles of `block_sparse_attention` for one shape, on the device at hand.

    python -m blockjax.kernels.block_sparse_attention.tune --T 16384 --N 32 --K 8 --H 128 --mask window:1024

Tries the tiles of one kernel after the other, checks each against the table's, and writes the fastest into
the file that later calls of this kind of shape read (see `tuning.py`). Masks are those of `bench.make_mask`.
"""

import argparse
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
from blockjax.kernels import benching
from blockjax.kernels.block_sparse_attention import api, bench, tuning
from blockjax.kernels.block_sparse_attention.spec import Tiles
from rich.console import Console
from rich.progress import track
from rich.table import Table

from blockjax.errors import UsageError

ROUNDS, CALLS = 5, 8
TOLERANCE = 2e-2
"""Of outputs and gradients in bfloat16, relative to their norm, from one choice of tiles to another."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in dict(B=1, T=16384, N=32, K=8, H=128, block=128).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mask", default="causal")
    parser.add_argument("--implementation", help="default: the fastest that supports the call")
    parser.add_argument("--out", type=pathlib.Path, default=tuning.DEFAULT_PATH)
    args = parser.parse_args(argv)
    try:
        name, key, tiles, times = tune(args, Console())
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None
    entries = json.loads(args.out.read_text()) if args.out.exists() else {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    entries[key] = {**tiles._asdict(), "milliseconds": times, "jax": jax.__version__}
    args.out.write_text(json.dumps(entries, indent=2) + "\n")
    where = "" if args.out == tuning.DEFAULT_PATH else f"; set BLOCKJAX_TUNING={args.out} to use them"
    print(f"{args.out}: {name} with {tiles}{where}")


def tune(args, console: Console):
    """`(backend, key, tiles, milliseconds)` of the fastest tiles."""
    mask = bench.make_mask(args.mask, args.T, args.N, args.block)
    shapes = dict(q=args.N, k=args.K, v=args.K, do=args.N)
    q, k, v, do = (
        jax.random.normal(jax.random.key(i), (args.B, args.T, heads, args.H), args.dtype)
        for i, heads in enumerate(shapes.values())
    )
    spec = api.describe(q, k, v, mask)
    name = api.choose(spec, args.implementation)
    backend = api.BACKENDS[name]
    best = backend.default_tiles(spec)
    if best is None:
        raise UsageError(f"implementation={name!r} has nothing to tune.")

    def compiled(kernel: str, tiles: Tiles):
        def forward(q, k, v, do):
            return api.block_sparse_attention(q, k, v, mask, implementation=name, config=tiles)

        def both(q, k, v, do):
            o, pullback = jax.vjp(lambda *x: forward(*x, do), q, k, v)
            return o, pullback(do)

        return jax.jit(forward if kernel == "forward" else both)

    times = {}
    for kernel in Tiles._fields:
        choices = dict.fromkeys([getattr(best, kernel), *backend.CHOICES[kernel]])
        choices = [x for x in choices if backend.tiles_fit(spec, best._replace(**{kernel: x})) is None]
        table = Table("tiles", "ms", title=f"{name}, {kernel}" + (" (with the rest)" if times else ""))
        runs, refused, expected = {}, {}, None
        for choice in track(choices, f"tuning {kernel}", console=console, transient=True):
            f = compiled(kernel, best._replace(**{kernel: choice}))
            try:
                result = jax.tree.leaves(f(q, k, v, do))
            except Exception as error:  # what a compiler refuses is not a candidate
                refused[choice] = f"refused: {str(error).splitlines()[0][:80]}"
                continue
            expected = result if expected is None else expected
            if all(map(_close, result, expected)):
                runs[choice] = functools.partial(f, q, k, v, do), jax.block_until_ready
            else:
                refused[choice] = "wrong"
        # In turns: a device that has just begun to work is slower, or faster, than later.
        found = dict(zip(runs, benching.interleaved([*runs.values()], ROUNDS, CALLS), strict=True))
        for choice in choices:
            table.add_row("{}x{}".format(*choice), refused.get(choice) or f"{found[choice]:.3f}")
        console.print(table)
        fastest = min(found, key=found.get)
        best, times[kernel] = best._replace(**{kernel: fastest}), round(found[fastest], 4)
    return name, tuning.key(name, spec, mask), best, times


def _close(a, b) -> bool:
    a, b = (x.astype(jnp.float32) for x in (a, b))
    return bool(jnp.linalg.norm((a - b).ravel()) <= TOLERANCE * jnp.linalg.norm(b.ravel()))


if __name__ == "__main__":
    main()
