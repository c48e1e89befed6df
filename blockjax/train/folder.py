"""The run folder: what lies where, whether on disk or in a bucket."""

from __future__ import annotations

import json
import pathlib
import tempfile
import time

from etils import epath

from blockjax.errors import UsageError
from blockjax.train import config as configs

RECORD = ("config", "tokenizer", "corpus")


class RunFolder:
    """A run's files: `run.json`, `metrics.jsonl`, `checkpoints/`, `tensorboard/`, `report/`.

    Everything but checkpoints is written to `local` and copied by `sync`: in a
    bucket (`gs://...`) objects cannot be appended to. For a folder on disk
    `local` is the folder itself.
    """

    def __init__(self, path: str, create: bool = True):
        if not path:
            raise UsageError("No run folder: name one with --run=runs/NAME or --run=gs://BUCKET/NAME.")
        self.remote = "://" in path
        try:
            self.path = epath.Path(path) if self.remote else epath.Path(path).expanduser()
            if not create and not self.path.exists():
                raise UsageError(f"There is no run folder {path}.")
            if self.path.exists() and not self.path.is_dir():
                raise UsageError(f"The run folder {path} is a file; name a folder with --run=runs/NAME.")
            if self.remote:
                self._staging = tempfile.TemporaryDirectory(prefix="blockjax-")
                self.local = pathlib.Path(self._staging.name)
                self._fetch("metrics.jsonl")
            else:
                self.local = pathlib.Path(self.path)
            if create:
                self.path.mkdir(parents=True, exist_ok=True)
                (self.path / ".writable").touch()
                (self.path / ".writable").unlink(missing_ok=True)  # by another process
        except ImportError as error:
            raise UsageError(f"Run folder {path}: {error}. Install blockjax[gcs].") from error
        except OSError as error:
            raise UsageError(f"Run folder {path} cannot be used: {error}.") from error
        self._copied: dict[pathlib.Path, tuple[int, int]] = {}
        self._synced = -float("inf")

    @property
    def checkpoints(self) -> epath.Path:
        """Absolute, as orbax asks."""
        return self.path / "checkpoints" if self.remote else epath.Path(self.local.resolve() / "checkpoints")

    def read_record(self) -> dict | None:
        """What `write_record` wrote at the first start; None in a fresh folder."""
        file = self.path / "run.json"
        if not file.exists():
            return None
        try:
            record = json.loads(file.read_text())
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{file} is damaged ({error}); restore it or use another --run.") from error
        if not isinstance(record, dict) or not isinstance(record.get("config", {}), dict):
            raise UsageError(f"{file} is damaged: it holds no config; restore it or use another --run.")
        if missing := [key for key in RECORD if not isinstance(record.get(key), dict)]:
            raise UsageError(f"{file} is damaged: it lacks {missing[0]!r}; restore it or use another --run.")
        return record

    def write_record(self, record: dict) -> None:
        """Writes `run.json`: config, corpus digest, tokenizer."""
        replace_text(self.path / "run.json", json.dumps(record, indent=2))

    def sync(self, at_most_every: float = 0.0) -> None:
        """Copies what changed to the bucket; nothing to do on disk.

        Args:
          at_most_every: seconds since the last copy within which there is none.
        """
        if not self.remote or time.monotonic() - self._synced < at_most_every:
            return
        self._synced = time.monotonic()
        for file in sorted(p for p in self.local.rglob("*") if p.is_file()):
            stat = file.stat()
            stamp = (stat.st_size, stat.st_mtime_ns)
            if self._copied.get(file) != stamp:
                target = self.path / file.relative_to(self.local).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
                self._copied[file] = stamp

    def _fetch(self, name: str) -> None:
        if (self.path / name).exists():
            (self.local / name).write_bytes((self.path / name).read_bytes())


def replace_text(file: epath.Path, text: str) -> None:
    """Writes a small file that is never half written."""
    fresh = file.parent / f".{file.name}"
    fresh.write_text(text)
    fresh.replace(file)


def check_identity(record: dict, new: dict, path) -> None:
    """Refuses to continue a run as another one.

    Args:
      record: what `run.json` holds: `config`, `tokenizer`, `corpus`.
      new: the same of the run at hand.

    Raises:
      UsageError: names everything that differs with both values, or a
        tokenizer or corpus that changed behind the same name.
    """
    old, now = (configs.identity(configs.complete(r["config"])) for r in (record, new))
    differs = [k for k in sorted(old.keys() | now.keys()) if old.get(k) != now.get(k)]
    if differs:
        changes = "; ".join(f"{k} was {old.get(k)!r}, is {now.get(k)!r}" for k in differs)
        raise UsageError(
            f"Run folder {path} belongs to another run: {changes}. "
            "Use another folder, or the old values to continue it."
        )
    for part in ("tokenizer", "corpus"):
        if record[part] != new[part]:
            was, is_now = (", ".join(f"{k} {str(v)[:12]}" for k, v in r[part].items()) for r in (record, new))
            raise UsageError(
                f"Run folder {path} was trained with another {part}: it was {was}; it is {is_now}. "
                "Bring the old one back, or train in another folder with --run=runs/NAME."
            )
