"""The trainer, in the order in which things happen.

`train` checks the config, opens the run folder and the data, restores or makes
the sharded state, compiles, and runs steps until `config.run.steps`. Batch k is
a function of (seed, k), so a start at any checkpoint continues the same
sequence of losses bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from blockjax import data
from blockjax.models import TransformerConfig
from blockjax.parallel.mesh import make_mesh
from blockjax.train import config as configs
from blockjax.train.checkpoint import Checkpoints
from blockjax.train.config import ConfigDict, due
from blockjax.train.display import Display
from blockjax.train.folder import RunFolder
from blockjax.train.inspect import make_inspect_step, scalars
from blockjax.train.log import StepLog
from blockjax.train.run import Run, claim, padded_vocab
from blockjax.train.state import StatePlan, TrainState, plan_state
from blockjax.train.step import (
    BATCH_KEYS,
    Dial,
    batch_sharding,
    lower_train_step,
    make_dial,
    make_eval_step,
)


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
      UsageError: anything about the input that cannot work, before compilation.
    """
    configs.check(config)
    mesh = make_mesh(config.mesh)
    configs.check_mesh(config, mesh)
    folder = RunFolder(run)
    quiet = quiet or jax.process_index() > 0
    corpus, tokenizer, order, evaluation = open_data(config, quiet)
    model_config = configs.check(config, vocab_size=padded_vocab(tokenizer))
    claim(folder, config, corpus, tokenizer)
    display = Display(config.run.steps, quiet=quiet)

    with jax.set_mesh(mesh), contextlib.closing(Checkpoints(folder.checkpoints, config.run)) as checkpoints:
        latest = checkpoints.latest()  # 0 in a run that was made from another one
        start = latest or 0
        display.say(describe(config, model_config, mesh, corpus, tokenizer))
        display.say(f"Run {folder.path} {'starts' if latest is None else f'continues after step {start}'}.")
        plan = plan_state(model_config, config, mesh)
        state = plan.make() if latest is None else checkpoints.restore(latest, plan.abstract)
        placement = batch_sharding(mesh)
        batches = data.Loader(order, placement, start, config.run.steps, prefetch=config.run.prefetch)
        dial, everywhere = make_dial(model_config, config.optimizer.locality_warmup), NamedSharding(mesh, P())
        run_step = compile_step(plan, config, mesh, dial, display) if start < config.run.steps else None
        run_eval = jax.jit(make_eval_step(plan.graph, dial), out_shardings=everywhere)
        run_inspect = jax.jit(make_inspect_step(plan.graph, dial), out_shardings=everywhere)

        with StepLog(folder, config, model_config, display, start) as log:
            for step, batch in enumerate(batches, start + 1):
                with tracing(profile, step, start, folder, log):
                    state, metrics = run_step(state, {key: batch[key] for key in BATCH_KEYS})
                    log.step(step, metrics)
                last = step == config.run.steps
                if last or due(step, config.run.eval_every):
                    fixed = data.Loader(evaluation, placement, stop=len(evaluation))
                    values = evaluate(run_eval, state, fixed)
                    if config.run.inspect:
                        found = run_inspect(state.params, state.step, fixed.batch(0))
                        values |= scalars(jax.device_get(found), model_config.residual_rule)
                    log.evaluation(step, values)
                if last or due(step, config.run.checkpoint_every):
                    log.flush()  # a run that goes on from here does not write these metrics again
                    checkpoints.save(step, state)
    return Run(folder, config, nnx.merge(plan.graph, state.params), tokenizer, mesh, int(state.step))


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
    return corpus, tokenizer, order, data.Evaluation(fixed, c.batch_size, c.seq_len, count)


def compile_step(
    plan: StatePlan, config: ConfigDict, mesh: Mesh, dial: Dial, display: Display
) -> jax.stages.Compiled:
    """Compiles `(state, batch) -> (state, metrics)`, so that the clock starts when training does."""
    begin = time.perf_counter()
    compiled = lower_train_step(plan, config, mesh, dial).compile()
    display.say(f"Compiled the training step in {time.perf_counter() - begin:.0f} s.")
    return compiled


def evaluate(run_eval, state: TrainState, batches: Iterator) -> dict[str, float]:
    """Bits per byte, nats per token and perplexity on fixed validation sequences."""
    sums = [jax.device_get(run_eval(state.params, state.step, batch)) for batch in batches]
    nats, tokens, num_bytes = (float(sum(s[key] for s in sums)) for key in ("nats", "tokens", "bytes"))
    loss = nats / tokens
    return {
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
    devices = f"{mesh.size} x {jax.devices()[0].device_kind}{f' ({axes})' if axes else ''}"
    return (
        f"jax {jax.__version__} on {devices}.\n"
        f"Model: {m.num_params():,} parameters, {m.depth} layers of width {m.width}, "
        f"{sees}, {m.residual}, {m.dtype}.\n"
        f"Data: {corpus.name} ({corpus.digest[:12]}), tokenizer {tokenizer.name}, "
        f"{c.batch_size} {c.order} sequences of {c.seq_len} tokens a step."
    )
