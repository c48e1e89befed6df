"""Names, locks and progress for what is prepared once and kept under `data_dir`."""

import contextlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from blockjax.errors import UsageError


def slug(name: str, limit: int = 40) -> str:
    """`name` with everything but letters, digits and `_` replaced, for use in a path."""
    return re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")[:limit] or "unnamed"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock beside `path`, so that one process prepares it and the others wait.

    Raises:
        UsageError: the folder above `path` cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.parent / f".{path.name}.lock")
        lock.acquire()
    except OSError as error:
        raise UsageError(
            f"the data folder {path.parent} cannot be written ({error.strerror or error}); "
            "pass a data_dir on a local disk that you may write to"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A fresh folder to fill with files, renamed to `path` at the end: `path` is never half written.

    The caller holds the lock of `path`, so what lies around from earlier attempts was left by a crash.
    """
    for left in path.parent.glob(f".{path.name}.*/"):
        shutil.rmtree(left)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield fresh
        for file in fresh.iterdir():  # else a crash may keep the new name and lose what it names
            with file.open("rb") as written:
                os.fsync(written.fileno())
        if path.exists():
            shutil.rmtree(path)
        fresh.rename(path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextlib.contextmanager
def progress(label: str, total: int, quiet: bool = False) -> Iterator[Callable[[], None]]:
    """Yields a function to call once a document: a bar on a terminal, else one line at the end."""
    if quiet:
        yield lambda: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda: bar.advance(task)
    else:
        start = time.monotonic()
        yield lambda: None
        print(f"{label}: {total} documents in {time.monotonic() - start:.1f} s", file=sys.stderr)
