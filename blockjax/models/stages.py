"""Runs the layers: as few compiled bodies as the depth blocks and the layer table allow.

A stage is a scan over whole periods, or one layer on its own. A scan crosses no border of a depth block,
so its carry is the stream's running sum alone; a layer on its own may have a border between its two
sublayers. What differs inside a scan, such as a window, is scanned along with the parameters.
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
from blockjax.parallel.mesh import constrain

CARRY = "carry"
"""Name, for checkpoint policies, of the running sum with which a step of a scan starts."""


class Stage(NamedTuple):
    """Layers `first` to `first + repeats * period - 1`, scanned; layer `first` alone if `repeats` is 0."""

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
    stacked = config.depth // period * period
    buckets = config.stack == "bucket" and table is not None
    if buckets and not is_concrete(table):
        raise UsageError(
            "model.stack='bucket' compiles the layer table into the program, so its locality cannot move; "
            "use model.stack='scan'."
        )
    rows = config.rows(table) if buckets else ()
    stages, layer = [], 0
    while layer < config.depth:
        repeats = 0
        if layer % period == 0 and config.stack != "unroll":
            room = (residual.end(2 * layer) - 2 * layer) // 2
            repeats = max(0, min(room, stacked - layer)) // period
        if buckets:
            first = rows[layer : layer + period]
            starts = range(layer, layer + repeats * period, period)
            equal = [rows[i : i + period] == first for i in starts]
            repeats = equal.index(False) if False in equal else repeats
        stages.append(Stage(layer, repeats))
        layer += repeats * period or 1
    return stages


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
      What `see` appended in each stage, leaves [layers of the stage that append, ...], None where none did;
      and the memory after the last token.
    """
    config, period = model.config, len(model.config.period)
    stages = plan(config, table)
    graph, stacked = nnx.split(model.periods)
    given = memory or {"periods": {}, "tail": {}}
    before = jax.tree.map(lambda x: x.swapaxes(0, 1), given["periods"])
    pieces, found, after = _cut(stages, config, (stacked, before)), [], {}
    size = stream.residual.size
    stream.scanned = frozenset(2 * stage.first // size for stage in stages if stage.repeats)

    def spec_of(layer: int) -> LayerSpec:
        spec = config.period[layer % period]
        return spec if table is None else spec.with_columns(unstack(table, layer))

    for group in _groups(stages, stream):
        stage, first = group[0], group[0].first
        layers = stage.repeats * period or len(group)
        stream.begin(2 * first)
        whole = stream.covers(2 * first, 2 * (first + layers))
        # Of a whole depth block, what its layers read of completed ones may be recomputed, too.
        outer = remat if whole else lambda f: f
        if stage.repeats:
            columns = None
            if table is not None and config.stack != "bucket":
                shape = (stage.repeats, period)
                columns = jax.tree.map(lambda a: a[first : first + layers].reshape(shape), table)  # noqa: B023
            specs = [spec_of(first + i) for i in range(period)]
            body = functools.partial(_period, remat, (graph, specs, stream, rope, see))
            scan = functools.partial(_scan, body, stage, period, stream)
            stream.partial, (own, seen, kept) = outer(scan)(stream.carry(), pieces[stage], columns)
            own, seen = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (own, seen))
            stream.note(own)
            for slot, leaves in kept.items():
                after.setdefault(("periods", slot), []).append(leaves)
        else:
            seen, sublayers, names = [], [], []
            for i in range(first, first + layers):
                slot, blocks, own = f"slot_{i % period}", model.tail, given["tail"]
                whole = Stage(i, 0) in pieces
                if whole:
                    params, own = jax.tree.map(lambda a: a[0], pieces[Stage(i, 0)])
                    blocks = nnx.merge(graph, params)
                names.append(("periods" if whole else "tail", slot))
                sublayers.append(blocks[slot].sublayers(rope, see(spec_of(i), seen, own.get(slot))))
            unrolled = functools.partial(_unrolled, stream, first, sublayers, remat)
            stream.partial, kept = outer(unrolled)(stream.partial)
            for name, leaves in zip(names, kept, strict=True):
                if leaves is not None:
                    after.setdefault(name, []).append(jax.tree.map(lambda a: a[None], leaves))
            seen = _stack(seen)
        found.append(seen)
    return found, None if memory is None else _gather(after)


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
        stream.partial = constrain(stream.partial, ("batch", "time", None))
        stream.note(_stack([logit]))
    return memories[0]  # an MLP remembers nothing


