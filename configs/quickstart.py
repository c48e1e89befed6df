"""A byte-level decoder of 0.9M parameters on the Python standard library, on a laptop.

Shows every part at work: packed documents, windows of 64 bytes in three layers
of four, Muon, warm-up and linear decay, checkpoints, the report.

Command:   make train
Hardware:  2 CPU cores
Time:      about 7 minutes
Score:     1.82 bits per byte on validation, context 512
"""

from blockjax.arguments import parse_arg
from blockjax.train.config import base_config, runlocal


def get_config(arg=None):
    arg = parse_arg(arg, size="nano", runlocal=False)
    config = base_config(arg.size)
    config.model.update(pattern="64*3,full", attention_block=64, dtype="float32")
    config.data.update(seq_len=512, batch_size=16)
    # Few steps: a high rate, little momentum, and most of the run spent in the decay.
    config.optimizer.update(name="muon", learning_rate=0.04, adam_learning_rate=0.01, momentum=0.9)
    config.optimizer.update(schedule="stable_decay", decay_fraction=0.7, final_scale=0.0)
    config.optimizer.update(warmup_steps=20, weight_decay=0.0)
    config.run.update(steps=240, eval_every=60, eval_sequences=128, checkpoint_every=60)
    return runlocal(config) if arg.runlocal else config
