"""Locks on files that end with the process that holds them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from typing import IO

import jax

from blockjax.errors import UsageError
from blockjax.train import hosts
from blockjax.train.folder import RunFolder

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

NAME = ".lock"


def lock(file: IO) -> None:
    """Locks an open file for as long as it is open, and closed by the end of the process whatever ends it.

    File systems without locks let everyone pass.

    Raises:
      BlockingIOError: someone else holds it.
    """
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass


@contextlib.contextmanager
def held(folder: RunFolder) -> Iterator[None]:
    """Holds a run folder on disk for one job: process 0 locks it. In a bucket nothing is locked.

    Raises:
      UsageError: another job is at work there; names its host and process.
    """
    with contextlib.ExitStack() as stack:
        refusal = ""
        if jax.process_index() == 0 and not folder.remote:
            try:
                file = stack.enter_context((folder.local / NAME).open("a+"))
                lock(file)
                file.truncate(0)
                file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
                file.flush()
            except BlockingIOError:
                file.seek(0)
                refusal = (
                    f"Another job trains in {folder.path} ({file.read() or 'it does not say which'}); "
                    "end it first, or name another folder with --run."
                )
            except OSError as error:
                refusal = f"{folder.local / NAME} cannot be written: {error}."
        hosts.barrier("the run folder is locked")
        if not hosts.agree(not refusal):
            raise UsageError(refusal or f"Another job trains in {folder.path}.")
        yield
