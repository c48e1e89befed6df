"""Times training steps of a 375M decoder beside compiled PyTorch, on one GPU.

    python experiments/train_speed.py [--case dense] [--batch 4] [--remat matmuls] [--stack scan]
        [--residual prenorm block_attn_res:size=8] [--profile]

The decoder: 24 layers of width 1024, 8 heads of 128, SwiGLU of 2816, 32768 tokens, untied; sequences of 8192
random tokens, float32 parameters, bfloat16 compute, AdamW. `window` gives three of four layers a window of
1024 tokens. The peer is PyTorch's `torch.compile` with cuDNN attention, dense. Each case runs in its own
process, which says how much memory it took; `--profile` also lists what the device spent its time on.
"""

import argparse
import collections
import functools
import itertools
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time

T, LAYERS, WIDTH, HEADS, FFN, VOCAB = 8192, 24, 1024, 8, 2816, 32768
PATTERNS = {"dense": "full", "window": "1024*3,full"}
STEPS, ROUNDS = 5, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--case", nargs="+", default=["torch", *PATTERNS], choices=["torch", *PATTERNS])
    parser.add_argument("--batch", nargs="+", type=int, default=[4], metavar="B")
    parser.add_argument("--remat", nargs="+", default=["matmuls"], help="of ours, see `models.config`")
    parser.add_argument("--stack", nargs="+", default=["unroll"], help="of ours: scan or unroll")
    parser.add_argument(
        "--residual", nargs="+", default=["prenorm"], help="of ours, see docs/depth_attention"
    )
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        case, batch, how = args.one.split(",", 2)
        run = (
            torch_steps if case == "torch" else functools.partial(our_steps, PATTERNS[case], *how.split(" "))
        )
        print(json.dumps(run(int(batch), args.profile)))
        return
    peer = None
    for batch in args.batch:
        for case in args.case:
            ways = itertools.product(args.remat, args.stack, args.residual)
            for how in map(" ".join, [()] if case == "torch" else ways):
                command = [sys.executable, __file__, "--one", f"{case},{batch},{how}"]
                child = subprocess.run(
                    command + ["--profile"] * args.profile, capture_output=True, text=True, check=False
                )
                if child.returncode:
                    print(f"{case} B={batch} {how} failed:\n{child.stderr[-2000:]}", flush=True)
                    continue
                found = json.loads(child.stdout.splitlines()[-1])
                speed = batch * T / found["seconds"]
                peer = speed if case == "torch" else peer
                ratio = f" = {speed / peer:.3f} of PyTorch" if peer else ""
                print(
                    f"{case:7} B={batch} {how:19} {found['seconds'] * 1e3:7.1f} ms/step "
                    f"{speed:9,.0f} tokens/s{ratio}, {found['bytes'] / 2**30:.1f} GiB",
                    flush=True,
                )
                for name, seconds, count in found.get("costs", []):
                    print(f"    {seconds * 1e3:8.2f} ms {count:5d} x {name}", flush=True)


