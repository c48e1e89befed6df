"""Training: config, step, loop, checkpoints, metrics."""
