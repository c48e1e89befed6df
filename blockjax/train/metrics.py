"""Metrics on disk: JSON lines and TensorBoard."""

from __future__ import annotations

import json
import pathlib


class MetricsLog:
    """Writes metrics to `metrics.jsonl` and TensorBoard.

    Args:
      folder: local folder.
      start: step at which the run goes on; later lines of an interrupted start are dropped.
      tensorboard: also write event files to `folder/tensorboard`.
    """

    def __init__(self, folder: pathlib.Path, start: int = 0, tensorboard: bool = True):
        path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= start]
        fresh = folder / ".metrics.jsonl"
        fresh.write_text("".join(json.dumps(line) + "\n" for line in kept))
        fresh.replace(path)  # a kill meanwhile loses nothing
        self._file = path.open("a")
        self._writer = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line `{"step": step, **values}`; keys look like `train/loss`."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for key, value in values.items():
            if self._writer:
                self._writer.add_scalar(key, value, step)

    def flush(self) -> None:
        """Makes everything written visible to readers."""
        self._file.flush()
        if self._writer:
            self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        self._file.close()
        if self._writer:
            self._writer.close()


def read_metrics(path: pathlib.Path) -> list[dict]:
    """The lines of a `metrics.jsonl`; a line cut short by a crash, or otherwise damaged, is left out."""
    lines = []
    if path.exists():
        for text in path.read_bytes().split(b"\n"):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and type(line.get("step")) is int:
                lines.append(line)
    return lines