def _gather(pieces: dict) -> dict:
    """The memory as `Transformer.memory` has it, from the pieces [layers, B, ...] of each slot in order."""
    memory = {"periods": {}, "tail": {}}
    for (part, slot), trees in pieces.items():
        whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)
        move = (lambda x: x.swapaxes(0, 1)) if part == "periods" else (lambda x: x[0])
        memory[part][slot] = jax.tree.map(move, whole)
    return memory


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


def _scan(body, stage: Stage, period: int, stream: Stream, partial, piece, columns):
    """All layers of a stage: the new running sum, and what `_period` says of each period."""
    start, count = 2 * stage.first, (stage.repeats, period, 2)
    reads = stream.reads(start, start + math.prod(count))
    reads = jax.tree.map(lambda a: a.reshape(*count, *a.shape[1:]), reads)
    first = np.arange(stage.repeats) == 0 if stream.residual.starts(start) else None
    return jax.lax.scan(body, partial, (*piece, columns, reads, first))


def _period(remat, layers, partial, xs):
    """One step of a scan: the new running sum; logits of sums, findings and memories of its layers."""
    return remat(functools.partial(_layers, *layers))(checkpoint_name(partial, CARRY), xs)


def _layers(graph, specs, stream: Stream, rope, see, partial, xs):
    params, memory, columns, reads, first = xs
    blocks, logits, seen, kept = nnx.merge(graph, params), [], [], {}
    for i in range(len(blocks)):
        slot, spec = f"slot_{i}", specs[i]
        if columns is not None:
            spec = spec.with_columns(jax.tree.map(lambda a: a[i], columns))  # noqa: B023
        for j, sublayer in enumerate(blocks[slot].sublayers(rope, see(spec, seen, memory.get(slot)))):
            row = None if reads is None else reads.row(i, j)
            starts = first is not None and (i, j) == (0, 0)
            partial, output, logit, after = _sublayer(
                stream, sublayer, first if starts else False, partial, row
            )
            partial = constrain(partial + output, ("batch", "time", None))
            logits.append(logit)
            if after is not None:
                kept[slot] = after
    return partial, (_stack(logits) if stream.record else None, _stack(seen), kept)


def _sublayer(stream: Stream, sublayer, first: bool | jax.Array, partial, reads):
    """The running sum that a sublayer sees, what it adds, the logit of the sum, and a memory."""
    partial, x, logit = stream.join(partial, reads, sublayer.norm, first)
    output, memory = sublayer.run(x)
    return partial, output, logit, memory


def _stack(parts: list):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts) if parts else None


def _cut(stages: list[Stage], config: TransformerConfig, stacked: Any) -> dict[Stage, Any]:
    """Of a tree of stacked arrays, those of each stage that lies in whole periods, with their leading axis.

    One split, whose transpose is one concatenation: each slice would add to a gradient of all layers.
    """
    period = len(config.period)
    whole = [stage for stage in stages if stage.first < config.depth // period * period]
    spans = {stage: (stage.first // period, stage.repeats or 1) for stage in whole}
    unique = list(dict.fromkeys(spans.values()))  # layers of one period that run alone share a piece
    if len(unique) <= 1:
        return dict.fromkeys(whole, stacked)
    leaves, tree = jax.tree.flatten(stacked)
    split = [jax.lax.split(leaf, [count for _, count in unique]) for leaf in leaves]
    pieces = [jax.tree.unflatten(tree, piece) for piece in zip(*split, strict=True)]
    return {stage: pieces[unique.index(span)] for stage, span in spans.items()}
