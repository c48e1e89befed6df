"""Runs the layers: as few compiled bodies as the depth blocks and the layer table allow.

A stage is a scan over whole periods, or one layer on its own. A scan crosses no border of a depth block,
so its carry is the stream's running sum alone; a layer on its own may have a border between its two
sublayers. What differs inside a scan, such as a window, is scanned along with the parameters.

Layers that are applied several times are stages of their own inside a scan over these times, which holds
their parameters once: the gradient adds up in its carry.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from blockjax.depth import Stream
from blockjax.errors import UsageError
from blockjax.masks.predicates import is_concrete
from blockjax.models.config import TransformerConfig
from blockjax.models.layer_spec import LayerSpec, unstack
from blockjax.models.tied import scaled
from blockjax.parallel.mesh import constrain

CARRY = "carry"
"""Name, for checkpoint policies, of the running sum with which a step of a scan starts."""


class Stage(NamedTuple):
    """Distinct layers `first` to `first + repeats * period - 1`, scanned; layer `first` alone if 0."""

    first: int
    repeats: int


def plan(config: TransformerConfig, table: LayerSpec | None) -> list[Stage]:
    """The stages of a decoder.

    Args:
      table: columns [L] of the layer table; None where the pattern sets it.

    Raises:
      UsageError: runs of equal layers are asked for, but the table is traced.
    """
    period, residual = len(config.period), config.residual_rule
    stacked = config.distinct // period * period
    buckets = config.stack == "bucket" and table is not None
    if buckets and not is_concrete(table):
        raise UsageError(
            "model.stack='bucket' compiles the layer table into the program, so its locality cannot move; "
            "use model.stack='scan'."
        )
    rows = [[] for _ in range(config.distinct)]  # a layer is equal to another if it is each time
    for layer, row in zip(config.owners, config.rows(table) if buckets else (), strict=False):
        rows[layer].append(row)
    stages = []
    for run in config.runs:
        layer, end = run.first, run.first + run.count
        while layer < end:
            repeats = 0
            if layer % period == 0 and config.stack != "unroll":
                room = (residual.end(2 * layer) - 2 * layer) // 2
                repeats = max(0, min(room, stacked - layer, end - layer)) // period
            if buckets:
                first = rows[layer : layer + period]
                starts = range(layer, layer + repeats * period, period)
                equal = [rows[i : i + period] == first for i in starts]
                repeats = equal.index(False) if False in equal else repeats
            stages.append(Stage(layer, repeats))
            layer += repeats * period or 1
    return stages


class Each(NamedTuple):
    """What layers have of their own beside parameters, in order; under a scan each leaf has its steps first.

    Attributes:
      columns: [layers] of the layer table, or None.
      gains: [layers, 3, M] of `tied.Condition`, or None.
      memory: of each layer, None of attentions and without memories.
    """

    columns: LayerSpec | None
    gains: jax.Array | None
    memory: list

    def part(self, start: int, stop: int) -> Each:
        """Of some of them."""
        return Each(*jax.tree.map(lambda a: a[start:stop], self[:2]), self.memory[start:stop])

    def periods(self, count: int) -> Each:
        """For a scan of so many steps, each over some of them."""
        cut = lambda a: a.reshape(count, -1, *a.shape[1:])  # noqa: E731
        return Each(*jax.tree.map(cut, self[:2]), _fold(self.memory, count))


class Pass(NamedTuple):
    """What is the same for all layers in one pass through a decoder."""

    model: Any
    graph: nnx.GraphDef  # of `model.periods`
    pieces: dict[Stage, Any]
    stream: Stream
    rope: tuple[jax.Array, jax.Array]
    see: Callable[[LayerSpec, list, Any], Any]
    remat: Callable[[Callable], Callable]


def run(
    model,
    stream: Stream,
    rope: tuple[jax.Array, jax.Array],
    see: Callable[[LayerSpec, list, Any], Any],
    table: LayerSpec | None,
    remat: Callable[[Callable], Callable],
    memory: dict | None = None,
) -> tuple[list[Any], dict | None]:
    """Sends the stream through all layers of a `Transformer`.

    Args:
      see: gives what the mixer of a row of the layer table is handed; of an attention, it may append to the
        list what it saw. Its last argument is the memory of a recurrent layer, None without one.
      table: as in `plan`.
      remat: wraps what a backward pass may recompute.
      memory: from `Transformer.memory`, or None.

    Returns:
      What `see` appended, in pieces, leaves [layers that append, ...] in the order of layers; and the memory
      after the last token.
    """
    config = model.config
    stages = plan(config, table)
    graph, stacked = nnx.split(model.periods)
    size = stream.residual.size
    stream.scanned = frozenset(2 * stage.first // size for stage in stages if stage.repeats)
    this = Pass(model, graph, _cut(stages, config, stacked), stream, rope, see, remat)
    before = [(memory or {}).get(f"layer_{layer}") for layer in range(config.depth)]
    found, after, start = [], [], 0
    for part, gains in zip(config.runs, model.gains(), strict=True):
        own = [stage for stage in stages if part.first <= stage.first < part.first + part.count]
        stop = start + part.repeats * part.count
        columns = jax.tree.map(lambda a: a[start:stop], table)  # noqa: B023
        each = Each(columns, gains, before[start:stop])
        if part.repeats > 1 and config.stack == "scan":

            def once(partial, each: Each):
                stream.partial = partial
                seen, kept = _through(this, own, each)  # noqa: B023
                return stream.partial, (seen, kept)

            inputs = each.periods(part.repeats)
            stream.partial, (seen, kept) = jax.lax.scan(once, stream.partial, inputs, part.repeats)
            found.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), seen))
            after += _unfold(kept, part.repeats)
        else:
            for i in range(0, stop - start, part.count):
                seen, kept = _through(this, own, each.part(i, i + part.count))
                found.append(seen)
                after += kept
        start = stop
    if memory is None:
        return found, None
    return found, {f"layer_{layer}": x for layer, x in enumerate(after) if x is not None}


def _through(this: Pass, stages: list[Stage], each: Each) -> tuple[Any, list]:
    """Sends the stream once through the layers of some stages; what they saw, and their memories."""
    model, stream = this.model, this.stream
    config, period, remat = model.config, len(model.config.period), this.remat
    found, after = [], []
    for group in _groups(stages, stream):
        stage, first = group[0], group[0].first
        layers = stage.repeats * period or len(group)
        mine = each.part(first - stages[0].first, first - stages[0].first + layers)
        stream.begin(2 * first)
        whole = stream.covers(2 * first, 2 * (first + layers))
        # Of a whole depth block, what its layers read of completed ones may be recomputed, too.
        outer = remat if whole else lambda f: f
        specs = [
            config.period[i % period] for i in range(first, first + (period if stage.repeats else layers))
        ]
        if mine.columns is not None and (config.stack == "bucket" or not stage.repeats):
            specs = [spec.with_columns(unstack(mine.columns, i)) for i, spec in enumerate(specs)]
            mine = mine._replace(columns=None)
        if stage.repeats:
            body = functools.partial(_period, remat, (this.graph, specs, stream, this.rope, this.see))
            scan = functools.partial(_scan, body, stage, period, stream)
            inputs = this.pieces[stage], mine.periods(stage.repeats)
            stream.partial, (own, seen, kept) = outer(scan)(stream.carry(), *inputs)
            own, seen = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (own, seen))
            stream.note(own)
            after += _unfold(kept, stage.repeats)
        else:
            seen, sublayers = [], []
            for i, (spec, memory) in enumerate(zip(specs, mine.memory, strict=True)):
                blocks, alone = model.tail, Stage(first + i, 0)
                if alone in this.pieces:
                    blocks = nnx.merge(this.graph, jax.tree.map(lambda a: a[0], this.pieces[alone]))
                block = blocks[f"slot_{(first + i) % period}"]
                gains = None if mine.gains is None else mine.gains[i]
                sublayers.append(scaled(block.sublayers(this.rope, this.see(spec, seen, memory)), gains))
            unrolled = functools.partial(_unrolled, stream, first, sublayers, remat)
            stream.partial, kept = outer(unrolled)(stream.partial)
            after += kept
            seen = _stack(seen)
        if seen is not None:
            found.append(seen)
    seen = jax.tree.map(lambda *parts: jnp.concatenate(parts), *found) if found else None
    return seen, after


def run_layer(
    stream: Stream, layer: int, sublayers, remat: Callable[[Callable], Callable] = lambda f: f
) -> Any:
    """Sends the stream through one layer; returns its memory, None of an attention."""
    memories = []
    for i, sublayer in enumerate(sublayers, 2 * layer):
        reads = stream.row(i)
        step = remat(functools.partial(_sublayer, stream, sublayer, stream.residual.starts(i)))
        partial, output, logit, memory = step(checkpoint_name(stream.partial, CARRY), reads)
        memories.append(memory)
        stream.write(partial, output)
        stream.partial = constrain(_after(sublayer, stream.partial), ("batch", "time", None))
        stream.note(_stack([logit]))
    return memories[0]  # an MLP remembers nothing


def _fold(memory: list, count: int) -> list:
    """Memories of layers as those of each step of a scan, stacked."""
    size = len(memory) // count
    stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
    return [jax.tree.map(stack, *memory[i::size]) for i in range(size)]


def _unfold(stacked: list, count: int) -> list:
    """The memories of which `_fold` makes `stacked`."""
    return [jax.tree.map(lambda a: a[i], x) for i in range(count) for x in stacked]  # noqa: B023


def _groups(stages: list[Stage], stream: Stream) -> Iterator[list[Stage]]:
    """The stages in order; those that make up a depth block of layers on their own together."""
    group = []
    for stage in stages:
        group.append(stage)
        start, stop = 2 * group[0].first, stream.residual.end(2 * stage.first)
        alone = stream.residual.readers and start // stream.residual.size not in stream.scanned
        if not (alone and stream.covers(start, stop) and stop % 2 == 0 and 2 * stage.first + 2 < stop):
            yield group
            group = []


def _unrolled(stream: Stream, first: int, layers: list, remat, partial):
    """The running sum after layers, one after the other, each as its sublayers; and their memories."""
    stream.partial = partial
    memories = [run_layer(stream, layer, sublayers, remat) for layer, sublayers in enumerate(layers, first)]
    return stream.partial, memories


def _scan(body, stage: Stage, period: int, stream: Stream, partial, piece, each: Each):
    """All layers of a stage: the new running sum, and what `_period` says of each period."""
    start, count = 2 * stage.first, (stage.repeats, period, 2)
    reads = stream.reads(start, start + math.prod(count))
    reads = jax.tree.map(lambda a: a.reshape(*count, *a.shape[1:]), reads)
    first = np.arange(stage.repeats) == 0 if stream.residual.starts(start) else None
    return jax.lax.scan(body, partial, (piece, each, reads, first))


def _period(remat, layers, partial, xs):
    """One step of a scan: the new running sum; logits of sums, findings and memories of its layers."""
    return remat(functools.partial(_layers, *layers))(checkpoint_name(partial, CARRY), xs)


def _layers(graph, specs, stream: Stream, rope, see, partial, xs):
    params, each, reads, first = xs
    blocks, logits, seen, kept = nnx.merge(graph, params), [], [], []
    for i, (spec, memory) in enumerate(zip(specs, each.memory, strict=True)):
        if each.columns is not None:
            spec = spec.with_columns(jax.tree.map(lambda a: a[i], each.columns))  # noqa: B023
        gains = None if each.gains is None else each.gains[i]
        memories = []
        for j, sublayer in enumerate(
            scaled(blocks[f"slot_{i}"].sublayers(rope, see(spec, seen, memory)), gains)
        ):
            row = None if reads is None else reads.row(i, j)
            starts = first is not None and (i, j) == (0, 0)
            partial, output, logit, after = _sublayer(
                stream, sublayer, first if starts else False, partial, row
            )
            partial = constrain(_after(sublayer, partial + output), ("batch", "time", None))
            logits.append(logit)
            memories.append(after)
        kept.append(memories[0])  # an MLP remembers nothing
    return partial, (_stack(logits) if stream.record else None, _stack(seen), kept)


def _sublayer(stream: Stream, sublayer, first: bool | jax.Array, partial, reads):
    """The running sum that a sublayer sees, what it adds, the logit of the sum, and a memory."""
    partial, x, logit = stream.join(partial, reads, sublayer.norm, first)
    output, memory = sublayer.run(x)
    return partial, output, logit, memory


def _after(sublayer, partial: jax.Array) -> jax.Array:
    """The running sum after a sublayer, with the gains of a tied layer."""
    return partial if sublayer.stream is None else (partial * sublayer.stream).astype(partial.dtype)


def _stack(parts: list):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts) if parts else None


def _cut(stages: list[Stage], config: TransformerConfig, stacked: Any) -> dict[Stage, Any]:
    """Of a tree of stacked arrays, those of each stage that lies in whole periods, with their leading axis.

    One split, whose transpose is one concatenation: each slice would add to a gradient of all layers.
    """
    period = len(config.period)
    whole = [stage for stage in stages if stage.first < config.distinct // period * period]
    spans = {stage: (stage.first // period, stage.repeats or 1) for stage in whole}
    unique = list(dict.fromkeys(spans.values()))  # layers of one period that run alone share a piece
    if len(unique) <= 1:
        return dict.fromkeys(whole, stacked)
    leaves, tree = jax.tree.flatten(stacked)
    split = [jax.lax.split(leaf, [count for _, count in unique]) for leaf in leaves]
    pieces = [jax.tree.unflatten(tree, piece) for piece in zip(*split, strict=True)]
    return {stage: pieces[unique.index(span)] for stage, span in spans.items()}
