"""The Block-Recurrent Transformer: state vectors that read a block of tokens and are read by the next.

Source: Block-Recurrent Transformers (arXiv:2203.07852), with its released code where the two differ. Other
than there, tokens see themselves, distances are told by RoPE, and a fresh document has no keys of zeros to
look at. Only the path of the states is serial: it is scanned alone, and tokens of all blocks then read the
states together.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from blockjax.errors import UsageError
from blockjax.kernels.block_sparse_attention import block_sparse_attention
from blockjax.kernels.linear_attention.api import count_documents
from blockjax.masks import BlockMask, Window
from blockjax.parallel.mesh import cut
from blockjax.parameters import RMSNorm, apply_rope, rope_table, weight
from blockjax.partials import wide
from blockjax.recurrence.mixer import Mixer, Sizes, Work, unit
from blockjax.recurrence.past import Past

GATES = ("fixed", "lstm")
CELLS = ("skip", "dual", "single")


@dataclasses.dataclass(frozen=True)
class BlockRecurrent(Mixer):
    """A layer whose tokens see a window and the state vectors that the block before left.

    Attributes:
      window: tokens of a block, and those that a token sees, itself included.
      states: S, number of state vectors.
      gate: what of a state vector is kept: `fixed`, sigma(b) of each channel, or `lstm`, a forget and an
        input gate from what the states read.
      cell: what is written: `skip`, the projection of what the states read; `dual`, after it an MLP with a
        gate of its own; `single`, tanh of an MLP in place of the projection.
    """

    kind = "brt"
    serial = True  # states are read through a softmax: what they do to the next ones is no affine map

    window: int = 512
    states: int = 512
    gate: str = "fixed"
    cell: str = "skip"

    def check(self, sizes: Sizes) -> None:
        self.least(window=1, states=1)
        for name, choices in (("gate", GATES), ("cell", CELLS)):
            if getattr(self, name) not in choices:
                known = " or ".join(map(repr, choices))
                raise UsageError(f"model.pattern: {name}={getattr(self, name)!r} of brt must be {known}.")

    def build(self, sizes: Sizes, *, rngs: nnx.Rngs) -> nnx.Module:
        return BlockRecurrentLayer(self, sizes, rngs=rngs)

    def work(self, sizes: Sizes) -> Work:
        """Pairs with states, and what weights of states do more often than once a token, or less."""
        M, F, N, K, H = sizes.width, sizes.ffn, sizes.heads, sizes.kv_heads, sizes.head_dim
        S, W = self.states, self.window
        pairs = S * S / W + 2 * S + S  # states with states, states with two blocks, tokens with states
        weights = M * H * 2 * (N + K) + (2 * N * H * F + F * M if self.cell == "single" else 2 * N * H * M)
        weights += 2 * M * F if self.cell == "dual" else 0
        flops = 4 * N * H * pairs + 2 * weights * (S / W - 1)
        return Work(flops, flops)


class Memory(NamedTuple):
    """What the layer remembers; a row of zeros is the start of a document.

    Attributes:
      states: [B, S, M] float32, after the last whole block.
      keys, values: [B, 2 W, K, H] of the last whole block and of the tokens after it; keys without RoPE.
      count: [B] int32, how many tokens came after the last whole block.
      seen: [B] int32, how many of the last tokens are of the document that goes on, at most 2 W.
    """

    states: jax.Array
    keys: jax.Array
    values: jax.Array
    count: jax.Array
    seen: jax.Array


class Reads(NamedTuple):
    """Projections of states, [B, S, heads, H]: queries to states and to tokens, keys and values."""

    q: jax.Array
    q_tokens: jax.Array
    k: jax.Array
    v: jax.Array


class Gate(nnx.Module):
    """How a state vector and what is written to it are mixed, float32 (arXiv:2203.07852, sec. 3.2).

    Args:
      kind: of `GATES`.
      inputs: shape of what an `lstm` gate reads: logical name -> size.
    """

    def __init__(self, kind: str, width: int, inputs: dict[str, int], *, rngs: nnx.Rngs):
        bias = lambda: nnx.Param(0.1 * jax.random.normal(rngs.params(), (width,)), axes=("gain",))  # noqa: E731
        self.forget_bias, self.names = bias(), "BS" + "YZ"[: len(inputs)]
        self.lstm = kind == "lstm"
        if self.lstm:
            fan_in = functools.reduce(int.__mul__, inputs.values())
            shape = inputs | dict(model=width)
            self.forget, self.input = (weight(rngs, shape, fan_in=fan_in, scale=0.1**0.5) for _ in "fi")
            self.input_bias = bias()

    def __call__(self, s: jax.Array, z: jax.Array, y: jax.Array) -> jax.Array:
        """States s and what is written z, [B, S, M], from what was read y -> [B, S, M] float32."""
        if not self.lstm:
            keep = jax.nn.sigmoid(self.forget_bias[...])
            return keep * s + (1 - keep) * wide(z)
        names = f"{self.names},{self.names[2:]}M->BSM"
        forget, add = (wide(jnp.einsum(names, y, w[...].astype(y.dtype))) for w in (self.forget, self.input))
        keep = jax.nn.sigmoid(forget + self.forget_bias[...] + 1)
        return keep * s + jax.nn.sigmoid(add + self.input_bias[...] - 1) * wide(z)


class StateMLP(nnx.Module):
    """relu(x W) V (the source has no GLU here); gives the inner activations, too."""

    def __init__(self, sizes: Sizes, inputs: dict[str, int], fan_in: int, *, rngs: nnx.Rngs):
        self.names = "YZ"[: len(inputs)]
        self.up = weight(rngs, inputs | dict(ffn=sizes.ffn), fan_in=fan_in)
        self.down = weight(rngs, dict(ffn=sizes.ffn, model=sizes.width), fan_in=sizes.ffn)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        names = f"BS{self.names},{self.names}F->BSF"
        inner = jax.nn.relu(jnp.einsum(names, x, self.up[...].astype(x.dtype)))
        return jnp.einsum("BSF,FM->BSM", inner, self.down[...].astype(x.dtype)), inner


class BlockRecurrentLayer(nnx.Module):
    """Queries and keys of unit length, with a learned scale for each head and use."""

    def __init__(self, options: BlockRecurrent, sizes: Sizes, *, rngs: nnx.Rngs):
        M, N, K, H = sizes.width, sizes.heads, sizes.kv_heads, sizes.head_dim
        self.options, self.sizes = options, sizes
        queries, keys = dict(model=M, heads=N, head_dim=H), dict(model=M, kv_heads=K, head_dim=H)
        read = dict(heads=2 * N, head_dim=H)  # of two attentions
        # Tokens.
        self.q, self.q_states = (weight(rngs, queries, fan_in=M) for _ in range(2))
        self.k, self.v = (weight(rngs, keys, fan_in=M) for _ in range(2))
        self.o = weight(rngs, read | dict(model=M), fan_in=2 * N * H, scale=(2 * sizes.depth) ** -0.5)
        # States.
        normal = lambda std: std * jax.random.normal(rngs.params(), (options.states, M), jnp.float32)  # noqa: E731
        self.start = nnx.Param(normal(0.1), axes=("gain", "model"))
        self.ids = nnx.Param(normal(1.0), axes=("gain", "model"))
        self.norm = RMSNorm(M, sizes.norm_eps)
        self.state_q, self.state_q_tokens = (weight(rngs, queries, fan_in=M) for _ in range(2))
        self.state_k, self.state_v = (weight(rngs, keys, fan_in=M) for _ in range(2))
        scale = lambda: nnx.Param(jnp.ones(N, jnp.float32), axes=("gain",))  # noqa: E731
        self.scale, self.scale_states = scale(), scale()
        self.state_scale, self.state_scale_tokens = scale(), scale()
        if options.cell == "single":
            self.mlp = StateMLP(sizes, read, 2 * N * H, rngs=rngs)
        else:
            self.state_o = weight(rngs, read | dict(model=M), fan_in=2 * N * H)
        inputs = dict(ffn=sizes.ffn) if options.cell == "single" else read
        self.gate = Gate(options.gate, M, inputs, rngs=rngs)
        if options.cell == "dual":
            self.mlp_norm = RMSNorm(M, sizes.norm_eps)
            self.mlp = StateMLP(sizes, dict(model=M), M, rngs=rngs)
            self.mlp_gate = Gate(options.gate, M, dict(ffn=sizes.ffn), rngs=rngs)

    def empty(self, batch: int) -> Memory:
        """The memory at the start of documents."""
        o, s = self.options, self.sizes
        states = jnp.zeros((batch, o.states, s.width), jnp.promote_types(s.dtype, jnp.float32))
        keys = jnp.zeros((batch, 2 * o.window, s.kv_heads, s.head_dim), s.dtype)
        zero = jnp.zeros(batch, jnp.int32)
        return Memory(states, keys, keys, zero, zero)

    def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, Memory | None]:
        """x [B, T, M] -> [B, T, M], and the memory.

        With a memory that ends within a block, T must be 1; with one that ends with a block, any.
        """
        project = lambda w: jnp.einsum("BTM,MNH->BTNH", x, w[...].astype(x.dtype))  # noqa: E731
        q, q_states, k = (unit(project(w)) for w in (self.q, self.q_states, self.k))
        q, q_states = _scaled(q, self.scale), _scaled(q_states, self.scale_states)
        tokens = q, q_states, k, project(self.v)
        if x.shape[1] == 1 and past.memory is not None:
            read, memory = self._token(*tokens, past.memory)
        else:
            read, memory = self._blocks(*tokens, past)
        y = jnp.einsum("BTNH,NHM->BTM", jnp.concatenate(read, axis=2), self.o[...].astype(x.dtype))
        return y, memory

    def _blocks(self, q, q_states, k, v, past: Past):
        """What tokens read of tokens and of states, [B, T, N, H] each, and the memory."""
        (B, T), W = q.shape[:2], self.options.window
        nb, dtype = -(-T // W), q.dtype
        before = self.empty(B) if past.memory is None else past.memory
        ids = jnp.zeros((B, T), jnp.int32) if past.ids is None else past.ids
        # 0 is the document that goes on, -1 padding.
        documents = jnp.where(ids >= 0, count_documents(ids), -1)
        whole = lambda a, **kw: jnp.pad(a, [(0, 0), (0, nb * W - T)] + [(0, 0)] * (a.ndim - 2), **kw)  # noqa: E731
        q, q_states, documents = whole(q), whole(q_states), whole(documents, constant_values=-1)
        # Tokens as keys: those of the block before, too.
        k, v = (
            jnp.concatenate([m[:, :W].astype(dtype), whole(a)], axis=1)
            for m, a in zip(before[1:3], (k, v), strict=True)
        )
        there = jnp.arange(W) >= W - before.seen[:, None]
        key_documents = jnp.concatenate([jnp.where(there, 0, -1), documents], axis=1)
        end = jnp.broadcast_to(past.end(T), (B,))
        states = jnp.where(before.seen[:, None, None] > 0, before.states, self.start[...])
        (states, owner), owners, keys, values = self._scan(states, k, v, key_documents, end, dtype)

        mask = BlockMask.window(nb * W, (nb + 1) * W, left=W, q_offset=W, **self._tiles(nb * W, (nb + 1) * W))
        table = self._rope(jnp.arange((nb + 1) * W)[None])
        turned = apply_rope(q, tuple(a[:, W:] for a in table)), apply_rope(k, table)
        of_tokens = _attend(*turned, v, mask, documents, key_documents)

        S = self.options.states
        by_block = lambda a: a.reshape(B * nb, W, *a.shape[2:])  # noqa: E731
        own = documents == jnp.repeat(owners, W, axis=1)
        mask = BlockMask.full(W, S, **self._tiles(W, S))
        keys, values = (a.reshape(B * nb, S, *a.shape[3:]) for a in (keys, values))
        visible = jnp.where(own & (documents >= 0), 0, -1)
        of_states = _attend(by_block(q_states), keys, values, mask, by_block(visible))
        of_states = of_states.reshape(B, nb * W, *of_states.shape[2:])
        if past.ids is not None:
            # A document that starts within a block reads the states with which documents start.
            start = self._read(self.start[...][None], dtype)
            keys, values = (jnp.broadcast_to(a, (B, *a.shape[1:])) for a in (start.k, start.v))
            mask = BlockMask.full(nb * W, S, **self._tiles(nb * W, S))
            of_states += _attend(q_states, keys, values, mask, jnp.where(own | (documents < 0), -1, 0))
        read = of_tokens[:, :T], of_states[:, :T]
        return read, self._memory(states, owner, k, v, key_documents, end) if past.keep else None

    def _scan(self, states, k, v, documents, end, dtype):
        """The path of the states through the blocks.

        Args:
          states: [B, S, M] float32, at first.
          k, v: [B, (nb + 1) W, K, H] with the block before in front; documents [B, (nb + 1) W] likewise.
          end: [B] int32, tokens that are not padding; later blocks change nothing.

        Returns:
          The states after the last whole block with the number of their document [B]; and of the states
          that each block finds that number [B, nb], their keys and values [B, nb, S, K, H].
        """
        B, W = len(states), self.options.window
        start = self._read(self.start[...][None], dtype)
        blocks = lambda a: a.reshape(B, -1, W, *a.shape[2:]).swapaxes(0, 1)  # noqa: E731
        k, v, documents = map(blocks, (k, v, documents))
        pairs = [jnp.concatenate([a[:-1], a[1:]], axis=2) for a in (k, v, documents)]
        last = jax.lax.cummax(jnp.maximum(jnp.max(documents[1:], axis=2), 0), axis=0)

        def block(carry, xs):
            states, owner = carry
            k, v, documents, last, i = xs
            own = self._read(states, dtype)
            fresh = last != owner
            choose = lambda a, b: jnp.where(fresh.reshape(-1, *(1,) * (b.ndim - 1)), a, b)  # noqa: E731
            base, reads = choose(self.start[...], states), jax.tree.map(choose, start, own)
            after = self._update(base, reads, k, v, jnp.where(documents == last[:, None], 0, -1))
            complete = end >= (i + 1) * W
            states = jnp.where(complete[:, None, None], after, states)
            return (states, jnp.where(complete, last, owner)), (owner, own.k, own.v)

        xs = *pairs, last, jnp.arange(len(last))
        carry, outs = jax.lax.scan(block, (states, jnp.zeros(B, jnp.int32)), xs)
        return carry, *(a.swapaxes(0, 1) for a in outs)

    def _read(self, states: jax.Array, dtype) -> Reads:
        """Projections of states [B, S, M]."""
        n = (wide(self.norm(states)) + self.ids[...]).astype(dtype)
        project = lambda w: jnp.einsum("BSM,MNH->BSNH", n, w[...].astype(dtype))  # noqa: E731
        q, q_tokens, k = (unit(project(w)) for w in (self.state_q, self.state_q_tokens, self.state_k))
        q, q_tokens = _scaled(q, self.state_scale), _scaled(q_tokens, self.state_scale_tokens)
        return Reads(q, q_tokens, k, project(self.state_v))

    def _update(self, states: jax.Array, reads: Reads, k, v, visible: jax.Array) -> jax.Array:
        """States [B, S, M] after two blocks of tokens k, v [B, 2 W, K, H]; those of `visible` 0 are seen."""
        S, S_tokens = states.shape[1], k.shape[1]
        own = _attend(reads.q, reads.k, reads.v, BlockMask.full(S, S, **self._tiles(S, S)))
        mask = BlockMask.full(S, S_tokens, **self._tiles(S, S_tokens))
        every = jnp.zeros(states.shape[:2], jnp.int32)
        of_tokens = _attend(reads.q_tokens, k, v, mask, every, visible)
        y = jnp.concatenate([own, of_tokens], axis=2)
        if self.options.cell == "single":
            z, inner = self.mlp(y)
            return self.gate(states, jnp.tanh(z), inner)
        z = jnp.einsum("BSNH,NHM->BSM", y, self.state_o[...].astype(y.dtype))
        states = self.gate(states, z, y)
        if self.options.cell == "dual":
            z, inner = self.mlp(self.mlp_norm(states).astype(y.dtype))
            states = self.mlp_gate(states, z, inner)
        return states

    def _memory(self, states, owner, k, v, documents, end) -> Memory:
        """What is remembered after `end` tokens; arguments as `_scan` has them."""
        W = self.options.window
        going_on = jnp.maximum(jnp.max(documents, axis=1), 0)
        states = jnp.where((owner == going_on)[:, None, None], states, self.start[...])
        index = (end // W * W)[:, None] + jnp.arange(2 * W)
        there = index < W + end[:, None]
        index = jnp.minimum(index, k.shape[1] - 1)
        keys, values = (jnp.take_along_axis(a, index[..., None, None], axis=1) for a in (k, v))
        same = jnp.take_along_axis(documents, index, axis=1) == going_on[:, None]
        return Memory(states, keys, values, end % W, jnp.sum(there & same, axis=1, dtype=jnp.int32))

    def _token(self, q, q_states, k, v, memory: Memory):
        """As `_blocks` for one token, wherever in a block it lies."""
        W, S, dtype = self.options.window, self.options.states, q.dtype
        row, slot = jnp.arange(len(q)), W + memory.count
        keys, values = (m.at[row, slot].set(a[:, 0]) for m, a in zip(memory[1:3], (k, v), strict=True))
        seen = jnp.minimum(memory.seen + 1, 2 * W)
        slots = jnp.arange(2 * W)
        behind = slot[:, None] - slots
        valid = jnp.where((behind >= 0) & (behind < seen[:, None]), 0, -1)
        mask = BlockMask.from_predicate(Window(W), 1, 2 * W, prune=False, **self._tiles(1, 2 * W))
        turned = apply_rope(q, self._rope(slot[:, None])), apply_rope(keys, self._rope(slots[None]))
        where = dict(q_positions=slot[:, None], kv_positions=jnp.broadcast_to(slots, valid.shape))
        here = jnp.zeros((len(q), 1), jnp.int32)
        of_tokens = _attend(*turned, values, mask, here, valid, where)

        states = jnp.where(memory.seen[:, None, None] > 0, memory.states, self.start[...])
        own = self._read(states, dtype)
        of_states = _attend(q_states, own.k, own.v, BlockMask.full(1, S, **self._tiles(1, S)))
        complete = memory.count + 1 == W

        def update(states):
            after = self._update(states, own, keys, values, valid)
            return jnp.where(complete[:, None, None], after, states)

        states = jax.lax.cond(jnp.any(complete), update, lambda states: states, states)
        shift = lambda a: jnp.where(complete[:, None, None, None], jnp.roll(a, -W, axis=1), a)  # noqa: E731
        count = jnp.where(complete, 0, memory.count + 1)
        seen = jnp.where(complete, jnp.minimum(seen, W), seen)
        return (of_tokens, of_states), Memory(states, shift(keys), shift(values), count, seen)

    def _rope(self, positions: jax.Array):
        return rope_table(positions, self.sizes.head_dim, self.sizes.rope_base)

    def _tiles(self, T: int, S: int) -> dict[str, int]:
        block = self.sizes.attention_block
        return dict(bq=min(block, T), bk=min(block, S))


def _scaled(q: jax.Array, scale: nnx.Param) -> jax.Array:
    return q * jnp.abs(scale[...])[:, None].astype(q.dtype)


def _attend(q, k, v, mask, q_ids=None, k_ids=None, where: dict[str, Any] | None = None) -> jax.Array:
    """Attention with scores q k; every device works on its own rows and heads.

    Ids are [B, T] and [B, S], 0 for what sees and is seen, other numbers for documents, -1 for neither; of
    keys 0 by default. `where` holds positions.
    """
    arrays = dict(where or {})
    if q_ids is not None:
        k_ids = jnp.zeros(k.shape[:2], jnp.int32) if k_ids is None else k_ids
        arrays |= dict(q_segment_ids=q_ids, kv_segment_ids=k_ids)

    def local(q, k, v, arrays):
        return block_sparse_attention(q, k, v, mask, scale=1.0, **arrays)

    batch, heads = cut("batch", q.shape[0]), cut("kv_heads", k.shape[2])
    if batch is None and heads is None:
        return local(q, k, v, arrays)
    rows = P(batch, None, heads)
    specs = rows, rows, rows, {name: P(batch) for name in arrays}
    return jax.shard_map(local, in_specs=specs, out_specs=rows, check_vma=False)(q, k, v, arrays)
