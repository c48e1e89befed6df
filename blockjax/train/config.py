"""Configs: defaults, `small` and `runlocal`, checks, identity.

A config file defines `get_config(arg)` and starts from `base_config`. Its
sections `model`, `data`, `optimizer` and the key `seed` are the *identity* of a
run: a run folder refuses others. `mesh` and `run` may change from one start to
the next.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import runpy
import traceback
from collections.abc import Sequence

from ml_collections import ConfigDict

from blockjax.data.orders import ORDERS
from blockjax.errors import UsageError, nearest
from blockjax.models import TransformerConfig, preset
from blockjax.models.transformer import REMAT
from blockjax.train.optimizer import OPTIMIZERS, SCHEDULES, make_schedule

LONGEST_ROW = 2**26  # tokens; the order of their blocks is a list on the host
IDENTITY = ("seed", "model", "data", "optimizer")

CHOICES = {
    "data.order": ORDERS,
    "optimizer.name": OPTIMIZERS,
    "optimizer.schedule": SCHEDULES,
    "run.remat": REMAT,
}

POSITIVE_INTEGERS = (
    "data.seq_len",
    "data.batch_size",
    "run.steps",
    "run.accumulate",
    "run.log_every",
    "run.eval_sequences",
    "run.keep_checkpoints",
    "run.max_skipped",
)
POSITIVE = (
    "model.rope_base",
    "model.norm_eps",
    "optimizer.learning_rate",
    "optimizer.adam_learning_rate",
    "optimizer.query_rate",
    "optimizer.eps",
)
NOT_NEGATIVE = (
    "model.soft_cap",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "optimizer.z_loss",
    "optimizer.locality_warmup",
    "run.ulysses",
    "run.repeats",
    "run.eval_every",
    "run.checkpoint_every",
    "run.keep_every",
    "run.keep_hours",
    "run.hang_seconds",
    "run.prefetch",
)

# Keys, what their number must be, and the test. TransformerConfig checks the sizes in `model`.
RANGES = (
    (POSITIVE_INTEGERS, "at least 1", lambda x: x >= 1),
    (POSITIVE, "above 0", lambda x: 0 < x < math.inf),
    (NOT_NEGATIVE, "0 or more", lambda x: 0 <= x < math.inf),
    (("optimizer.beta1", "optimizer.beta2", "optimizer.momentum"), "in [0, 1)", lambda x: 0 <= x < 1),
    (("optimizer.decay_fraction", "optimizer.final_scale"), "in [0, 1]", lambda x: 0 <= x <= 1),
    (("seed",), "in [0, 2**32)", lambda x: 0 <= x < 2**32),
)


HOW = ("remat", "schedule", "layout", "ulysses")
"""Fields of the model config that are said in `run`: how it is computed, not what."""


def base_config(size: str = "nano") -> ConfigDict:
    """All keys with their defaults, and a model of a size from `models.PRESETS`."""
    fields = dataclasses.asdict(preset(size))
    # Set by the tokenizer, `data.seq_len` and `run`.
    for key in ("vocab_size", "context", *HOW):
        del fields[key]
    return ConfigDict(
        dict(
            seed=0,  # of parameters and of the order of data
            model=fields,
            data=dict(
                source="stdlib",  # or a file, folder or glob of text, JSONL, Parquet; or tfds:name
                text_field="text",  # of JSONL lines, Parquet rows and TFDS examples
                tokenizer="bytes",  # or a tokenizer.json, or a SentencePiece .model
                order="packed",  # or stream
                carry=False,  # recurrent layers go on from step to step; under stream
                seq_len=1024,  # tokens
                batch_size=32,  # sequences a step, over all devices
            ),
            optimizer=dict(
                name="adamw",  # or muon
                learning_rate=6e-4,  # at its peak
                adam_learning_rate=6e-4,  # of embeddings, head and gains under muon
                query_rate=0.1,  # of depth queries and gates, over the rate of gains
                schedule="cosine",  # or stable_decay
                warmup_steps=100,  # rising linearly
                decay_fraction=0.2,  # of all steps, under stable_decay
                final_scale=0.1,  # last learning rate over the peak
                beta1=0.9,  # decay of AdamW's mean
                beta2=0.95,  # decay of AdamW's mean square
                momentum=0.95,  # of muon
                eps=1e-8,  # beside the root of the mean square
                weight_decay=0.1,  # of matrices
                clip_norm=1.0,  # of all gradients together; 0: off
                z_loss=0.0,  # weight of log(Z)^2 in the loss; 0: off
                locality_warmup=0,  # steps over which model.locality rises from 0; 0: it is there at once
            ),
            mesh=dict(  # devices along each axis; one may be -1: all that are left
                data=-1,  # sequences
                fsdp=1,  # sequences, and parameters
                seq=1,  # tokens of a sequence
                tensor=1,  # heads, ffn and vocabulary
            ),
            run=dict(
                steps=1000,  # updates, over all starts
                accumulate=1,  # microbatches a step
                repeats=0,  # how often each part of model.loop with a * is applied; 0: as it says
                remat="none",  # or dots, matmuls, full
                schedule="auto",  # what attention sends over mesh.seq: or ring, token_ring, halo, ...
                layout="contiguous",  # of a sequence over mesh.seq: or zigzag, striped, balanced
                ulysses=0,  # devices of mesh.seq that exchange tokens for heads; 0: as schedule=auto finds
                log_every=10,  # steps
                eval_every=200,  # steps; 0: only at the end
                eval_sequences=64,  # of the validation split
                inspect=True,  # at evaluations, measure attention and depth weights of each layer too
                checkpoint_every=200,  # steps; 0: only at the end
                keep_checkpoints=2,  # the newest
                keep_every=0,  # steps: their multiples are kept too; 0: none
                keep_hours=0.0,  # younger checkpoints are kept too
                max_skipped=10,  # steps in a row without a finite loss and gradient, then the run stops
                hang_seconds=1800.0,  # for a batch, a step, an evaluation batch, a checkpoint; 0: no limit
                deterministic=False,  # on GPUs: bit for bit the same in every run, and slower
                prefetch=4,  # batches
                data_dir="data",  # prepared corpora and token indices
                tensorboard=True,  # events beside metrics.jsonl
                report=True,  # pictures and samples at the end
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
        folder = path.parent if path.parent != pathlib.Path() else pathlib.Path("configs")
        there = [str(p) for p in folder.glob("*.py")]
        hint = nearest(name, there) if there else " Config files lie in configs/."
        raise UsageError(f"There is no config file {name!r}.{hint}")
    if path.suffix != ".py":
        raise UsageError(f"The config file {name!r} is not a Python file: its name must end in .py.")
    try:
        get_config = runpy.run_path(name).get("get_config")
        config = get_config(*([arg] if arg else [])) if callable(get_config) else None
    except UsageError:
        raise
    except SyntaxError as error:
        raise UsageError(f"{error.filename}, line {error.lineno}: {error.msg}.") from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"{name} fails{where(error, name)}: {type(error).__name__}: {error}.") from error
    if get_config is None:
        raise UsageError(f"{name} has no function get_config(arg) that returns a ConfigDict.")
    if not isinstance(config, ConfigDict):
        raise UsageError(f"get_config in {name} returns a {type(config).__name__}, not a ConfigDict.")
    return config


def where(error: BaseException, file: str) -> str:
    """` in line N` of the file in which an error arose; nothing if it arose elsewhere."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith(file)]
    return f" in line {lines[-1]}" if lines else ""


