"""Depth attention: what a sublayer reads of what earlier ones wrote.

Question:  does a softmax over earlier outputs beat their sum, and how fine must it be?
Command:   python experiments/sweep.py --config=configs/depth.py:small --sweep=runs/depth
           python experiments/train.py --config=configs/depth.py:350m --run=runs/depth
Arguments: a size (125m); `residual`: a rule such as block_attn_res; number of depth `blocks`
           (8); `small`: 8 layers on the Python standard library as bytes; `runlocal`
Sweep:     prenorm; block_attn_res of 2 and of 4 sublayers; attn_res (every sublayer a block) with one head
           and with four; delta_block of 4. Each with the layers of the size and with half as many more,
           compared to prenorm of the same size. Three seeds
Hardware:  one GPU or TPU, or many; `small`: two CPU cores (about 10 minutes a run of 8 layers) or any GPU
Score:     see experiments/LOG.md
Source:    Attention Residuals (arXiv:2603.15031), Delta Attention Residuals (arXiv:2605.18855), Multi-Head
           AttnRes (arXiv:2607.27230)
"""

from blockjax.arguments import parse_arg
from blockjax.train.config import base_config, runlocal, small


def get_config(arg=None):
    arg = parse_arg(arg, size="125m", residual="block_attn_res", blocks=8, small=False, runlocal=False)
    config = base_config("nano" if arg.small else arg.size)
    config.model.attention_block = 512
    config.data.update(seq_len=2048, batch_size=64)
    config.optimizer.update(schedule="stable_decay", warmup_steps=500, final_scale=0.0, z_loss=1e-4)
    config.run.update(steps=20_000, remat="dots", eval_every=1000, checkpoint_every=1000)
    if arg.small:
        small(config)
        config.model.depth = 8
    config.model.residual = f"{arg.residual}:blocks={arg.blocks}" if "block" in arg.residual else arg.residual
    return runlocal(config) if arg.runlocal else config


def sweep(add, config):
    settings = {
        "prenorm": "prenorm",
        "block-2": "block_attn_res:size=2",
        "block-4": "block_attn_res:size=4",
        "full": "attn_res",
        "full-4-heads": "attn_res:heads=4",
        "delta-block-4": "delta_block:size=4",
    }
    for layers in (config.model.depth, config.model.depth * 3 // 2):
        for name, residual in settings.items():
            overrides = {"model.depth": layers, "model.residual": residual}
            add(f"{layers}-{name}", overrides, seeds=range(3), against=f"{layers}-prenorm")
