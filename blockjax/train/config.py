"""Configs: defaults, argument strings, `runlocal`, checks, identity.

A config file defines `get_config(arg)` and starts from `base_config`. Its
sections `model`, `data`, `optimizer` and the key `seed` are the *identity* of a
run: a run folder refuses others. `mesh` and `run` may change from one start to
the next.
"""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import runpy
import traceback

from ml_collections import ConfigDict

from blockjax.errors import UsageError, nearest
from blockjax.models import TransformerConfig, preset

IDENTITY = ("seed", "model", "data", "optimizer")


def base_config(size: str = "nano") -> ConfigDict:
    """All keys with their defaults, and a model of a size from `models.PRESETS`."""
    fields = dataclasses.asdict(preset(size))
    del fields["vocab_size"], fields["remat"]  # set by the tokenizer, and by `run.remat`
    return ConfigDict(
        dict(
            seed=0,
            model=fields,
            data=dict(
                source="stdlib",  # or a file, folder or glob of text, JSONL, Parquet; or tfds:name
                text_field="text",  # of JSONL lines, Parquet rows and TFDS examples
                tokenizer="bytes",  # or a tokenizer.json, or a SentencePiece .model
                order="packed",  # or stream
                seq_len=1024,  # tokens
                batch_size=32,  # sequences a step, over all devices
            ),
            optimizer=dict(
                name="adamw",  # or muon
                learning_rate=6e-4,
                adam_learning_rate=6e-4,  # of embeddings, head and gains under muon
                schedule="cosine",  # or stable_decay
                warmup_steps=100,
                decay_fraction=0.2,  # of all steps, under stable_decay
                final_scale=0.1,  # last learning rate over the peak
                beta1=0.9,
                beta2=0.95,
                momentum=0.95,  # of muon
                eps=1e-8,
                weight_decay=0.1,  # of matrices
                clip_norm=1.0,  # 0: off
                z_loss=0.0,
            ),
            mesh=dict(data=-1, fsdp=1, seq=1, tensor=1),
            run=dict(
                steps=1000,
                accumulate=1,  # microbatches a step
                remat="none",  # or dots, full
                log_every=10,  # steps
                eval_every=200,  # steps; 0: only at the end
                eval_sequences=64,  # of the validation split
                checkpoint_every=200,  # steps; 0: only at the end
                keep_checkpoints=2,
                prefetch=4,  # batches
                data_dir="data",  # prepared corpora and token indices
                tensorboard=True,
            ),
        )
    )


def load_config(spec: str) -> ConfigDict:
    """The config that a file makes.

    Args:
      spec: `path/to/file.py` or `path/to/file.py:arg`; `arg` goes to `get_config`.

    Raises:
      UsageError: no such file, or it does not run, or has no `get_config`.
    """
    name, _, arg = spec.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        there = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        hint = nearest(name, there) if there else " Config files lie in configs/."
        raise UsageError(f"There is no config file {name!r}.{hint}")
    try:
        config = runpy.run_path(name)["get_config"](*([arg] if arg else []))
    except UsageError:
        raise
    except SyntaxError as error:
        raise UsageError(f"{error.filename}, line {error.lineno}: {error.msg}.") from error
    except KeyError as error:
        if error.args != ("get_config",):
            raise UsageError(f"{name} fails: {_where(error, name)}.") from error
        raise UsageError(f"{name} has no function get_config(arg) that returns a ConfigDict.") from error
    except Exception as error:
        raise UsageError(f"{name} fails: {_where(error, name)}.") from error
    if not isinstance(config, ConfigDict):
        raise UsageError(f"get_config in {name} returns a {type(config).__name__}, not a ConfigDict.")
    return config


def _where(error: Exception, file: str) -> str:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith(file)]
    return f"line {lines[-1] if lines else '?'}: {type(error).__name__}: {error}"


