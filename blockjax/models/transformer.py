"""The decoder.

Read from the bottom: `Transformer` embeds tokens, sends the residual stream
through its layers (`stages.py`) and projects to logits. A `Block` is a pre-norm
attention and a pre-norm SwiGLU. What they read of earlier outputs the stream
decides (`blockjax.depth`), and what attention *sees* the `attend` callable that
each block is handed, so training, prefill, cached decoding and sequence
parallelism run the same layers.

Shapes: B batch, T tokens, L layers, M width, N query heads, K key/value heads,
H head dim, F inner width, V vocabulary.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from blockjax.depth import DepthQueries, Stream
from blockjax.errors import UsageError, nearest
from blockjax.kernels.block_sparse_attention import RESIDUAL
from blockjax.models import stages
from blockjax.models.config import TransformerConfig
from blockjax.models.layer_spec import LayerSpec
from blockjax.parallel.attention import attention
from blockjax.parallel.layouts import Layout
from blockjax.parallel.mesh import constrain, cut, mesh_axis, parts

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # q, k, v -> o
Probe = Callable[[jax.Array, jax.Array, LayerSpec, jax.Array | None], Any]

MATMUL_INPUT = "matmul_input"


def _keep(*names: str) -> Callable:
    """Keeps what is so named and what matmuls with weights (those without batch dimensions) result in."""
    policies = jax.checkpoint_policies
    named = policies.save_only_these_names(*names)
    policy = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, named)
    return functools.partial(jax.checkpoint, policy=policy)


# What the backward of a period keeps: everything, the inputs, or also what attention works on and what
# matmuls result in, or read, too. Of a whole depth block it keeps the inputs of all its periods.
REMAT: dict[str, Callable] = {
    "none": lambda step: step,
    "full": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(stages.CARRY)
    ),
    "dots": _keep(stages.CARRY, RESIDUAL),
    "matmuls": _keep(stages.CARRY, RESIDUAL, MATMUL_INPUT),
}


def weight(rngs: nnx.Rngs, axes: dict[str, int], *, fan_in: int, scale: float = 1.0) -> nnx.Param:
    """A normal weight of standard deviation scale / sqrt(fan_in), float32.

    Args:
      axes: logical name -> size of each dimension; the names say how
        `parallel.mesh` shards it and which dimensions Muon orthogonalises.
    """
    value = jax.random.normal(rngs.params(), tuple(axes.values()), jnp.float32)
    return nnx.Param(value * (scale * fan_in**-0.5), axes=tuple(axes))


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * gain, computed in float32 (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float):
        self.gain = nnx.Param(jnp.ones(size, jnp.float32), axes=("gain",))
        self.eps = eps

    def __call__(self, x: jax.Array, eps: float | None = None) -> jax.Array:
        """x [..., size] -> the same; `eps` replaces the norm's own."""
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        eps = self.eps if eps is None else eps
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
        return (y * self.gain[...]).astype(x.dtype)


def rope_table(positions: jax.Array, head_dim: int, base: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, 1, H/2] of the rotary angles (arXiv:2104.09864, eq. 15)."""
    frequency = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns feature i with feature i + H/2 of x [B, T, N, H]."""
    cos, sin = table
    a, b = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention around an `attend` callable."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        c = config
        self.q = weight(rngs, dict(model=c.width, heads=c.heads, head_dim=c.head_dim), fan_in=c.width)
        self.k = weight(rngs, dict(model=c.width, kv_heads=c.kv_heads, head_dim=c.head_dim), fan_in=c.width)
        self.v = weight(rngs, dict(model=c.width, kv_heads=c.kv_heads, head_dim=c.head_dim), fan_in=c.width)
        self.o = weight(
            rngs,
            dict(heads=c.heads, head_dim=c.head_dim, model=c.width),
            fan_in=c.heads * c.head_dim,
            scale=(2 * c.depth) ** -0.5,
        )
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None

    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend) -> jax.Array:
        """x [B, T, M] -> [B, T, M]."""
        q = jnp.einsum("BTM,MNH->BTNH", x, self.q[...].astype(x.dtype))
        k = jnp.einsum("BTM,MKH->BTKH", x, self.k[...].astype(x.dtype))
        v = jnp.einsum("BTM,MKH->BTKH", x, self.v[...].astype(x.dtype))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        o = attend(q, k, v)
        return jnp.einsum("BTNH,NHM->BTM", o, self.o[...].astype(x.dtype))


