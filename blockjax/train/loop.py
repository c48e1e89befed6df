"""The trainer, in the order in which things happen.

`train` checks the config, opens the run folder and the data, builds the sharded
state, restores the newest checkpoint, compiles, and runs steps until
`config.run.steps`. Batch k is a function of (seed, k), so a start at any
checkpoint continues the same sequence of losses bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from blockjax import data
from blockjax.models import Transformer, TransformerConfig, logical_axes
from blockjax.parallel.mesh import make_mesh, partition_spec, shardings
from blockjax.train import config as configs
from blockjax.train.checkpoint import Checkpoints
from blockjax.train.display import Display
from blockjax.train.flops import FlopCounter, peak_flops
from blockjax.train.folder import RunFolder, check_identity
from blockjax.train.metrics import MetricsLog
from blockjax.train.optimizer import make_optimizer, make_schedule
from blockjax.train.step import BATCH_KEYS, TrainState, init_state, make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Trained:
    """What `train` hands back.

    Attributes:
      folder: the run folder.
      config: the config as it ran.
      model: the trained decoder, its parameters placed on `mesh`.
      tokenizer: of the run.
      mesh: the devices.
      step: updates done.
    """

    folder: RunFolder
    config: configs.ConfigDict
    model: Transformer
    tokenizer: data.Tokenizer
    mesh: Mesh
    step: int


def train(
    config: configs.ConfigDict, run: str, *, profile: tuple[int, int] | None = None, quiet: bool = False
) -> Trained:
    """Trains, or continues, the run in a folder until `config.run.steps`.

    Args:
      config: from a file in `configs/`; see `train.config.base_config`.
      run: folder or `gs://` URL; created, or continued if it holds the same identity.
      profile: first and last step of an xprof trace, written to `run/profile`.
      quiet: print nothing.

    Raises:
      UsageError: anything about the input that cannot work, before compilation.
    """
    configs.check(config)
    mesh = make_mesh(config.mesh)
    configs.check_mesh(config, mesh)
    folder = RunFolder(run)
    corpus = data.open_corpus(config.data.source, config.run.data_dir, text_field=config.data.text_field)
    tokenizer = data.open_tokenizer(config.data.tokenizer)
    claim(folder, config, corpus, tokenizer)
    model_config = configs.check(config, vocab_size=padded_vocab(tokenizer))
    order, evaluation = open_batches(config, corpus, tokenizer)

    display = Display(config.run.steps, quiet=quiet or jax.process_index() > 0)
    with jax.set_mesh(mesh), contextlib.closing(
        Checkpoints(folder.checkpoints, keep=config.run.keep_checkpoints)
    ) as checkpoints:
        start = checkpoints.latest() or 0
        display.say(describe(config, model_config, mesh, corpus, tokenizer, folder, start))
        graph, optimizer, abstract, make_state = plan_state(model_config, config, mesh)
        state = checkpoints.restore(start, abstract) if start else make_state()
        placement = NamedSharding(mesh, partition_spec(("batch", "time")))
        run_step, run_eval = compile_steps(graph, optimizer, abstract, placement, model_config, config, display)
        log = StepLog(folder, config, model_config, display, start)
        batches = data.Loader(order, placement, start, config.run.steps, prefetch=config.run.prefetch)
        try:
            with display:
                for step, batch in enumerate(batches, start):
                    with tracing(profile, step, folder):
                        state, metrics = run_step(state, batch)
                    log.step(step + 1, metrics)
                    last = step + 1 == config.run.steps
                    if last or due(step + 1, config.run.eval_every):
                        log.evaluation(step + 1, evaluate(run_eval, state, evaluation, placement))
                    if last or due(step + 1, config.run.checkpoint_every):
                        checkpoints.save(step + 1, state)
                        log.flush(step + 1)
        finally:
            log.close()
    return Trained(folder, config, nnx.merge(graph, state.params), tokenizer, mesh, int(state.step))


def padded_vocab(tokenizer: data.Tokenizer) -> int:
    """Rows of the embedding: a multiple of 8, so that it divides over tensor-parallel devices."""
    return math.ceil(tokenizer.vocab_size / 8) * 8


def claim(folder: RunFolder, config: configs.ConfigDict, corpus: data.Corpus, tokenizer: data.Tokenizer) -> None:
    """Writes `run.json` in a fresh folder; in a used one checks that it is the same run.

    Raises:
      UsageError: another identity, tokenizer or corpus; names what differs.
    """
    record = {
        "identity": configs.identity(config),
        "config": config.to_dict(),
        "tokenizer": {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "digest": tokenizer.fingerprint},
        "corpus": {"name": corpus.name, "digest": corpus.digest},
    }
    old = folder.read_record()
    if old is None:
        if jax.process_index() == 0:
            folder.write_record(record)
        return
    check_identity(old, record, folder.path)


def plan_state(model_config: TransformerConfig, config: configs.ConfigDict, mesh: Mesh):
    """Decides the state without allocating it.

    Returns:
      The graph of the model, the optimizer, the `TrainState` as
      `ShapeDtypeStruct` with shardings, and a function that makes it on the mesh.
    """
    build = lambda: Transformer(model_config, rngs=nnx.Rngs(config.seed))  # noqa: E731
    skeleton = nnx.eval_shape(build)
    graph = nnx.graphdef(skeleton)
    axes = logical_axes(skeleton)
    optimizer = make_optimizer(config.optimizer, axes, config.run.steps)
    make = lambda: init_state(build(), optimizer)  # noqa: E731
    shapes = jax.eval_shape(make)
    # Moments have the shapes of their parameters, at paths that end like theirs.
    placed = state_shardings(mesh, shapes, axes)
    abstract = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed)
    return graph, optimizer, abstract, jax.jit(make, out_shardings=placed)


def state_shardings(mesh: Mesh, shapes: TrainState, axes) -> TrainState:
    """Where each leaf of the state lives: parameters by name, moments beside them, scalars everywhere."""
    params = shardings(mesh, shapes.params, axes)
    everywhere = NamedSharding(mesh, P())
    by_path = dict(jax.tree_util.tree_flatten_with_path(params)[0])

    def moment(path, _):
        # The path of a moment ends with the path of its parameter.
        return next((by_path[path[i:]] for i in range(len(path)) if path[i:] in by_path), everywhere)

    return TrainState(everywhere, params, jax.tree_util.tree_map_with_path(moment, shapes.opt_state))


def compile_steps(graph, optimizer, abstract: TrainState, placement, model_config, config, display: Display):
    """Compiles the training step, so that the bar starts when training does; evaluation compiles at first use."""
    step = make_train_step(
        graph,
        optimizer,
        layers=model_config.layers(),
        z_loss=config.optimizer.z_loss,
        accumulate=config.run.accumulate,
    )
    everywhere = NamedSharding(placement.mesh, P())
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    run_step = jax.jit(step, donate_argnums=0, out_shardings=(placed, everywhere))
    shape = (config.data.batch_size, config.data.seq_len)
    batch = {key: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placement) for key in BATCH_KEYS}
    begin = time.perf_counter()
    run_step = run_step.lower(abstract, batch).compile()
    display.say(f"Compiled the training step in {time.perf_counter() - begin:.0f} s.")
    run_eval = jax.jit(make_eval_step(graph), out_shardings=everywhere)
    return lambda state, batch: run_step(state, {key: batch[key] for key in BATCH_KEYS}), run_eval


def evaluate(run_eval, state: TrainState, batches, placement) -> dict[str, float]:
    """Bits per byte, loss and perplexity on fixed validation sequences."""
    nats = tokens = num_bytes = 0.0
    for batch in data.Loader(batches, placement):
        sums = run_eval(state.params, batch)
        nats, tokens = nats + float(sums.nats), tokens + float(sums.tokens)
        num_bytes += float(batch["target_bytes"].sum())
    loss = nats / tokens
    return {
        "val/bits_per_byte": nats / math.log(2) / num_bytes,
        "val/loss": loss,
        "val/perplexity": math.exp(min(loss, 700.0)),
    }


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


@contextlib.contextmanager
def tracing(span: tuple[int, int] | None, step: int, folder: RunFolder):
    """Records an xprof trace from the first to the last step of `span`, both included."""
    if span and step == span[0]:
        jax.profiler.start_trace(str(folder.local / "profile"))
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
        yield
    if span and step == span[1]:
        jax.block_until_ready(jax.live_arrays())
        jax.profiler.stop_trace()


def describe(config, model_config, mesh, corpus, tokenizer, folder, start) -> str:
    """The first lines on the screen: what runs on what."""
    devices = jax.devices()
    axes = " ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    begin = f"continues at step {start}" if start else "starts"
    windows = ", ".join(dict.fromkeys(str(spec) for spec in model_config.layers()))
    return (
        f"Run {folder.path} {begin}; jax {jax.__version__}, {len(devices)} x {devices[0].device_kind} ({axes}).\n"
        f"Model: {model_config.num_params():,} parameters, {model_config.depth} layers of width "
        f"{model_config.width}, {windows}, {model_config.dtype}.\n"
        f"Data: {corpus.name} ({corpus.digest[:12]}), {tokenizer.name}, {config.data.order} rows of "
        f"{config.data.seq_len} tokens, {config.data.batch_size} a step."
    )


class StepLog:
    """Collects what steps report and writes it every `run.log_every` steps.

    Metrics stay on the device until then, so the host runs ahead of the device.
    """

    def __init__(self, folder, config, model_config: TransformerConfig, display: Display, start: int):
        self._config, self._display, self._folder = config, display, folder
        self._flops = FlopCounter(model_config, config.data.seq_len)
        self._peak, self.peak_source = peak_flops()
        self._schedule = make_schedule(config.optimizer, config.run.steps)
        self._files = None
        if jax.process_index() == 0:
            self._files = MetricsLog(folder.local, start, tensorboard=config.run.tensorboard)
        self._pending: list[tuple[int, dict]] = []
        self._bits = ""
        self._clock = time.perf_counter()

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the device metrics of the update that made `step`."""
        self._pending.append((step, metrics))
        if due(step, self._config.run.log_every):
            self.flush(step)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Writes validation metrics; the time since the last step does not count as training."""
        self.flush(step)
        self._bits = f"  val {values['val/bits_per_byte']:.3f} bits/byte"
        if self._files:
            self._files.write(step, values)
            self._files.flush()
        self._clock = time.perf_counter()

    def flush(self, step: int) -> None:
        """Fetches pending metrics, writes them, and shows the last."""
        if not self._pending:
            self._clock = time.perf_counter()
            return
        c = self._config
        fetched = [(at, {k: float(v) for k, v in jax.device_get(m).items()}) for at, m in self._pending]
        seconds = (time.perf_counter() - self._clock) / len(fetched)
        tokens = c.data.batch_size * c.data.seq_len
        for at, values in fetched:
            pairs = values.pop("visible_pairs")
            speed = {
                "tokens_per_second": tokens / seconds,
                "mfu_useful": self._flops.useful(tokens, pairs) / seconds / self._peak,
                "mfu_executed": self._flops.executed(tokens) / seconds / self._peak,
                "learning_rate": c.optimizer.learning_rate * float(self._schedule(at - 1)),
            }
            values |= speed
            if self._files:
                self._files.write(at, {f"train/{key}": value for key, value in values.items()})
        if self._files:
            self._files.flush()
            self._folder.sync()
        text = (
            f"loss {values['loss']:.3f}{self._bits}  {values['tokens_per_second']:,.0f} tokens/s  "
            f"MFU {values['mfu_useful']:.1%} useful, {values['mfu_executed']:.1%} executed"
        )
        self._display.update(step, text)
        self._pending.clear()
        self._clock = time.perf_counter()

    def close(self) -> None:
        """Writes what is pending and closes the files."""
        if self._pending:
            self.flush(self._pending[-1][0])
        if self._files:
            self._files.close()
            self._folder.sync()
