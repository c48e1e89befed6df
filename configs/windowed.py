"""Three layers with a window, then one that sees everything, repeated: long sequences for less.

Command:   python experiments/train.py --config=configs/windowed.py:350m --run=runs/windowed
Arguments: a size (125m), `window` in tokens (1024), `runlocal`
Hardware:  one GPU or TPU, or many
Source:    the interleave of Gemma 2 and 3 (arXiv:2408.00118, arXiv:2503.19786), which
           use one full layer in 2 and in 6
"""

from blockjax.arguments import parse_arg
from blockjax.train.config import base_config, runlocal


def get_config(arg=None):
    arg = parse_arg(arg, size="125m", window=1024, runlocal=False)
    config = base_config(arg.size)
    config.model.pattern = f"{arg.window}*3,full"
    config.model.attention_block = 512
    config.data.update(seq_len=8192, batch_size=16)
    config.optimizer.update(schedule="stable_decay", warmup_steps=500, final_scale=0.0, z_loss=1e-4)
    config.run.update(steps=20_000, remat="dots", eval_every=1000, checkpoint_every=1000)
    return runlocal(config) if arg.runlocal else config
