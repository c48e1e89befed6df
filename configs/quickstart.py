"""A byte-level decoder of 0.9M parameters on the Python standard library, on a laptop.

Shows every part at work: packed documents, windows of 64 bytes in three layers
of four, Muon, warm-up and linear decay, checkpoints, the report.

Command:   make train
Hardware:  2 CPU cores
Time:      about 7 minutes
Score:     1.82 bits per byte on validation, context 512
"""

from blockjax.arguments import parse_arg
from blockjax.train.config import base_config, runlocal, small


def get_config(arg=None):
    arg = parse_arg(arg, size="nano", runlocal=False)
    config = small(base_config(arg.size))
    config.model.pattern = "64*3,full"
    return runlocal(config) if arg.runlocal else config
