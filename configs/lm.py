"""A decoder of any size from `models.PRESETS` on your own text.

Command:   python experiments/train.py --config=configs/lm.py:350m --run=runs/lm \\
             --config.data.source='text/*.jsonl.gz' --config.data.tokenizer=tokenizer.json
Arguments: a size (125m), `muon` for Muon instead of AdamW, `runlocal` for a one-minute run;
           for example configs/lm.py:350m,muon
Hardware:  one GPU or TPU, or many: set --config.mesh.fsdp and --config.mesh.tensor
"""

from blockjax.arguments import parse_arg
from blockjax.train.config import base_config, runlocal


def get_config(arg=None):
    arg = parse_arg(arg, size="125m", muon=False, runlocal=False)
    config = base_config(arg.size)
    config.model.attention_block = 512
    config.data.update(seq_len=2048, batch_size=64)
    config.optimizer.update(schedule="stable_decay", warmup_steps=500, final_scale=0.0, z_loss=1e-4)
    if arg.muon:
        config.optimizer.update(name="muon", learning_rate=0.02, adam_learning_rate=3e-3, weight_decay=0.01)
    config.run.update(steps=20_000, remat="dots", eval_every=1000, checkpoint_every=1000, eval_sequences=256)
    return runlocal(config) if arg.runlocal else config
