"""What a run says while it trains: files, TensorBoard and the terminal, from the metrics of steps."""

from __future__ import annotations

import contextlib
import time

import jax

from blockjax.models import TransformerConfig
from blockjax.train.checkpoint import Watch
from blockjax.train.config import ConfigDict, due
from blockjax.train.display import Display
from blockjax.train.endings import Diverged
from blockjax.train.flops import FlopCounter, peak_flops
from blockjax.train.folder import RunFolder
from blockjax.train.metrics import MetricsLog
from blockjax.train.optimizer import make_schedule
from blockjax.train.step import make_dial

SYNC_SECONDS = 30.0  # a bucket takes one write a second to an object, and each is a whole copy


class StepLog:
    """Collects what steps report and writes it every `run.log_every` steps.

    Metrics stay on the device until then, so the host runs ahead of the device.
    A context manager: leaving it writes what is pending. Whatever writes raises
    `Diverged` after `run.max_skipped` steps in a row that were skipped.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: ConfigDict,
        model_config: TransformerConfig,
        display: Display,
        start: int,
        watch: Watch = contextlib.nullcontext,
    ):
        self._config, self._display, self._folder, self._watch = config, display, folder, watch
        self._flops = FlopCounter(model_config, config.data.seq_len)
        self._peak, self._peak_source = peak_flops()
        self._schedule = make_schedule(config.optimizer, config.run.steps)
        self._dial = make_dial(model_config, config.optimizer.locality_warmup)
        self._files = None
        if jax.process_index() == 0:
            self._files = MetricsLog(folder.local, start, tensorboard=config.run.tensorboard)
        self._pending: list[tuple[int, dict]] = []
        self._start = start
        self._bits = ""
        self._clock = time.perf_counter()

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the device metrics of the update that made `step`."""
        self._pending.append((step, metrics))
        if due(step, self._config.run.log_every):
            self._write_pending()
            self._folder.sync(at_most_every=SYNC_SECONDS)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Writes validation metrics; the time since the last step does not count as training."""
        self._write_pending()
        self._bits = f"  val {values['val/bits_per_byte']:.3f}"
        if self._files:
            self._files.write(step, values)
            self._files.flush()
        self._show(step)
        self._clock = time.perf_counter()

    def flush(self) -> None:
        """Waits for the steps so far; then everything about them is in the run folder."""
        self._write_pending()
        if self._files:
            self._folder.sync()

    def _write_pending(self) -> None:
        if not self._pending:
            return
        c = self._config
        with self._watch(f"the devices, steps {self._pending[0][0]} to {self._pending[-1][0]}"):
            fetched = [(at, {k: float(v) for k, v in jax.device_get(m).items()}) for at, m in self._pending]
        seconds = (time.perf_counter() - self._clock) / len(fetched)
        tokens = c.data.batch_size * c.data.seq_len
        self._pending.clear()
        for at, values in fetched:
            pairs = values["visible_pairs"]
            speed = {
                "tokens_per_second": tokens / seconds,
                "mfu_useful": self._flops.useful(tokens, pairs) / seconds / self._peak,
                "mfu_executed": self._flops.executed(tokens, self._dial(at - 1)) / seconds / self._peak,
                "learning_rate": c.optimizer.learning_rate * float(self._schedule(updates(at, values))),
            }
            values |= speed
            if self._files:
                self._files.write(at, {f"train/{key}": value for key, value in values.items()})
        if self._files:
            self._files.flush()
        self._last = values
        self._show(at)
        self._clock = time.perf_counter()
        for at, values in fetched:
            if values["skipped_in_a_row"] >= c.run.max_skipped:
                raise Diverged(diverged(at, values))

    def _show(self, step: int) -> None:
        last = self._last
        skipped = f"  {last['skipped_steps']:.0f} skipped" if last["skipped_steps"] else ""
        self._display.update(
            step,
            f"loss {last['loss']:.3f}{self._bits}  {last['tokens_per_second']:,.0f} tok/s  "
            f"MFU {last['mfu_useful']:.0%} ({last['mfu_executed']:.0%})" + skipped,
        )

    def __enter__(self) -> StepLog:
        self._display.say(
            "Loss in nats per token, val in bits per byte. MFU of useful (executed) FLOPs: 100% is "
            f"{self._peak / 1e12:.3g} TFLOP/s, {self._peak_source}."
        )
        self._display.start(self._start)
        self._clock = time.perf_counter()
        return self

    def __exit__(self, *error) -> None:
        try:
            self._write_pending()
        finally:
            self._display.stop()
            if self._files:
                self._files.close()
                self._folder.sync()


def updates(step: int, values: dict[str, float]) -> int:
    """Updates made before the one of this step, which may have been skipped itself: the optimizer's count."""
    skipped = values["skipped_steps"] - (values["skipped_in_a_row"] > 0)
    return step - 1 - int(skipped)


def diverged(step: int, values: dict[str, float]) -> str:
    """Why a run stops, in a sentence."""
    count = int(values["skipped_in_a_row"])
    return (
        f"The loss or the gradient was not finite {count} times in a row, in batches {step - count} to "
        f"{step - 1} (loss {values['loss']}, gradient norm {values['grad_norm']}). No update was made with "
        "them, and the last checkpoint is good. Lower optimizer.learning_rate in a new run, look at the "
        "data, or go on with a higher run.max_skipped."
    )