def small(config: ConfigDict) -> ConfigDict:
    """Sets everything but the model's sizes for bytes of text and minutes on two CPU cores; in place."""
    config.model.update(attention_block=64, dtype="float32")
    config.data.update(seq_len=512, batch_size=16)
    # Few steps: a high rate, little momentum, and most of the run spent in the decay.
    config.optimizer.update(name="muon", learning_rate=0.04, adam_learning_rate=0.01, momentum=0.9)
    config.optimizer.update(schedule="stable_decay", decay_fraction=0.7, final_scale=0.0, z_loss=0.0)
    config.optimizer.update(warmup_steps=20, weight_decay=0.0)
    config.run.update(steps=240, remat="none", eval_every=60, eval_sequences=128, checkpoint_every=60)
    return config


def runlocal(config: ConfigDict) -> ConfigDict:
    """Cuts any config to a run of about a minute on a laptop, same code paths."""
    config = config.copy_and_resolve_references()
    if not config.model.loop:  # which says the depth
        config.model.depth = min(config.model.depth, 4)
    config.model.update(width=64, heads=4, head_dim=16, ffn=128)
    config.model.update(kv_heads=min(config.model.kv_heads, 2), attention_block=32)
    config.data.update(seq_len=128, batch_size=8)
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, 5)
    config.mesh.update(data=-1, fsdp=1, seq=1, tensor=1)
    config.run.update(steps=20, log_every=5, eval_every=10, eval_sequences=8, checkpoint_every=10)
    config.run.accumulate = min(config.run.accumulate, 2)
    return config


