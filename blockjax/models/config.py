"""What a decoder is made of: sizes, and a table with one row per layer."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import jax
import numpy as np

from blockjax.arguments import parse_choice
from blockjax.depth import Residual
from blockjax.errors import UsageError, nearest
from blockjax.locality import Locality
from blockjax.masks.predicates import array_module
from blockjax.models.layer_spec import LayerSpec, unstack
from blockjax.parallel.layouts import LAYOUTS, Layout
from blockjax.parallel.schedules import SCHEDULES
from blockjax.recurrence import MIXERS, num_params

DTYPES = ("float32", "bfloat16", "float64")  # the last to compare with oracles
STACKS = ("scan", "bucket", "unroll")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and options of the decoder in `transformer.py`.

    Attributes:
      vocab_size: V, rows of the embedding.
      depth: L, number of layers.
      width: M, size of the residual stream.
      heads, kv_heads, head_dim: N, K, H. N is a multiple of K (grouped-query attention).
      ffn: F, inner width of the SwiGLU.
      pattern: one period of the layer table, repeated and cut to `depth`:
        comma-separated `full`, a window in tokens, or a recurrent layer of
        `recurrence.MIXERS` with options after a colon, each with an optional
        count, for example `512*3,full` or `lightning:decay=fla/scale=0.1*3,512`.
      locality: instead of windows in `pattern`, a schedule of locality over
        depth such as `beta:5` or `beta:5,mode=segment`; see `locality.Locality`.
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
            if getattr(self, name) < 1:
                raise UsageError(f"model.{name}={getattr(self, name)} must be at least 1.")
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

    @property
    def period(self) -> tuple[LayerSpec, ...]:
        """The layers of one period; what a scan step runs."""
        return parse_pattern(self.pattern)[: self.depth]

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
          UsageError: they do not divide, or layers are recurrent.
        """
        if self.recurrent:
            raise UsageError(
                f"model.pattern={self.pattern!r} has recurrent layers, which need whole sequences on a "
                f"device: set mesh.seq=1, not {devices}; mesh.data, fsdp and tensor may cut the model."
            )
        chunks = devices * (2 if self.layout == "zigzag" else 1)
        block = max(1, min(self.attention_block, tokens // chunks))
        if tokens % (chunks * block):
            raise UsageError(
                f"Sequences of {tokens} tokens do not divide into {chunks} chunks of whole blocks of {block} "
                f"(layout={self.layout!r} over {devices} devices); change the length, mesh.seq, or "
                f"model.attention_block={self.attention_block}."
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
        rows = [self.period[i % len(self.period)] for i in range(self.depth)]
        if table is None:
            return tuple(rows)
        return tuple(row.with_columns(unstack(table, i)) for i, row in enumerate(rows))

    def num_params(self, *, embedding: bool = True) -> int:
        """Number of parameters; without the input embedding if it is not the head too."""
        attention = self.width * self.head_dim * 2 * (self.heads + self.kv_heads)
        attention += 2 * self.head_dim if self.qk_norm else 0
        mixers = [spec.mixer for spec in self.layers()]
        layers = sum(attention if mixer is None else num_params(mixer, self) for mixer in mixers)
        layers += self.depth * (3 * self.width * self.ffn + 2 * self.width)
        tables = self.vocab_size * self.width * (1 if self.tied or not embedding else 2)
        return layers + tables + self.width + self.residual_rule.num_params(self.width)


def parse_pattern(pattern: str) -> tuple[LayerSpec, ...]:
    """Reads `512*3,full` as three layers with a window of 512 and one without.

    Raises:
      UsageError: a part that is neither, nor a recurrent layer, or an option that its kind does not have.
    """
    specs = []
    for part in map(str.strip, pattern.split(",")):
        match = re.fullmatch(r"(full|[1-9]\d*|([a-z]+)(?::([^*]*))?)(?:\*([1-9]\d*))?", part)
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
        specs += [spec] * int(match[4] or 1)
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