def our_steps(pattern: str, remat: str, stack: str, residual: str, batch: int, profile: bool) -> dict:
    import jax
    import jax.numpy as jnp

    from blockjax.models import TransformerConfig
    from blockjax.parallel.mesh import make_mesh
    from blockjax.train.config import base_config
    from blockjax.train.state import plan_state
    from blockjax.train.step import make_train_step

    model = TransformerConfig(
        **dict(vocab_size=VOCAB, depth=LAYERS, width=WIDTH, heads=HEADS, kv_heads=HEADS, ffn=FFN),
        **dict(head_dim=WIDTH // HEADS, context=T, qk_norm=False, pattern=pattern, residual=residual),
        **dict(remat=remat, stack=stack),
    )
    tokens = jax.random.randint(jax.random.key(0), (batch, T + 1), 0, VOCAB)
    inputs = dict(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        positions=jnp.broadcast_to(jnp.arange(T), (batch, T)),
        segment_ids=jnp.zeros((batch, T), jnp.int32),
    )
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        plan = plan_state(model, base_config(), make_mesh({}, jax.devices()[:1]))
        step = jax.jit(make_train_step(plan.graph, plan.optimizer), donate_argnums=0)
        state = plan.make()

        def run(n: int) -> None:
            nonlocal state
            for _ in range(n):
                state, metrics = step(state, inputs)
            jax.block_until_ready(metrics)

        run(2)
        found = dict(seconds=best(run), bytes=jax.devices()[0].memory_stats()["peak_bytes_in_use"])
        if profile:
            with tempfile.TemporaryDirectory() as folder:
                with jax.profiler.trace(folder):
                    run(1)
                found["costs"] = kernel_costs(folder)
    return found


def best(run) -> float:
    """Seconds a step: the median round of several."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run(STEPS)
        rounds.append((time.perf_counter() - start) / STEPS)
    return sorted(rounds)[len(rounds) // 2]


def kernel_costs(folder: str, most: int = 25) -> list[tuple[str, float, int]]:
    """Device kernels of a trace by their time: name, seconds, number of launches."""
    from jax.profiler import ProfileData

    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    costs = collections.defaultdict(lambda: [0.0, 0])
    for plane in ProfileData.from_file(str(path)).planes:
        if plane.name.startswith("/device:GPU"):
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        cost = costs[re.sub(r"[.\d_]+$", "", event.name)[:90]]
                        cost[0] += event.duration_ns * 1e-9
                        cost[1] += 1
    ranked = sorted(costs.items(), key=lambda item: -item[1][0])[:most]
    return [(name, seconds, count) for name, (seconds, count) in ranked]


def torch_steps(batch: int, profile: bool) -> dict:
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.nn.attention import SDPBackend, sdpa_kernel

    H = WIDTH // HEADS

    def rope(x, cos, sin):
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
            self.out = nn.Linear(WIDTH, WIDTH, bias=False)
            self.gate_up = nn.Linear(WIDTH, 2 * FFN, bias=False)
            self.down = nn.Linear(FFN, WIDTH, bias=False)

        def forward(self, x, cos, sin):
            q, k, v = self.qkv(self.norms[0](x)).view(*x.shape[:2], 3, HEADS, H).unbind(2)
            q, k, v = (a.transpose(1, 2) for a in (rope(q, cos, sin), rope(k, cos, sin), v))
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(o.transpose(1, 2).reshape(x.shape))
            gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
            return x + self.down(F.silu(gate) * up)

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCAB, WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
            self.norm = nn.RMSNorm(WIDTH)
            self.head = nn.Linear(WIDTH, VOCAB, bias=False)
            angle = torch.arange(T)[:, None] * 10_000.0 ** (-torch.arange(0, H, 2) / H)
            self.register_buffer("cos", angle.cos()[None, :, None])
            self.register_buffer("sin", angle.sin()[None, :, None])

        def forward(self, tokens, targets):
            x = self.embedding(tokens)
            for block in self.blocks:
                x = block(x, self.cos, self.sin)
            return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())

    torch.manual_seed(0)
    model = Decoder().cuda()
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(VOCAB, (batch, T + 1), device="cuda")

    def run(n: int) -> None:
        for _ in range(n):
            with torch.autocast("cuda", torch.bfloat16), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                loss = compiled(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()

    run(3)
    found = dict(seconds=best(run), bytes=torch.cuda.max_memory_allocated())
    if profile:
        with torch.profiler.profile() as recorded:
            run(1)
        events = [e for e in recorded.key_averages() if e.device_time_total and not e.cpu_time_total]
        events.sort(key=lambda e: -e.device_time_total)
        found["costs"] = [(e.key[:90], e.device_time_total * 1e-6, e.count) for e in events[:25]]
    return found


if __name__ == "__main__":
    main()
