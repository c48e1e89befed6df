"""What a decoder is made of: sizes, and a table with one row per layer."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from blockjax.arguments import parse_choice
from blockjax.depth import Residual
from blockjax.errors import UsageError, nearest
from blockjax.locality import Locality
from blockjax.masks.predicates import array_module
from blockjax.models.layer_spec import LayerSpec, unstack
from blockjax.parallel.layouts import LAYOUTS, PIECES, Layout
from blockjax.parallel.schedules import SCHEDULES
from blockjax.recurrence import MIXERS, num_params

DTYPES = ("float32", "bfloat16", "float64")  # the last to compare with oracles
STACKS = ("scan", "bucket", "unroll")
MAX_DEPTH = 10_000
"""Layers, also of one pattern: the layer table is built row by row."""
MAX_SIZE = 2**31 - 1
"""Of an axis of an array."""


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and options of the decoder in `transformer.py`.

    Attributes:
      vocab_size: V, rows of the embedding.
      depth: L, number of layers that a token goes through.
      width: M, size of the residual stream.
      heads, kv_heads, head_dim: N, K, H. N is a multiple of K (grouped-query attention).
      ffn: F, inner width of the SwiGLU.
      pattern: one period of the layer table, repeated and cut to `depth`:
        comma-separated `full`, a window in tokens, or a recurrent layer of
        `recurrence.MIXERS` with options after a colon, each with an optional
        count, for example `512*3,full` or `lightning:decay=fla/scale=0.1*3,512`.
      locality: instead of windows in `pattern`, a schedule of locality over
        depth such as `beta:5` or `beta:5,mode=segment`; see `locality.Locality`.
      loop: which layers have the weights of others: runs of layers in order, which add up to `depth`.
        `2,4*3,2` is 2, then 4 that are applied 3 times, then 2; empty: none have. `pattern` is of
        layers with weights of their own, of which these are 8; `locality` goes on from one time to the next.
      condition: inner width of the network that tells layers of `loop` with a `*` which time it is; see
        `tied.Condition`. 0: they are not told.
      residual: how layers read what earlier ones wrote, such as `prenorm` or
        `block_attn_res:size=8`; see `depth.Residual`.
      stack: `scan` compiles one layer for all, `bucket` one for each run of
        equal rows of the layer table, `unroll` each on its own.
      context: tokens of the longest sequence it is meant for; the widest
        window of a locality.
      tied: the output head is the embedding.
      qk_norm: RMSNorm over H on queries and keys before RoPE.
      soft_cap: c of c * tanh(logit / c) on attention logits; 0 turns it off.
      rope_base: base of the rotary frequencies.
      norm_eps: epsilon of every RMSNorm.
      attention_block: rows and columns of a mask block, in tokens.
      dtype: of activations and matmuls; parameters are float32.
      remat: what the backward recomputes, a key of `transformer.REMAT`.
      schedule, layout, ulysses: how attention runs where the mesh cuts sequences; see `parallel.attention`.
    """

    vocab_size: int
    depth: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    pattern: str = "full"
    locality: str = ""
    loop: str = ""
    condition: int = 16
    residual: str = "prenorm"
    stack: str = "scan"
    context: int = 2048
    tied: bool = False
    qk_norm: bool = True
    soft_cap: float = 0.0
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    attention_block: int = 128
    dtype: str = "bfloat16"
    remat: str = "none"
    schedule: str = "auto"
    layout: str = "contiguous"
    ulysses: int = 0

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "depth",
            "width",
            "heads",
            "kv_heads",
            "head_dim",
            "ffn",
            "attention_block",
            "context",
        ):
            most = MAX_DEPTH if name == "depth" else MAX_SIZE
            if not 1 <= getattr(self, name) <= most:
                raise UsageError(f"model.{name}={getattr(self, name)} must be at least 1 and at most {most}.")
        if self.heads % self.kv_heads:
            raise UsageError(
                f"model.heads={self.heads} is not a multiple of model.kv_heads={self.kv_heads}: "
                "every key/value head serves the same number of query heads."
            )
        if self.head_dim % 2:
            raise UsageError(f"model.head_dim={self.head_dim} must be even: RoPE turns pairs of features.")
        if not 0 <= self.soft_cap < math.inf:
            raise UsageError(f"model.soft_cap={self.soft_cap} must be a number >= 0; 0 turns it off.")
        names = (("model.dtype", DTYPES), ("model.stack", STACKS), ("run.schedule", ("auto", *SCHEDULES)))
        for key, choices in (*names, ("run.layout", LAYOUTS)):
            if (value := getattr(self, key.partition(".")[2])) not in choices:
                raise UsageError(f"{key}={value!r} must be {' or '.join(map(repr, choices))}.")
        if self.condition < 0:
            raise UsageError(f"model.condition={self.condition} must be at least 0; 0 turns it off.")
        self._check_loop()
        specs = parse_pattern(self.pattern)
        for mixer in {spec.mixer: None for spec in specs if spec.mixer}:
            mixer.check(self)
        windows = [spec for spec in specs if spec.mixer is None and not spec.full]
        if self.locality and windows:
            raise UsageError(
                f"model.pattern={self.pattern!r} and model.locality={self.locality!r} both set windows; "
                "keep one: pattern='full' or locality=''."
            )
        self.local_rule.table(self.depth)
        if self.width % self.residual_rule.heads:
            raise UsageError(
                f"model.residual={self.residual}: model.width={self.width} does not divide into "
                f"{self.residual_rule.heads} heads; change one of them."
            )

    def _check_loop(self) -> None:
        total = sum(run.count * run.repeats for run in self.runs)
        if total != self.depth:
            raise UsageError(
                f"model.loop={self.loop!r} is of {total} layers, but model.depth={self.depth}; "
                "make them equal."
            )
        if self.loop and self.residual != "prenorm":
            raise UsageError(
                f"model.loop={self.loop!r} needs model.residual='prenorm', not {self.residual!r}: the "
                "sources of depth attention belong to layers that run once."
            )

    @functools.cached_property
    def runs(self) -> tuple[Run, ...]:
        """The runs of `loop`; one of all layers without it."""
        return parse_loop(self.loop) if self.loop else (Run(0, self.depth, 1, False),)

    @property
    def distinct(self) -> int:
        """Number of layers with weights of their own."""
        return sum(run.count for run in self.runs)

    @functools.cached_property
    def owners(self) -> tuple[int, ...]:
        """For each of the L layers, which of the `distinct` ones it is."""
        return tuple(run.first + i for run in self.runs for _ in range(run.repeats) for i in range(run.count))

    @property
    def conditioned(self) -> int:
        """Number of layers with weights of their own that are told which time they are applied."""
        return sum(run.count for run in self.runs if run.looped) if self.condition else 0

    def with_repeats(self, repeats: int) -> TransformerConfig:
        """The config in which every part of `loop` with a `*` is applied so many times; the same parameters.

        Raises:
          UsageError: there is no such part.
        """
        if not any(run.looped for run in self.runs) or repeats < 1:
            raise UsageError(
                f"Layers cannot be repeated {repeats} times: it takes at least 1, and a model.loop with a *, "
                f"such as '1,2*4,1', not {self.loop!r}."
            )
        runs = [run._replace(repeats=repeats) if run.looped else run for run in self.runs]
        depth = sum(run.count * run.repeats for run in runs)
        return dataclasses.replace(self, loop=",".join(map(str, runs)), depth=depth)

    @property
    def period(self) -> tuple[LayerSpec, ...]:
        """The layers of one period; what a scan step runs."""
        return parse_pattern(self.pattern)[: self.distinct]

    @property
    def recurrent(self) -> bool:
        """Whether there are recurrent layers."""
        return any(spec.mixer is not None for spec in self.period)

    @functools.cached_property
    def local_rule(self) -> Locality:
        """The schedule and mode of `locality`."""
        return Locality.parse(self.locality, self.context)

    @functools.cached_property
    def residual_rule(self) -> Residual:
        """The rule of `residual` for this depth."""
        return Residual.parse(self.residual, 2 * self.depth)

    def sequence_layout(self, tokens: int, devices: int) -> Layout:
        """Which tokens of a sequence lie on each of `devices`, in blocks as large as those of attention.

        Raises:
          UsageError: they do not divide, or recurrent layers cannot be cut so.
        """
        mixers = [spec.mixer for spec in self.period if spec.mixer is not None]
        for mixer in mixers:
            if mixer.serial:
                raise UsageError(
                    f"Layers {str(mixer)!r} of model.pattern={self.pattern!r} read the states that the block "
                    "of tokens before left, one block after the other, so devices that share out a sequence "
                    f"would wait for each other: set mesh.seq=1, not {devices}; mesh.data, fsdp and tensor "
                    "may cut the model."
                )
        if mixers and self.layout not in PIECES:
            raise UsageError(
                f"Recurrent layers of model.pattern={self.pattern!r} go over runs of consecutive tokens: "
                f"over {devices} devices run.layout must be {' or '.join(map(repr, PIECES))}, "
                f"not {self.layout!r}."
            )
        chunks = devices * (2 if self.layout == "zigzag" else 1)
        block = max(1, min(self.attention_block, tokens // chunks))
        if tokens % (chunks * block):
            raise UsageError(
                f"Sequences of {tokens} tokens do not divide into {chunks} chunks of whole blocks of {block} "
                f"(layout={self.layout!r} over {devices} devices); change the length, mesh.seq, or "
                f"model.attention_block={self.attention_block}."
            )
        if (reach := max((mixer.reach for mixer in mixers), default=0)) > tokens // chunks:
            raise UsageError(
                f"Sequences of {tokens} tokens over {devices} devices (layout={self.layout!r}) have runs of "
                f"{tokens // chunks} tokens, but a convolution of model.pattern={self.pattern!r} reaches "
                f"{reach} before its own; make them longer, or mesh.seq smaller."
            )
        masks = [spec.mask(tokens, block) for spec in self.layers()] if self.layout == "balanced" else ()
        return Layout.of(self.layout, tokens, devices, block, masks)

    def table(self, locality: jax.Array | np.ndarray | float | None = None) -> LayerSpec | None:
        """What differs between layers of one row of `pattern`, as columns [L]; None where nothing does.

        Args:
          locality: of every layer or of all, possibly traced; defaults to the schedule's.

        Raises:
          UsageError: a locality for a model without one, or for another number of layers.
        """
        columns = {}
        if any(spec.mixer is not None and spec.mixer.by_depth for spec in self.period):
            columns["layer"] = np.arange(self.depth, dtype=np.int32)
        if not self.locality:
            if locality is None:
                return LayerSpec(**columns) if columns else None
            raise UsageError(
                "The model has no locality to move; give it one, such as model.locality='constant:0'."
            )
        if locality is None:
            locality = self.local_rule.table(self.depth)
        elif np.shape(locality) not in ((), (self.depth,)):
            raise UsageError(
                f"locality of shape {np.shape(locality)} must be one number or [{self.depth}], one a layer."
            )
        xp = array_module(locality)
        locality = xp.broadcast_to(xp.asarray(locality), (self.depth,))
        return LayerSpec(**columns, **self.local_rule.columns(locality))

    @property
    def nearest(self) -> LayerSpec:
        """What a layer of locality 1 sees; under a bias, the window within which it is small."""
        if self.local_rule.mode == "bias":
            return LayerSpec(window=self.local_rule.smallest)
        return LayerSpec(**{name: int(x) for name, x in self.local_rule.columns(1.0).items()})

    def layers(self, locality: Sequence[float] | float | None = None) -> tuple[LayerSpec, ...]:
        """The layer table, one row per layer, in numbers; `locality` as in `table`."""
        return self.rows(self.table(locality))

    def rows(self, table: LayerSpec | None) -> tuple[LayerSpec, ...]:
        """One row per layer, from the columns of `table`."""
        rows = [self.period[i % len(self.period)] for i in self.owners]
        if table is None:
            return tuple(rows)
        return tuple(row.with_columns(unstack(table, i)) for i, row in enumerate(rows))

    def num_params(self, *, embedding: bool = True, applied: bool = False) -> int:
        """Number of parameters.

        Args:
          embedding: False leaves out the input embedding if it is not the head too.
          applied: count those of layers of `loop` each time that a token meets them.
        """
        layers = self.owners if applied else range(self.distinct)
        attention = self.width * self.head_dim * 2 * (self.heads + self.kv_heads)
        attention += 2 * self.head_dim if self.qk_norm else 0
        mixers = [self.period[i % len(self.period)].mixer for i in layers]
        total = sum(attention if mixer is None else num_params(mixer, self) for mixer in mixers)
        total += len(layers) * (3 * self.width * self.ffn + 2 * self.width)
        if applied and self.condition:  # the network itself runs once for all tokens
            total += 3 * self.width * sum(run.count * run.repeats for run in self.runs if run.looped)
        elif not applied:
            total += self.conditioned * (2 * self.condition + 3 * self.width * (self.condition + 1))
        tables = self.vocab_size * self.width * (1 if self.tied or not embedding else 2)
        return total + tables + self.width + self.residual_rule.num_params(self.width)


class Run(NamedTuple):
    """A part of `loop`: layers `first` to `first + count - 1` of the distinct ones, applied `repeats` times.

    `looped` says that it is written with a `*`, even of 1: its layers are told which time it is.
    """

    first: int
    count: int
    repeats: int
    looped: bool

    def __str__(self) -> str:
        return f"{self.count}*{self.repeats}" if self.looped else str(self.count)


def parse_loop(loop: str) -> tuple[Run, ...]:
    """Reads `2,4*3,2` as runs of 2, 4 and 2 layers, the second applied 3 times.

    Raises:
      UsageError: a part that is something else.
    """
    runs, first = [], 0
    for part in map(str.strip, loop.split(",")):
        match = re.fullmatch(r"([1-9]\d{0,8})(?:\*([1-9]\d{0,8}))?", part, re.ASCII)
        if not match:
            raise UsageError(
                f"model.loop={loop!r}: cannot read {part!r}. Write a number of layers, with how many times "
                "they are applied, such as '2,4*3,2'; nothing is no loop."
            )
        runs.append(Run(first, int(match[1]), int(match[2] or 1), match[2] is not None))
        first += runs[-1].count
    return tuple(runs)


def parse_pattern(pattern: str) -> tuple[LayerSpec, ...]:
    """Reads `512*3,full` as three layers with a window of 512 and one without.

    Raises:
      UsageError: a part that is neither, nor a recurrent layer, or an option that its kind does not have;
        more than `MAX_DEPTH` layers.
    """
    specs = []
    for part in map(str.strip, pattern.split(",")):
        match = re.fullmatch(r"(full|[1-9]\d{0,8}|([a-z]+)(?::([^*]*))?)(?:\*([1-9]\d{0,8}))?", part)
        if not match or match[2] not in (None, "full", *MIXERS):
            raise UsageError(
                f"model.pattern={pattern!r}: cannot read {part!r}. Write 'full', a window in tokens, or a "
                f"recurrent layer ({', '.join(MIXERS)}) with options such as 'lightning:decay=fla', "
                f"each with an optional count, such as '512*3,full'.{nearest(part, ('full', *MIXERS))}"
            )
        if match[1] == "full":
            spec = LayerSpec()
        elif match[2]:
            defaults = {name: _defaults(mixer) for name, mixer in MIXERS.items()}
            text = f"{match[2]}:{(match[3] or '').replace('/', ',')}"
            kind, options = parse_choice(text, defaults, name="model.pattern")
            spec = LayerSpec.recurrent(MIXERS[kind](**options))
        else:
            spec = LayerSpec(int(match[1]))
        count = int(match[4] or 1)
        if len(specs) + count > MAX_DEPTH:
            raise UsageError(f"model.pattern={pattern!r} has more than {MAX_DEPTH} layers.")
        specs += [spec] * count
    return tuple(specs)


def _defaults(mixer: type) -> dict:
    return {field.name: field.default for field in dataclasses.fields(mixer)}


def _size(
    depth: int, width: int, heads: int, kv_heads: int, ffn: int, head_dim: int = 0, tied: bool = False
) -> dict:
    return dict(
        depth=depth,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim or width // heads,
        ffn=ffn,
        tied=tied,
    )


PRESETS: dict[str, dict] = {
    "nano": _size(4, 128, 2, 2, 384),
    "10m": _size(6, 384, 6, 6, 1024),
    "30m": _size(8, 512, 8, 4, 1536),
    "125m": _size(12, 768, 12, 4, 2304),
    "350m": _size(24, 1024, 16, 8, 2816),
    "760m": _size(24, 1536, 12, 4, 4096, head_dim=128),
    "1.3b": _size(24, 2048, 16, 8, 5632),
    "3b": _size(28, 3072, 24, 8, 8192),
    "7b": _size(32, 4096, 32, 8, 14336),
}


def preset(name: str, *, vocab_size: int = 257, **overrides) -> TransformerConfig:
    """The `TransformerConfig` of a size from `PRESETS`, with fields replaced.

    Raises:
      UsageError: the name or a field is unknown; names the nearest ones.
    """
    if name not in PRESETS:
        raise UsageError(f"Unknown model size {name!r}.{nearest(name, PRESETS)}")
    fields = {f.name for f in dataclasses.fields(TransformerConfig)}
    for key in overrides:
        if key not in fields:
            raise UsageError(f"Unknown model field {key!r}.{nearest(key, fields)}")
    return TransformerConfig(**{"vocab_size": vocab_size, **PRESETS[name], **overrides})
