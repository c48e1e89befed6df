"""Recurrent layers: what carries information along a long document, and at which distance it helps.

Question:  at equal parameters and tokens, do states replace attention over everything? Is the gain where a
           window ends, at late positions in a document?
Command:   python experiments/sweep.py --config=configs/recurrence.py:small --sweep=runs/recurrence
           python experiments/train.py --config=configs/recurrence.py:125m --run=runs/recurrence
Arguments: a size (30m); `kind`: dense, window, brt, lightning, gdn or hybrid (dense); `source` of the
           text, long documents (stdlib); `small`: the Python standard library as bytes; `runlocal`. Windows,
           blocks of tokens and the number of state vectors are a sixteenth of data.seq_len
Sweep:     all six kinds, three seeds. The inner width of the MLPs makes up for what mixers take, so that all
           have as many parameters. Recurrent layers go on from row to row within a document, in training and
           in evaluation; attention sees its row
Metrics:   val/bits_per_byte_from/N: bits per byte at positions N .. 2N - 1 of a document; in positions.png
Control:   python experiments/evaluate.py --run=runs/recurrence/gdn-seed0
           evaluates a trained model with its memory reset at each row, too
Hardware:  one GPU or TPU; `small`: any GPU, or two CPU cores (about 20 minutes a run)
Source:    Block-Recurrent Transformers (arXiv:2203.07852), Lightning Attention-2 (arXiv:2401.04658), Gated
           DeltaNet (arXiv:2412.06464); 3 recurrent layers to 1 of attention as in Kimi Linear
           (arXiv:2510.26692)
"""

import dataclasses

from blockjax.arguments import parse_arg
from blockjax.errors import UsageError, nearest
from blockjax.train.config import base_config, check, runlocal, small


def patterns(depth, window):
    """One pattern of layers a kind; the Block-Recurrent layer is the third from the end."""
    before, after = max(depth - 3, 0), min(depth - 1, 2)
    cell = f"brt:window={window}/states={window}"
    runs = [f"{window}*{before}"] * (before > 0) + [cell] + [f"{window}*{after}"] * (after > 0)
    return {
        "dense": "full",
        "window": str(window),
        "brt": ",".join(runs),
        "lightning": "lightning",
        "gdn": "gdn",
        "hybrid": f"gdn*3,{window}",
    }


def settings(config, kind):
    """Overrides of a kind: its pattern, and the inner width that makes it as large as the config's model."""
    known = patterns(config.model.depth, config.data.seq_len // 16)
    if kind not in known:
        raise UsageError(f"Unknown kind {kind!r}.{nearest(kind, known)}")
    given = check(config)
    own = dataclasses.replace(given, pattern=known[kind])
    wider = (given.num_params() - own.num_params()) / (3 * given.width * given.depth)
    return {
        "model.pattern": known[kind],
        "model.ffn": given.ffn + 8 * round(wider / 8),
        "data.carry": own.recurrent,
    }


def get_config(arg=None):
    arg = parse_arg(arg, size="30m", kind="dense", source="stdlib", small=False, runlocal=False)
    config = base_config("nano" if arg.small else arg.size)
    config.model.attention_block = 512
    config.data.update(source=arg.source, order="stream", seq_len=4096, batch_size=16)
    config.optimizer.update(schedule="stable_decay", warmup_steps=500, final_scale=0.0, z_loss=1e-4)
    config.run.update(steps=20_000, remat="dots", eval_every=1000, checkpoint_every=1000)
    if arg.small:
        small(config)
        config.data.update(seq_len=2048, batch_size=8)
    if arg.runlocal:
        config = runlocal(config)
    config.update_from_flattened_dict(settings(config, arg.kind))
    return config


def sweep(add, config):
    for kind in patterns(config.model.depth, config.data.seq_len // 16):
        add(kind, settings(config, kind), seeds=range(3), against="dense")
