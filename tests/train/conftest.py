"""A corpus of a few kilobytes, and configs that train on it in seconds."""

import contextlib
import json
import random

import jax
import pytest

from blockjax.parallel.mesh import make_mesh
from blockjax.train import loop
from blockjax.train.config import base_config


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Path of 60 documents of unequal length."""
    draw = random.Random(0)
    words = ["block", "time", "depth", "tokens", "sparse", "a", "of", "the", "window", "ünïcode"]
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    texts = [" ".join(draw.choices(words, k=draw.randint(3, 120))) + "\n" for _ in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def tiny(corpus, tmp_path_factory):
    """`tiny(run__steps=4)` is a config of about 10k parameters with that key set."""
    data_dir = str(tmp_path_factory.mktemp("data"))

    def make(**values):
        config = base_config()
        config.model.update(depth=2, width=16, heads=2, kv_heads=2, head_dim=8, ffn=32)
        config.model.update(pattern="8,full", attention_block=16, dtype="float32")
        config.data.update(source=str(corpus), seq_len=32, batch_size=8)
        config.optimizer.update(warmup_steps=2, learning_rate=0.02, adam_learning_rate=0.02)
        config.run.update(steps=12, log_every=4, eval_every=0, eval_sequences=24, checkpoint_every=0)
        config.run.update(data_dir=data_dir, tensorboard=False, inspect=False)
        for name, value in values.items():
            section, _, key = name.rpartition("__")
            (config[section] if section else config)[key] = value
        return config

    return make


@pytest.fixture(scope="session")
def one_device():
    """`with one_device():` trains on the first device only."""

    @contextlib.contextmanager
    def only():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
            yield

    return only
