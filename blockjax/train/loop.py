"""The trainer, in the order in which things happen.

`train` checks the config, opens the run folder and the data, restores or makes
the sharded state, compiles, and runs steps until `config.run.steps`. Batch k is
a function of (seed, k), so a start at any checkpoint continues the same
sequence of losses bit for bit. What ends it before: `train.endings`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from blockjax import data
from blockjax.models import TransformerConfig
from blockjax.parallel.mesh import make_mesh
from blockjax.train import config as configs
from blockjax.train import hosts
from blockjax.train.checkpoint import Checkpoints, Watch
from blockjax.train.config import ConfigDict, due
from blockjax.train.display import Display
from blockjax.train.endings import Preempted
from blockjax.train.folder import RunFolder
from blockjax.train.inspect import make_inspect_step, scalars
from blockjax.train.lock import held
from blockjax.train.log import StepLog
from blockjax.train.preemption import Preemption
from blockjax.train.run import Run, claim, padded_vocab
from blockjax.train.state import StatePlan, TrainState, plan_state
from blockjax.train.step import (
    FIRST_EDGE,
    Dial,
    batch_keys,
    batch_sharding,
    lower_train_step,
    make_dial,
    make_eval_step,
)
from blockjax.train.watchdog import Watchdog

COMPILE_LIMIT = 3600.0  # seconds; one that finds the step in a cache waits for those that compile


def train(
    config: ConfigDict, run: str, *, profile: tuple[int, int] | None = None, quiet: bool = False
) -> Run:
    """Trains, or continues, the run in a folder until `config.run.steps`.

    Args:
      config: from a file in `configs/`; see `train.config.base_config`.
      run: folder or `gs://` URL; created, or continued if it holds the same identity.
      profile: first and last step of an xprof trace, written to `profile/` of the run folder.
      quiet: print nothing.

    Raises:
      UsageError: anything about the input that cannot work, before compilation; or a checkpoint that cannot
        be written.
      Preempted: SIGTERM or SIGINT (Ctrl-C, a notebook's stop button) came during the steps; all is saved.
      Diverged: `run.max_skipped` steps in a row had no finite loss and gradient.
      Hung: another process did not come to where all wait for each other.
    """
    hosts.introduce()
    configs.check(config)
    mesh = make_mesh(config.mesh)
    configs.check_mesh(config, mesh)
    folder = RunFolder(run)
    quiet = quiet or jax.process_index() > 0
    display = Display(config.run.steps, quiet=quiet)
    with contextlib.ExitStack() as stack:
        stack.enter_context(held(folder))
        corpus, tokenizer, order, evaluation = open_data(config, quiet)
        model_config = configs.check(config, vocab_size=padded_vocab(tokenizer))
        claim(folder, config, corpus, tokenizer)
        stack.enter_context(jax.set_mesh(mesh))
        watch = stack.enter_context(Watchdog(config.run.hang_seconds, folder.local))
        checkpoints = stack.enter_context(
            contextlib.closing(Checkpoints(folder.checkpoints, config.run, watch=watch))
        )
        display.say(describe(config, model_config, mesh, corpus, tokenizer))
        plan = plan_state(model_config, config, mesh)
        state, start = open_state(plan, checkpoints, folder, display)
        placement = batch_sharding(mesh)
        dial, everywhere = make_dial(model_config, config.optimizer.locality_warmup), NamedSharding(mesh, P())
        run_step = compile_step(plan, config, mesh, dial, display) if start < config.run.steps else None
        # Else the first step waits for the slowest to compile.
        hosts.barrier("the training step is compiled", COMPILE_LIMIT)
        carried = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract.memory)
        run_eval = jax.jit(
            make_eval_step(plan.graph, evaluation.longest, dial), out_shardings=(everywhere, carried)
        )
        run_inspect = jax.jit(make_inspect_step(plan.graph, dial), out_shardings=everywhere)
        log = stack.enter_context(StepLog(folder, config, model_config, display, start, watch=watch))
        preemption = stack.enter_context(Preemption())
        batches = iter(data.Loader(order, placement, start, config.run.steps, prefetch=config.run.prefetch))
        for step in range(start + 1, config.run.steps + 1):
            with watch(f"the loader, batch {step - 1}"):
                batch = next(batches)
            with tracing(profile, step, start, folder, log), watch(f"step {step}"):
                state, metrics = run_step(state, {key: batch[key] for key in batch_keys(config)})
                log.step(step, metrics)
            last = step == config.run.steps
            if last or due(step, config.run.eval_every):
                fixed = data.Loader(evaluation, placement, stop=len(evaluation))
                values = evaluate(run_eval, state, fixed, watch)
                if config.run.inspect:
                    with watch(f"the inspection of step {step}"):
                        found = jax.device_get(run_inspect(state.params, state.step, fixed.batch(0)))
                    values |= scalars(found, model_config)
                log.evaluation(step, values)
            leave = preemption.requested(step) and not last
            if last or leave or due(step, config.run.checkpoint_every):
                log.flush()  # a run that goes on from here does not write these metrics again
                checkpoints.save(step, state)
            if leave:
                checkpoints.wait()
                raise Preempted(
                    f"Stopped by {preemption.name} after step {step}, which is saved. "
                    "The same command goes on from there."
                )
        checkpoints.wait()  # while a signal still lets it finish
    return Run(folder, config, nnx.merge(plan.graph, state.params), tokenizer, mesh, int(state.step))


def open_state(
    plan: StatePlan, checkpoints: Checkpoints, folder: RunFolder, display: Display
) -> tuple[TrainState, int]:
    """The state of the newest complete checkpoint, or the first one, and its step."""
    if jax.process_index() == 0:
        leaves = jax.tree.leaves(plan.abstract)
        checkpoints.prepare(sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves))
    hosts.barrier("the folder of checkpoints is there")
    found = checkpoints.restore(plan.abstract)
    for step, reason in checkpoints.skipped:
        display.say(f"Checkpoint {step} is passed over: {reason}.")
    if found is None:
        display.say(f"Run {folder.path} starts.")
        return plan.make(), 0
    display.say(f"Run {folder.path} continues after step {found[1]}.")
    return found


def open_data(
    config: ConfigDict, quiet: bool
) -> tuple[data.Corpus, data.Tokenizer, data.Order, data.Evaluation]:
    """The corpus, prepared if need be, the tokenizer, the training order and fixed validation batches."""
    c = config.data
    corpus = data.open_corpus(c.source, config.run.data_dir, text_field=c.text_field, quiet=quiet)
    tokenizer = data.open_tokenizer(c.tokenizer)
    train_index = data.token_index(corpus, tokenizer, "train", config.run.data_dir, quiet=quiet)
    order = data.make_order(c.order, train_index, c.batch_size, c.seq_len, config.seed)
    fixed = data.token_index(corpus, tokenizer, "validation", config.run.data_dir, quiet=quiet)
    count = math.ceil(config.run.eval_sequences / c.batch_size)
    return corpus, tokenizer, order, data.EVALUATIONS[c.order](fixed, c.batch_size, c.seq_len, count)


def compile_step(
    plan: StatePlan, config: ConfigDict, mesh: Mesh, dial: Dial, display: Display
) -> jax.stages.Compiled:
    """Compiles `(state, batch) -> (state, metrics)`, so that the clock starts when training does."""
    begin = time.perf_counter()
    compiled = lower_train_step(plan, config, mesh, dial).compile()
    display.say(f"Compiled the training step in {time.perf_counter() - begin:.0f} s.")
    return compiled


def evaluate(
    run_eval, state: TrainState, batches: Iterable, watch: Watch = contextlib.nullcontext
) -> dict[str, float]:
    """Bits per byte, nats per token and perplexity on fixed validation sequences.

    Also bits per byte by position in the document, in groups named by where they begin, if there is more
    than one. A token stands for as many bytes as all do on average.
    """
    # Rows of the first batch start documents, and so forget what training remembers.
    sums, memory = [], state.memory
    batches = iter(batches)
    for number in itertools.count():
        with watch(f"evaluation batch {number}"):
            batch = next(batches, None)
            if batch is None:
                break
            found, memory = run_eval(state.params, state.step, batch, memory)
            sums.append(jax.device_get(found))
    nats_at, tokens_at, num_bytes = (
        sum(np.float64(s[key]) for s in sums) for key in ("nats", "tokens", "bytes")
    )
    nats, tokens = float(nats_at.sum()), float(tokens_at.sum())
    loss, bits = nats / tokens, {}
    if len(nats_at) > 1:
        width = len(str(FIRST_EDGE << len(nats_at)))
        for i in np.flatnonzero(tokens_at):
            begin = FIRST_EDGE << i >> 1 if i else 0
            value = nats_at[i] / math.log(2) / (num_bytes * tokens_at[i] / tokens)
            bits[f"val/bits_per_byte_from/{begin:0{width}}"] = float(value)
    return bits | {
        "val/bits_per_byte": nats / math.log(2) / num_bytes,
        "val/loss": loss,
        "val/perplexity": math.exp(min(loss, 700.0)),
    }


@contextlib.contextmanager
def tracing(span: Sequence[int] | None, step: int, start: int, folder: RunFolder, log: StepLog):
    """Records an xprof trace of the steps of `span`, both ends included, that come after `start`."""
    if span and step == max(span[0], start + 1) <= span[1]:
        jax.profiler.start_trace(str(folder.local / "profile"))
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
        yield
    if span and step == span[1]:
        log.flush()  # else the devices are still at work
        jax.profiler.stop_trace()


def describe(
    config: ConfigDict,
    model_config: TransformerConfig,
    mesh: Mesh,
    corpus: data.Corpus,
    tokenizer: data.Tokenizer,
) -> str:
    """What runs on what, for the first lines on the screen."""
    c, m = config.data, model_config
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
    kinds = list(dict.fromkeys(str(spec) for spec in m.layers()))
    sees = ", ".join(kinds) if len(kinds) <= 4 else f"{kinds[0]} to {kinds[-1]}"
    own = f" ({m.distinct} with weights of their own)" if m.loop else ""
    devices = f"{mesh.size} x {jax.devices()[0].device_kind}{f' ({axes})' if axes else ''}"
    return (
        f"jax {jax.__version__} on {devices}.\n"
        f"Model: {m.num_params():,} parameters, {m.depth} layers{own} of width {m.width}, "
        f"{sees}, {m.residual}, {m.dtype}.\n"
        f"Data: {corpus.name} ({corpus.digest[:12]}), tokenizer {tokenizer.name}, "
        f"{c.batch_size} {c.order} sequences of {c.seq_len} tokens a step."
    )
