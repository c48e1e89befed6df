"""What a run says while it trains: files, TensorBoard and the terminal, from the metrics of steps."""

from __future__ import annotations

import time

import jax

from blockjax.models import TransformerConfig
from blockjax.train.config import ConfigDict, due
from blockjax.train.display import Display
from blockjax.train.flops import FlopCounter, peak_flops
from blockjax.train.folder import RunFolder
from blockjax.train.metrics import MetricsLog
from blockjax.train.optimizer import make_schedule


class StepLog:
    """Collects what steps report and writes it every `run.log_every` steps.

    Metrics stay on the device until then, so the host runs ahead of the device.
    A context manager: leaving it writes what is pending.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: ConfigDict,
        model_config: TransformerConfig,
        display: Display,
        start: int,
    ):
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

    def __enter__(self) -> StepLog:
        self._display.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._display.__exit__(*error)
        if self._pending:
            self.flush(self._pending[-1][0])
        if self._files:
            self._files.close()
            self._folder.sync()