def check(config: ConfigDict, vocab_size: int = 257) -> TransformerConfig:
    """Checks keys, types, names and numbers before anything is prepared or compiled.

    Returns:
      The model config, with `vocab_size`, `data.seq_len` and what `run` says of the model filled in.

    Raises:
      UsageError: an unknown or missing key, a value of another type, an unknown name, or numbers that
        do not fit.
    """
    defaults, given = flatten(base_config()), flatten(config)
    for key in sorted(given.keys() - defaults):
        raise UsageError(f"Unknown config key {key!r}.{nearest(key, defaults)}")
    for key in sorted(defaults.keys() - given):
        raise UsageError(f"The config lacks {key!r}; start from blockjax.train.config.base_config().")
    for key, value in given.items():
        kind = type(defaults[key])
        if type(value) not in ((int, float) if kind is float else (kind,)):
            raise UsageError(f"{key}={value!r} must be of type {kind.__name__}, such as {defaults[key]!r}.")
    for key, choices in CHOICES.items():
        if given[key] not in choices:
            raise UsageError(f"{key}={given[key]!r} must be {' or '.join(map(repr, choices))}.")
    for keys, words, holds in RANGES:
        for key in keys:
            if not holds(given[key]):
                raise UsageError(f"{key}={given[key]} must be {words}.")
    if config.data.batch_size % config.run.accumulate:
        raise UsageError(
            f"data.batch_size={config.data.batch_size} does not divide into "
            f"run.accumulate={config.run.accumulate} microbatches; make one a multiple of the other."
        )
    make_schedule(config.optimizer, config.run.steps)
    how = {key: config.run[key] for key in HOW}
    model = TransformerConfig(**config.model, vocab_size=vocab_size, **how, context=config.data.seq_len)
    if config.run.repeats:
        model = model.with_repeats(config.run.repeats)
    if config.data.seq_len > LONGEST_ROW:
        raise UsageError(
            f"data.seq_len={config.data.seq_len} is too long: a row has at most {LONGEST_ROW} tokens."
        )
    if config.data.carry:
        check_carry(config, model)
    warmup = config.optimizer.locality_warmup
    if warmup and (not model.locality or model.stack == "bucket"):
        raise UsageError(
            f"optimizer.locality_warmup={warmup} moves model.locality={model.locality!r} during training, "
            "which needs a locality, such as 'beta:5', and model.stack='scan' or 'unroll'."
        )
    return model