def parse_arg(arg: str | None, **defaults):
    """Reads an argument string such as `350m,runlocal,depth=3`.

    Args:
      arg: comma-separated `key=value`, or `key` for True; the first may be the
        bare value of the first default.
      **defaults: every key with its default, whose type the value takes.

    Returns:
      A `ConfigDict` of all keys.

    Raises:
      UsageError: an unknown key or a value of another type.
    """
    values = dict(defaults)
    for i, part in enumerate(p.strip() for p in (arg or "").split(",") if p.strip()):
        key, equals, value = part.partition("=")
        if not equals and key not in defaults and i == 0:
            key, value = next(iter(defaults)), part
        elif not equals:
            value = "True"
        if key not in defaults:
            raise UsageError(f"Unknown config argument {key!r}.{nearest(key, defaults)}")
        values[key] = _typed(key, value, defaults[key])
    return ConfigDict(values)


def _typed(key: str, text: str, default):
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(default):
        raise UsageError(
            f"Config argument {key}={text} must be of type {type(default).__name__}, like {default}."
        )
    return value


def runlocal(config: ConfigDict) -> ConfigDict:
    """Cuts any config to a run of about a minute on a laptop, same code paths."""
    config = config.copy_and_resolve_references()
    config.model.update(depth=min(config.model.depth, 4), width=64, heads=4, head_dim=16, ffn=128)
    config.model.update(kv_heads=min(config.model.kv_heads, 2), attention_block=32)
    config.data.update(seq_len=128, batch_size=8)
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, 5)
    config.run.update(steps=20, log_every=5, eval_every=10, eval_sequences=8, checkpoint_every=10)
    return config


def check(config: ConfigDict, vocab_size: int = 257) -> TransformerConfig:
    """Checks keys and numbers before anything is prepared or compiled.

    Returns:
      The model config with `vocab_size` and `run.remat` filled in.

    Raises:
      UsageError: an unknown or missing key, or numbers that do not fit.
    """
    known = set(_flat(base_config()))
    given = set(_flat(config))
    for key in sorted(given - known):
        raise UsageError(f"Unknown config key {key!r}.{nearest(key, known)}")
    for key in sorted(known - given):
        raise UsageError(f"The config lacks {key!r}; start from blockjax.train.config.base_config().")
    for key in ("data.seq_len", "data.batch_size", "run.steps", "run.accumulate", "run.log_every"):
        _positive(key, _flat(config)[key])
    _positive("run.eval_sequences", config.run.eval_sequences)
    if config.data.batch_size % config.run.accumulate:
        raise UsageError(
            f"data.batch_size={config.data.batch_size} does not divide into "
            f"run.accumulate={config.run.accumulate} microbatches."
        )
    return TransformerConfig(**config.model, vocab_size=vocab_size, remat=config.run.remat)


def check_mesh(config: ConfigDict, mesh) -> None:
    """Checks that batches divide over the mesh.

    Raises:
      UsageError: with the numbers.
    """
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    micro = config.data.batch_size // config.run.accumulate
    if micro % rows:
        raise UsageError(
            f"A microbatch of {micro} sequences (data.batch_size={config.data.batch_size} / "
            f"run.accumulate={config.run.accumulate}) does not divide over data*fsdp={rows} devices."
        )
    if config.data.seq_len % mesh.shape["seq"]:
        raise UsageError(
            f"data.seq_len={config.data.seq_len} does not divide over seq={mesh.shape['seq']} devices."
        )


def identity(config: ConfigDict) -> dict:
    """The part of a config that a run folder holds fast, flat: `model.depth` -> 12."""
    flat = _flat(config)
    return {key: flat[key] for key in sorted(flat) if key.split(".")[0] in IDENTITY}


def flat_keys(config: ConfigDict) -> set[str]:
    """Every key that can be set, sections included: `model` and `model.depth`."""
    leaves = _flat(config)
    return {".".join(key.split(".")[:i]) for key in leaves for i in range(1, key.count(".") + 2)}


def _positive(key: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{key}={value} must be at least 1.")


def _flat(config, prefix: str = "") -> dict:
    flat = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, ConfigDict) else {name: value}
    return flat


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens after this one."""
    return every > 0 and step % every == 0