class SwiGLU(nnx.Module):
    """(silu(x Wg) * (x Wu)) Wd (arXiv:2002.05202, eq. 6)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        c = config
        self.gate = weight(rngs, dict(model=c.width, ffn=c.ffn), fan_in=c.width)
        self.up = weight(rngs, dict(model=c.width, ffn=c.ffn), fan_in=c.width)
        self.down = weight(rngs, dict(ffn=c.ffn, model=c.width), fan_in=c.ffn, scale=(2 * c.depth) ** -0.5)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = jnp.einsum("BTM,MF->BTF", x, self.gate[...].astype(x.dtype))
        up = jnp.einsum("BTM,MF->BTF", x, self.up[...].astype(x.dtype))
        product = checkpoint_name(jax.nn.silu(gate) * up, MATMUL_INPUT)
        return jnp.einsum("BTF,FM->BTM", product, self.down[...].astype(x.dtype))


class Sublayer(NamedTuple):
    """An attention or an MLP: [B, T, M] from the norm of what the residual stream gives -> [B, T, M]."""

    norm: RMSNorm
    run: Callable[[jax.Array], jax.Array]


class Block(nnx.Module):
    """One layer: two sublayers, attention and MLP, each behind a norm."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config, rngs=rngs)

    def sublayers(self, rope: tuple[jax.Array, jax.Array], attend: Attend) -> tuple[Sublayer, Sublayer]:
        """What the layer adds to the residual stream."""

        def attention(x: jax.Array) -> jax.Array:
            return self.attention(checkpoint_name(x, MATMUL_INPUT), rope, attend)

        def mlp(x: jax.Array) -> jax.Array:
            return self.mlp(checkpoint_name(x, MATMUL_INPUT))

        return Sublayer(self.attention_norm, attention), Sublayer(self.mlp_norm, mlp)


class Inspection(NamedTuple):
    """What `Transformer.inspect` saw.

    Attributes:
      probes: what the probe returned, each leaf with the layers, [L, ...], in front; None without one.
      depth_weights: [readers, sources, B, T, heads] float32, see `Stream.weights`; None under `prenorm`.
    """

    probes: Any
    depth_weights: jax.Array | None


def _blocks(config: TransformerConfig, count: int, rngs: nnx.Rngs) -> nnx.Dict:
    return nnx.Dict({f"slot_{i}": Block(config, rngs=rngs) for i in range(count)})


