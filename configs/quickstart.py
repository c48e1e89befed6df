from blockjax.train.config import base_config, parse_arg, runlocal


def get_config(arg=None):
    arg = parse_arg(arg, size="nano", runlocal=False)
    config = base_config(arg.size)
    config.model.dtype = "float32"
    config.data.update(seq_len=512, batch_size=16)
    config.optimizer.update(name="muon", learning_rate=0.02, adam_learning_rate=3e-3, warmup_steps=20,
        schedule="stable_decay", decay_fraction=0.5, final_scale=0.0, weight_decay=0.0)
    config.run.update(steps=600, eval_every=200, checkpoint_every=200, eval_sequences=128)
    return runlocal(config) if arg.runlocal else config
