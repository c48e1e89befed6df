"""Times training steps of the models of `configs/recurrence.py`, one at a time, on one GPU.

    python experiments/recurrence_speed.py [--config configs/recurrence.py:30m] [--kind dense brt]
        [--json out.json]

Random tokens, one document a row. Each kind runs in its own process, which says how much memory it took; all
compile side by side, and take turns at the clock.
"""

import argparse
import fcntl
import json
import pathlib
import subprocess
import sys
import time

KINDS = ("dense", "window", "brt", "lightning", "gdn", "hybrid")
STEPS, ROUNDS = 4, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default="configs/recurrence.py:30m")
    parser.add_argument("--kind", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--turn", default="/tmp/recurrence_speed.lock", help="whoever holds it uses the GPU")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(f"{args.config},kind={args.one}", args.turn)))
        return
    command = [sys.executable, __file__, "--config", args.config, "--turn", args.turn, "--one"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = {kind: subprocess.Popen([*command, kind], **pipes) for kind in args.kind}
    rows = []
    for kind, child in children.items():
        out, err = child.communicate()
        if child.returncode:
            print(f"{kind} failed:\n{err[-2000:]}", flush=True)
            continue
        rows.append({"kind": kind} | json.loads(out.splitlines()[-1]))
        print(
            "{kind:10} {ms:8.1f} ms a step {tokens:10,.0f} tokens/s {gib:6.2f} GiB".format(**rows[-1]),
            flush=True,
        )
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))


def measure(spec: str, turn: str) -> dict:
    """Median milliseconds of a step, tokens a second, and the most memory that was in use."""
    import jax
    import numpy as np

    from blockjax.parallel.mesh import make_mesh
    from blockjax.train.config import check, load_config
    from blockjax.train.state import plan_state
    from blockjax.train.step import batch_keys, lower_train_step, make_dial

    config = load_config(spec)
    model, mesh = check(config), make_mesh({}, jax.devices()[:1])
    B, T = config.data.batch_size, config.data.seq_len
    tokens = np.random.default_rng(0).integers(0, 256, (B, T + 1), np.int32)
    zeros = np.zeros((B, T), np.int32)
    batch = dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], segment_ids=zeros, starts=zeros > 0)
    batch["positions"] = zeros + np.arange(T, dtype=np.int32)
    with jax.set_mesh(mesh):
        plan = plan_state(model, config, mesh)
        step = lower_train_step(plan, config, mesh, make_dial(model, 0)).compile()
        batch = {key: jax.device_put(batch[key]) for key in batch_keys(config)}
        with open(turn, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            state, seconds = plan.make(), []
            for _ in range(1 + ROUNDS):
                begin = time.perf_counter()
                for _ in range(STEPS):
                    state, metrics = step(state, batch)
                jax.block_until_ready(metrics)
                seconds.append((time.perf_counter() - begin) / STEPS)
    best = sorted(seconds[1:])[ROUNDS // 2]
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return dict(ms=best * 1e3, tokens=B * T / best, gib=peak / 2**30, params=model.num_params())


if __name__ == "__main__":
    main()