def check_carry(config: ConfigDict, model: TransformerConfig) -> None:
    """Checks that the memory of recurrent layers can be carried from step to step.

    Raises:
      UsageError: there are none, the order is another one, or blocks do not fill rows.
    """
    c = config.data
    if c.order != "stream" or not model.recurrent:
        raise UsageError(
            "data.carry carries the memory of recurrent layers along a row: it needs data.order='stream', "
            f"not {c.order!r}, and a model.pattern with such layers, not {model.pattern!r}."
        )
    if config.run.accumulate > 1:
        raise UsageError(f"data.carry needs run.accumulate=1, not {config.run.accumulate}.")
    if config.run.repeats:
        raise UsageError(
            f"data.carry needs run.repeats=0, not {config.run.repeats}: a layer has a memory for "
            "each time that it is applied, and their number stays the same; say how often in model.loop."
        )
    for spec in model.period:
        if spec.mixer is not None and spec.window is not None and c.seq_len % spec.window:
            raise UsageError(
                f"data.carry needs rows of whole blocks, but data.seq_len={c.seq_len} does not divide by the "
                f"{spec.window} tokens of a block of {spec}; change one of them."
            )


def check_mesh(config: ConfigDict, mesh) -> None:
    """Checks that batches and the model divide over the mesh.

    Raises:
      UsageError: with the numbers.
    """
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    micro = config.data.batch_size // config.run.accumulate
    if micro % rows:
        raise UsageError(
            f"A microbatch of {micro} sequences (data.batch_size={config.data.batch_size} / "
            f"run.accumulate={config.run.accumulate}) does not divide over data*fsdp={rows} devices; "
            "change the batch or the mesh."
        )
    cuts = (
        ("data.seq_len", "seq"),
        ("model.width", "fsdp"),
        ("model.heads", "tensor"),
        ("model.kv_heads", "tensor"),
        ("model.ffn", "tensor"),
    )
    sizes = flatten(config)
    for key, axis in cuts:
        if sizes[key] % mesh.shape[axis]:
            raise UsageError(
                f"{key}={sizes[key]} does not divide over mesh.{axis}={mesh.shape[axis]} devices; "
                "change one of them."
            )
    if mesh.shape["seq"] > 1:
        check(config).sequence_layout(config.data.seq_len, mesh.shape["seq"])


def check_profile(span: Sequence[str | int] | None, steps: int) -> tuple[int, int] | None:
    """First and last step of a trace, both included and counted from 1.

    Raises:
      UsageError: not two numbers in order, or beyond the last step.
    """
    if not span:
        return None
    text = ",".join(map(str, span))
    try:
        first, last = map(int, span)
    except ValueError as error:
        raise UsageError(f"--profile={text} must be two steps, first and last, such as 10,12.") from error
    if not 1 <= first <= last <= steps:
        raise UsageError(f"--profile={text} must be two steps in order from 1 to run.steps={steps}.")
    return first, last


def complete(recorded: dict) -> ConfigDict:
    """A run's config as `run.json` holds it, with keys younger than the run at their defaults.

    A section that is missing altogether stays missing, for `check` to name: the record is damaged.

    Raises:
      UsageError: it holds what no config can.
    """
    defaults = base_config().to_dict()
    known = {k: v for k, v in defaults.items() if isinstance(v, dict)}
    try:
        return ConfigDict(
            {name: known.get(name, {}) | x if isinstance(x, dict) else x for name, x in recorded.items()}
        )
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UsageError(f"The config of a run cannot be read: {error}; bring its run.json back.") from error


def identity(config: ConfigDict) -> dict:
    """The part of a config that a run folder holds fast, flat: `model.depth` -> 12."""
    flat = flatten(config)
    return {key: flat[key] for key in sorted(flat) if key.split(".")[0] in IDENTITY}


def flatten(config, prefix: str = "") -> dict:
    """Leaves by dotted key: `model.depth` -> 12; what is empty inside a section is a leaf."""
    flat = {}
    for key, value in config.items():
        name, section = f"{prefix}{key}", isinstance(value, ConfigDict) and (value or not prefix)
        flat |= flatten(value, f"{name}.") if section else {name: value}
    return flat


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens after this one."""
    return every > 0 and step % every == 0
