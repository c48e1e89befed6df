"""The decoder.

Read from the bottom: `Transformer` embeds tokens, sends the residual stream
through its layers (`stages.py`) and projects to logits. A `Block` is a pre-norm mixer, an attention or
a recurrent layer (`blockjax.recurrence`), and a pre-norm SwiGLU. What they read of earlier
outputs the stream decides (`blockjax.depth`), and what a mixer *sees* the `attend` callable
or the `Past` that each block is handed, so training, prefill, cached decoding and
sequence parallelism run the same layers.

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
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from blockjax.depth import DepthQueries, Stream
from blockjax.errors import UsageError, nearest
from blockjax.kernels import block_sparse_attention, linear_attention
from blockjax.models import stages
from blockjax.models.config import TransformerConfig
from blockjax.models.layer_spec import LayerSpec
from blockjax.models.tied import Condition, Tied
from blockjax.parallel.attention import attention
from blockjax.parallel.layouts import Layout
from blockjax.parallel.mesh import constrain, cut, mesh_axis, parts
from blockjax.parameters import RMSNorm, apply_rope, rope_table, weight
from blockjax.recurrence import Past

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # q, k, v -> o
Probe = Callable[[jax.Array, jax.Array, LayerSpec, jax.Array | None], Any]

See = Attend | Past  # what a mixer is handed: an attention the one, a recurrent layer the other

MATMUL_INPUT = "matmul_input"
RESIDUALS = block_sparse_attention.RESIDUAL, linear_attention.RESIDUAL


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
    "dots": _keep(stages.CARRY, *RESIDUALS),
    "matmuls": _keep(stages.CARRY, *RESIDUALS, MATMUL_INPUT),
}


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
    """A mixer or an MLP behind a norm.

    Attributes:
      norm: of what the residual stream gives.
      run: [B, T, M] from the norm -> [B, T, M], and the memory of a recurrent layer or None.
      stream: [M] that multiplies the residual stream afterwards, in a tied layer; or None.
    """

    norm: RMSNorm
    run: Callable[[jax.Array], tuple[jax.Array, Any]]
    stream: jax.Array | None = None


class Block(nnx.Module):
    """One layer: two sublayers, a mixer and an MLP, each behind a norm."""

    def __init__(self, config: TransformerConfig, spec: LayerSpec, *, rngs: nnx.Rngs):
        if spec.mixer is None:
            self.attention_norm = RMSNorm(config.width, config.norm_eps)
            self.attention = Attention(config, rngs=rngs)
        else:
            self.recurrence_norm = RMSNorm(config.width, config.norm_eps)
            self.recurrence = spec.mixer.build(config, rngs=rngs)
        self.recurrent = spec.mixer is not None
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config, rngs=rngs)

    def sublayers(self, rope: tuple[jax.Array, jax.Array], see: See) -> tuple[Sublayer, Sublayer]:
        """What the layer adds to the residual stream."""

        def attention(x: jax.Array) -> tuple[jax.Array, None]:
            return self.attention(checkpoint_name(x, MATMUL_INPUT), rope, see), None

        def recurrence(x: jax.Array) -> tuple[jax.Array, Any]:
            return self.recurrence(checkpoint_name(x, MATMUL_INPUT), see)

        def mlp(x: jax.Array) -> tuple[jax.Array, None]:
            return self.mlp(checkpoint_name(x, MATMUL_INPUT)), None

        if self.recurrent:
            mixer = Sublayer(self.recurrence_norm, recurrence)
        else:
            mixer = Sublayer(self.attention_norm, attention)
        return mixer, Sublayer(self.mlp_norm, mlp)


class Inspection(NamedTuple):
    """What `Transformer.inspect` saw.

    Attributes:
      probes: what the probe returned, each leaf with the layers that are attentions, in order, in front;
        None without a probe or without such layers.
      depth_weights: [readers, sources, B, T, heads] float32, see `Stream.weights`; None under `prenorm`.
    """

    probes: Any
    depth_weights: jax.Array | None


def _blocks(config: TransformerConfig, count: int, rngs: nnx.Rngs) -> nnx.Dict:
    return nnx.Dict({f"slot_{i}": Block(config, config.period[i], rngs=rngs) for i in range(count)})


class Transformer(nnx.Module):
    """A decoder-only transformer.

    Parameters of whole periods are stacked: `periods` holds one `Block` per
    slot of the period, each leaf with a leading axis "layers". Layers beyond
    the last whole period are in `tail`, unstacked. Layers of `config.loop` are there once, however often they
    are applied.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        if config.remat not in REMAT:
            raise UsageError(f"Unknown remat policy {config.remat!r}.{nearest(config.remat, REMAT)}")
        self.config = config
        repeats, rest = divmod(config.distinct, len(config.period))
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
        layers, inner = config.conditioned, config.condition
        self.condition = Condition(layers, config.width, inner, rngs=rngs) if layers else None

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

    def advance(
        self,
        tokens: jax.Array,
        memory: dict,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        locality: jax.Array | float | None = None,
    ) -> tuple[jax.Array, dict]:
        """`hidden` of tokens that come after others, and the memory of recurrent layers after them.

        The first document of each row goes on where the memory ends; attention sees these tokens only.

        Args:
          memory: from `memory` or an earlier call, possibly with rows set back by `recurrence.forget`.
        """
        layout = self.layout(tokens.shape[1])
        hidden, _, after = self._forward(tokens, positions, segment_ids, locality, layout, memory=memory)
        return hidden, after

    def with_repeats(self, repeats: int) -> Transformer:
        """The decoder with the same parameters that applies each part of `config.loop` with a `*` so often.

        Raises:
          UsageError: there is no such part.
        """
        model = nnx.merge(*nnx.split(self))
        model.config = self.config.with_repeats(repeats)
        return model

    def gains(self) -> list[jax.Array | None]:
        """Of each run of `config.loop`, what `Condition` gives its layers, [layers, 3, M], or None."""
        found, first = [], 0
        for run in self.config.runs:
            gains = None
            if run.looped and self.condition is not None:
                gains = self.condition(slice(first, first + run.count), jnp.arange(run.repeats))
                gains, first = gains.reshape(-1, *gains.shape[2:]), first + run.count
            found.append(gains)
        return found

    def memory(self, batch: int) -> dict:
        """What the recurrent layers remember of B rows before the first token: zeros.

        Returns:
          {"layer_0": ...} of the layers that are recurrent, [B, ...] each; of one that is applied several
          times, each time.
        """

        def empty() -> dict:
            blocks = list(self.distinct())
            layers = [(i, blocks[owner]) for i, owner in enumerate(self.config.owners)]
            return {f"layer_{i}": block.recurrence.empty(batch) for i, block in layers if block.recurrent}

        # Only shapes: to cut a layer out of the stack would copy its weights.
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(empty))

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

    def activations(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """The residual stream before the first layer and after each, [L + 1, B, T, M] in `config.dtype`.

        Arguments as in `hidden`; one layer is compiled after the other.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segments, rope = self.segments(tokens, positions), self.rope(positions)
        x = [self.embed(tokens)]
        for block, spec in self.layers():
            x.append(self.through(x[-1], block, rope, self.sees(spec, segment_ids, segments)))
        return jnp.stack(x)

    def through(self, x: jax.Array, block: Block | Tied, rope: tuple[jax.Array, jax.Array], see: See):
        """The residual stream x [B, T, M] after a layer; under `prenorm`.

        Raises:
          UsageError: the model has depth attention, whose layers read more than the stream.
        """
        if self.config.residual != "prenorm":
            raise UsageError(
                f"The stream of a model with model.residual={self.config.residual!r} does not say alone what "
                "a layer makes of it; this needs 'prenorm'."
            )
        stream = self.stream(x)
        stages.run_layer(stream, 0, block.sublayers(rope, see))
        return stream.partial

    def sees(self, spec: LayerSpec, segment_ids: jax.Array | None, segments: jax.Array | None = None) -> See:
        """What a mixer is handed of whole sequences, with nothing before them."""
        if spec.mixer is not None:
            return Past(None, segment_ids, False, spec.layer)
        return self.attend(spec, spec.ids(segment_ids, segments))

    def _forward(
        self, tokens, positions, segment_ids, locality, layout, probe=None, record=False, memory=None
    ):
        lay = (lambda x: x) if layout is None else layout.apply
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segments = self.segments(tokens, positions)
        documents = None if segment_ids is None else lay(segment_ids)

        def see(spec: LayerSpec, seen: list, memory) -> See:
            if spec.mixer is not None:
                return Past(memory, documents, memory is not None, spec.layer, layout)
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
        seen, after = stages.run(self, stream, rope, see, table, remat, memory)
        hidden = stream.output(self.final_norm)
        if not record:
            return hidden, None, after
        seen = [part for part in seen if part is not None]
        probes = jax.tree.map(lambda *parts: jnp.concatenate(parts), *seen) if seen else None
        return hidden, Inspection(probes, stream.weights()), after

    def run_layers(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        layers: Sequence[tuple[Block | Tied, LayerSpec]],
        sees: Iterable[See],
    ) -> tuple[jax.Array, list]:
        """Sends x [B, T, M] through `layers`, one after the other, each with what its mixer sees.

        Returns:
          What the output head reads, [B, T, M], and the memory of each layer, None of attentions.
        """
        stream, memories = self.stream(x), []
        for i, ((block, _), see) in enumerate(zip(layers, sees, strict=True)):
            memories.append(stages.run_layer(stream, i, block.sublayers(rope, see)))
        return stream.output(self.final_norm), memories

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
        segments = self.segments(tokens, positions)
        config = self.config

        def pairs(spec: LayerSpec) -> jax.Array:
            seen = spec.keys_seen(positions, spec.ids(segment_ids, segments))
            return jnp.sum(seen.astype(jnp.float32))

        rows = config.rows(None)
        fixed = collections.Counter(spec for spec in rows if spec.attends)
        total = jnp.zeros((), jnp.float32)
        moving = np.array([i for i, spec in enumerate(rows) if spec.mixer is None and config.locality])
        if moving.size:
            fixed = {spec: n for spec, n in fixed.items() if spec.mixer is not None}
            table = jax.tree.map(lambda x: jnp.asarray(x)[moving], config.table(locality))
            total += jnp.sum(jax.lax.map(pairs, table))
        return total + sum(n * pairs(spec) for spec, n in fixed.items())

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

    def layers(self) -> Iterator[tuple[Block | Tied, LayerSpec]]:
        """Every layer in order with its row of the table, unstacked; for decoding and inspection.

        A tied layer is there each time that it is applied.
        """
        blocks = list(self.distinct())
        gains = [
            row
            for run, part in zip(self.config.runs, self.gains(), strict=True)
            for row in (part if part is not None else [None] * (run.count * run.repeats))
        ]
        for owner, spec, row in zip(self.config.owners, self.config.layers(), gains, strict=True):
            yield blocks[owner] if row is None else Tied(blocks[owner], row), spec

    def distinct(self) -> Iterator[Block]:
        """The layers with weights of their own, unstacked."""
        graph, stacked = nnx.split(self.periods)
        for repeat in range(self.config.distinct // len(self.config.period)):
            blocks = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[repeat], stacked))  # noqa: B023
            yield from (blocks[f"slot_{i}"] for i in range(len(blocks)))
        yield from (self.tail[f"slot_{i}"] for i in range(len(self.tail)))


def logical_axes(model: Transformer) -> dict:
    """The tree of parameters with the logical names of each one's dimensions as leaves."""

    def axes(path, param: nnx.Param) -> tuple[str, ...]:
        stacked = path[0].key == "periods"
        return ("layers",) * stacked + param.get_metadata("axes")

    state = nnx.state(model, nnx.Param)
    is_param = lambda leaf: isinstance(leaf, nnx.Param)  # noqa: E731
    return nnx.to_pure_dict(jax.tree_util.tree_map_with_path(axes, state, is_leaf=is_param))
