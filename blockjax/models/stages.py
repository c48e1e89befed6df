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
from blockjax.masks.predicates import is_concrete, same
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
    stages, layer = [], 0
    while layer < config.depth:
        repeats = 0
        if layer % period == 0 and config.stack != "unroll":
            room = (residual.end(2 * layer) - 2 * layer) // 2
            repeats = max(0, min(room, stacked - layer)) // period
        if buckets:
            equal = [same(unstack(table, layer), unstack(table, i)) for i in range(layer, layer + repeats)]
            repeats = equal.index(False) if False in equal else repeats
        stages.append(Stage(layer, repeats))
        layer += repeats * period or 1
    return stages


def run(
    model,
    stream: Stream,
    rope: tuple[jax.Array, jax.Array],
    attend: Callable[[LayerSpec, list], Callable],
    table: LayerSpec | None,
    remat: Callable[[Callable], Callable],
) -> list[Any]:
    """Sends the stream through all layers of a `Transformer`.

    Args:
      attend: gives the attention of a row of the layer table; it may append to the list what it saw.
      table: as in `plan`.
      remat: wraps what a backward pass may recompute.

    Returns:
      What `attend` appended in each stage, leaves [layers of the stage, ...].
    """
    config, period = model.config, len(model.config.period)
    stages = plan(config, table)
    graph, stacked = nnx.split(model.periods)
    pieces, found = _cut(stages, config, stacked), []
    size = stream.residual.size
    stream.scanned = frozenset(2 * stage.first // size for stage in stages if stage.repeats)

    def spec_of(layer: int) -> LayerSpec:
        return config.period[layer % period] if table is None else unstack(table, layer)

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
            body = functools.partial(_period, remat, (graph, specs, stream, rope, attend))
            scan = functools.partial(_scan, body, stage, period, stream)
            stream.partial, (own, seen) = outer(scan)(stream.carry(), pieces[stage], columns)
            own, seen = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (own, seen))
            stream.note(own)
        else:
            seen, sublayers = [], []
            for i in range(first, first + layers):
                blocks = model.tail
                if Stage(i, 0) in pieces:
                    blocks = nnx.merge(graph, jax.tree.map(lambda a: a[0], pieces[Stage(i, 0)]))
                sublayers.append(blocks[f"slot_{i % period}"].sublayers(rope, attend(spec_of(i), seen)))
            stream.partial = outer(functools.partial(_unrolled, stream, first, sublayers, remat))(
                stream.partial
            )
            seen = _stack(seen)
        found.append(seen)
    return found


def run_layer(stream: Stream, layer: int, sublayers, remat: Callable[[Callable], Callable] = lambda f: f):
    """Sends the stream through one layer."""
    for i, sublayer in enumerate(sublayers, 2 * layer):
        reads = stream.row(i)
        step = remat(functools.partial(_sublayer, stream, sublayer, stream.residual.starts(i)))
        partial, output, logit = step(checkpoint_name(stream.partial, CARRY), reads)
        stream.write(partial, output)
        stream.partial = constrain(stream.partial, ("batch", "time", None))
        stream.note(_stack([logit]))


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
    """The running sum after layers, one after the other, each as its sublayers."""
    stream.partial = partial
    for layer, sublayers in enumerate(layers, first):
        run_layer(stream, layer, sublayers, remat)
    return stream.partial


def _scan(body, stage: Stage, period: int, stream: Stream, partial, params, columns):
    """All layers of a stage: the new running sum, and what `_period` says of each period."""
    start, count = 2 * stage.first, (stage.repeats, period, 2)
    reads = stream.reads(start, start + math.prod(count))
    reads = jax.tree.map(lambda a: a.reshape(*count, *a.shape[1:]), reads)
    first = np.arange(stage.repeats) == 0 if stream.residual.starts(start) else None
    return jax.lax.scan(body, partial, (params, columns, reads, first))


def _period(remat, layers, partial, xs):
    """One step of a scan: the new running sum, and the logits of sums and the findings of its layers."""
    return remat(functools.partial(_layers, *layers))(checkpoint_name(partial, CARRY), xs)


def _layers(graph, specs, stream: Stream, rope, attend, partial, xs):
    params, columns, reads, first = xs
    blocks, logits, seen = nnx.merge(graph, params), [], []
    for i in range(len(blocks)):
        spec = specs[i] if columns is None else jax.tree.map(lambda a: a[i], columns)  # noqa: B023
        for j, sublayer in enumerate(blocks[f"slot_{i}"].sublayers(rope, attend(spec, seen))):
            row = None if reads is None else reads.row(i, j)
            starts = first is not None and (i, j) == (0, 0)
            partial, output, logit = _sublayer(stream, sublayer, first if starts else False, partial, row)
            partial = constrain(partial + output, ("batch", "time", None))
            logits.append(logit)
    return partial, (_stack(logits) if stream.record else None, _stack(seen))


def _sublayer(stream: Stream, sublayer, first: bool | jax.Array, partial, reads):
    """The running sum that a sublayer sees, what it adds, and the logit of the sum."""
    partial, x, logit = stream.join(partial, reads, sublayer.norm, first)
    return partial, sublayer.run(x), logit


def _stack(parts: list):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts) if parts else None


def _cut(stages: list[Stage], config: TransformerConfig, stacked: nnx.State) -> dict[Stage, nnx.State]:
    """The parameters of each stage that lies in whole periods, with their leading axis.

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
