"""Progressive locality: how far each layer sees, as a schedule over depth.

Question:  does it matter where in the stack attention is local, or only how local it is on average?
Command:   python experiments/sweep.py --config=configs/locality.py:small --sweep=runs/locality
           python experiments/train.py --config=configs/locality.py:125m,beta=5 --run=runs/beta5
Arguments: a size (125m); `beta` of the schedule (5); `mode`: window, segment or bias; `small`: 8 layers
           on the Python standard library as bytes; `runlocal`
Sweep:     dense; for beta 1, 3 and 5: local late, reversed (local early), and its mean locality in every
           layer, since a steep schedule is also one that constrains little. Three seeds
Hardware:  one GPU or TPU, or many; `small`: two CPU cores (about 10 minutes a run) or any GPU
Score:     see experiments/LOG.md
Source:    windows that change with depth: arXiv:2004.05150 (local early), arXiv:2501.01039; which
           direction is better is contested
"""

from blockjax.arguments import parse_arg
from blockjax.locality import Locality
from blockjax.train.config import base_config, runlocal, small

BETAS = (1, 3, 5)


def get_config(arg=None):
    arg = parse_arg(arg, size="125m", beta=5.0, mode="window", small=False, runlocal=False)
    config = base_config("nano" if arg.small else arg.size)
    config.model.attention_block = 512
    config.data.update(seq_len=8192, batch_size=16)
    config.optimizer.update(schedule="stable_decay", warmup_steps=500, final_scale=0.0, z_loss=1e-4)
    config.run.update(steps=20_000, remat="dots", eval_every=1000, checkpoint_every=1000)
    if arg.small:
        small(config)
        config.model.depth = 8
    config.model.locality = f"beta:{arg.beta:g},mode={arg.mode},smallest={16 if arg.small else 128}"
    return runlocal(config) if arg.runlocal else config


def sweep(add, config):
    _, _, options = config.model.locality.partition(",")

    def setting(name, schedule):
        add(name, {"model.locality": f"{schedule},{options}"}, seeds=range(3))

    setting("dense", "constant:0")
    for beta in BETAS:
        mean = Locality.parse(f"beta:{beta}", config.data.seq_len).table(config.model.depth).mean()
        setting(f"beta-{beta}", f"beta:{beta}")
        setting(f"beta-{beta}-reversed", f"beta:{beta},reversed")
        setting(f"beta-{beta}-uniform", f"constant:{mean:.4f}")