class Transformer(nnx.Module):
    """A decoder-only transformer.

    Parameters of whole periods are stacked: `periods` holds one `Block` per
    slot of the period, each leaf with a leading axis "layers". Layers beyond
    the last whole period are in `tail`, unstacked.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        if config.remat not in REMAT:
            raise UsageError(f"Unknown remat policy {config.remat!r}.{nearest(config.remat, REMAT)}")
        self.config = config
        repeats, rest = divmod(config.depth, len(config.period))
        # Unit variance after the scaling in `embed`, and logits of unit variance if tied.
        table = dict(vocab=config.vocab_size, model=config.width)
        self.embedding = weight(rngs, table, fan_in=config.width)

        @nnx.split_rngs(splits=repeats)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> nnx.Dict:
            return _blocks(config, len(config.period), rngs)

        self.periods = stacked(rngs)
        self.tail = _blocks(config, rest, rngs)
        residual = config.residual_rule
        self.depth = DepthQueries(residual, config.width) if residual.readers else None
        self.final_norm = RMSNorm(config.width, config.norm_eps)
        head = dict(model=config.width, vocab=config.vocab_size)
        self.head = None if config.tied else weight(rngs, head, fan_in=config.width)

    def __call__(
        self, tokens: jax.Array, *, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """Logits [B, T, V] float32 of tokens [B, T] int32; see `hidden`."""
        hidden = self.hidden(tokens, positions=positions, segment_ids=segment_ids)
        layout = self.layout(tokens.shape[1])
        return self.logits(hidden if layout is None else layout.restore(hidden))

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        locality: jax.Array | float | None = None,
    ) -> jax.Array:
        """What the output head reads.

        Args:
          tokens: [B, T] int32.
          positions: [B, T] int32, offset in the document, for RoPE and segments; defaults to 0..T-1.
          segment_ids: [B, T] int32 of documents; a token sees its own only, a
            negative id marks padding.
          locality: of all layers, or [L]; may be traced. Defaults to the schedule of the config.

        Returns:
          [B, T, M] in `config.dtype`, tokens in the order of `layout(T)`, if there is one: activations do
          not move between devices only to be in the order of the sequence.
        """
        layout = self.layout(tokens.shape[1])
        return self._forward(tokens, positions, segment_ids, locality, layout)[0]

    def inspect(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        locality: jax.Array | float | None = None,
        probe: Probe | None = None,
    ) -> Inspection:
        """Looks at what happens inside; arguments as in `hidden`.

        Args:
          probe: called in each layer as `probe(q, k, spec, ids)`: queries and keys after RoPE, the row
            of the layer table, and its segment ids ([B, T] int32 or None). Returns arrays.
        """
        return self._forward(tokens, positions, segment_ids, locality, None, probe, record=True)[1]

    def _forward(self, tokens, positions, segment_ids, locality, layout, probe=None, record=False):
        lay = (lambda x: x) if layout is None else layout.apply
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segments = self.segments(tokens, positions)

        def attend(spec: LayerSpec, seen: list) -> Attend:
            ids = spec.ids(segment_ids, segments)
            ids = None if ids is None else lay(ids)

            def call(q, k, v):
                if probe is not None:
                    seen.append(probe(q, k, spec, ids))
                return self.attend(spec, ids, layout)(q, k, v)

            return call

        stream = self.stream(self.embed(lay(tokens)), record=record)
        # There is no backward to an inspection.
        remat = REMAT["none" if record else self.config.remat]
        rope, table = self.rope(lay(positions)), self.config.table(locality)
        seen = stages.run(self, stream, rope, attend, table, remat)
        hidden = stream.output(self.final_norm)
        if not record:
            return hidden, None
        probes = None if probe is None else jax.tree.map(lambda *parts: jnp.concatenate(parts), *seen)
        return hidden, Inspection(probes, stream.weights())

    def run_layers(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        layers: Sequence[tuple[Block, LayerSpec]],
        attends: Iterable[Attend],
    ) -> jax.Array:
        """Sends x [B, T, M] through `layers`, one after the other, each with its own attention.

        Returns:
          What the output head reads, [B, T, M].
        """
        stream = self.stream(x)
        for i, ((block, _), attend) in enumerate(zip(layers, attends, strict=True)):
            stages.run_layer(stream, i, block.sublayers(rope, attend))
        return stream.output(self.final_norm)

    def stream(self, x: jax.Array, record: bool = False) -> Stream:
        """The residual stream that starts with the embedding x [B, T, M]."""
        return Stream(self.config.residual_rule, self.depth, x, eps=self.config.norm_eps, record=record)

    def layout(self, tokens: int) -> Layout | None:
        """Which tokens of a sequence lie on each device, where the mesh cuts sequences; else None."""
        devices = parts("time")
        return None if devices == 1 else self.config.sequence_layout(tokens, devices)

    def attend(self, spec: LayerSpec, ids: jax.Array | None, layout: Layout | None = None) -> Attend:
        """Attention of whole sequences.

        Args:
          spec: what the layer sees.
          ids: [B, T] int32 from `spec.ids`, or None; in the order of `layout`.
          layout: in whose order tokens lie; None: in that of the sequence.
        """
        block = self.config.attention_block if layout is None else layout.block

        def attend(q, k, v):
            # What does not divide over the mesh every device computes whole.
            return attention(
                q,
                k,
                v,
                spec.mask(q.shape[1], block),
                axis=mesh_axis("time"),
                schedule=self.config.schedule,
                layout=layout or "contiguous",
                ulysses=self.config.ulysses,
                batch=cut("batch", q.shape[0]),
                heads=cut("kv_heads", k.shape[2]),
                soft_cap=self.config.soft_cap or None,
                q_segment_ids=ids,
                kv_segment_ids=ids,
                bias=spec.bias(q.shape[2]),
            )

        return attend

    def segments(self, tokens: jax.Array, positions: jax.Array) -> jax.Array | None:
        """Index of each token's segment in its document, [B, T] int32; None without segments."""
        boundaries = self.config.local_rule.boundaries
        return None if boundaries is None else boundaries.segments(tokens, positions, self.embedding[...])

    def visible_pairs(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        locality: jax.Array | float | None = None,
    ) -> jax.Array:
        """Pairs of a query and a key that it sees, summed over layers and tokens; float32.

        Arguments as in `hidden`.
        """
        segments, table = self.segments(tokens, positions), self.config.table(locality)

        def pairs(spec: LayerSpec) -> jax.Array:
            seen = spec.keys_seen(positions, spec.ids(segment_ids, segments))
            return jnp.sum(seen.astype(jnp.float32))

        if table is not None:
            return jnp.sum(jax.lax.map(pairs, jax.tree.map(jnp.asarray, table)))
        return sum(n * pairs(spec) for spec, n in collections.Counter(self.config.layers()).items())

    def embed(self, tokens: jax.Array) -> jax.Array:
        """[B, T] int32 -> [B, T, M] of unit variance, in `config.dtype`."""
        # Rows are whole when they are looked up: else activations would be cut along M, and gathered.
        table = constrain(self.embedding[...], ("vocab", None))
        x = jnp.take(table, tokens, axis=0) * self.config.width**0.5
        return constrain(x.astype(self.config.dtype), ("batch", "time", None))

    def rope(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Rotary table of positions [B, T]."""
        return rope_table(positions, self.config.head_dim, self.config.rope_base)

    def head_weight(self) -> jax.Array:
        """[M, V] float32; the transposed embedding if tied."""
        return self.embedding[...].T if self.head is None else self.head[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, T, M] -> [B, T, V] float32; float64 stays float64."""
        w = self.head_weight().astype(hidden.dtype)
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        return jnp.einsum("BTM,MV->BTV", hidden, w, preferred_element_type=wide)

    def layers(self) -> Iterator[tuple[Block, LayerSpec]]:
        """Every layer in order with its row of the table, unstacked; for decoding and inspection."""
        graph, stacked = nnx.split(self.periods)
        specs = iter(self.config.layers())
        for repeat in range(self.config.depth // len(self.config.period)):
            blocks = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[repeat], stacked))  # noqa: B023
            yield from ((blocks[f"slot_{i}"], next(specs)) for i in range(len(blocks)))
        yield from ((self.tail[f"slot_{i}"], spec) for i, spec in enumerate(specs))


def logical_axes(model: Transformer) -> dict:
    """The tree of parameters with the logical names of each one's dimensions as leaves."""

    def axes(path, param: nnx.Param) -> tuple[str, ...]:
        stacked = path[0].key == "periods"
        return ("layers",) * stacked + param.get_metadata("axes")

    state = nnx.state(model, nnx.Param)
    is_param = lambda leaf: isinstance(leaf, nnx.Param)  # noqa: E731
    return nnx.to_pure_dict(jax.tree_util.tree_map_with_path(axes, state, is_leaf=is_param))
