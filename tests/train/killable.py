"""Training in processes that end where a test says; forked from one that has imported everything."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import signal
import threading
import time

MODULE = "tests.train.killable"


@dataclasses.dataclass(frozen=True)
class End:
    """Where a process ends.

    Attributes:
      place: `step` (some time after batch `at` was taken), `copy`, `write`, `written`, `commit`, `manifest`,
        `journal`, `retire` (moments of the save of step `at`), `read` (of any checkpoint), `evaluation`, or a
        place of the watchdog's in which it hangs: `loader`, `stuck step`, `stuck evaluation`, `stuck save`.
      at: batch, also of an evaluation, or step.
      sends: signals, in this order, that the process gets there.
      delay: seconds until then, for `step`.
    """

    place: str
    at: int
    sends: tuple[int, ...] = (signal.SIGKILL,)
    delay: float = 0.0


class Trainer:
    """Starts training processes on CPU devices.

    Args:
      devices: how many.
    """

    def __init__(self, devices: int = 4):
        self._devices = devices
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([MODULE])

    def run(self, config, folder: pathlib.Path, end: End | None = None, timeout: float = 240) -> int:
        """Trains until the end; the exit code, negative for a signal."""
        arguments = (config.to_json(), str(folder), end, self._devices)
        process = self._context.Process(target=_train, args=arguments)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise AssertionError(f"still at work after {timeout} s: {end}")
        return process.exitcode


def _train(config_json: str, folder: str, end: End | None, devices: int) -> None:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    # What it prints is not of interest, unless it fails.
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    out = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import jax
    from blockjax.kernels import block_sparse_attention, linear_attention
    from ml_collections import ConfigDict

    from blockjax import cli

    for op in (block_sparse_attention, linear_attention):
        op.api.BACKENDS = {"reference": op.reference}
    jax.config.update("jax_platforms", "cpu")
    assert jax.device_count() == devices
    _record_batches(pathlib.Path(folder))
    if end:
        _arrange(end)

    def main():
        loop.train(ConfigDict(json.loads(config_json)), folder, quiet=True)

    cli.ending(main)


def _record_batches(folder: pathlib.Path) -> None:
    """Writes the number and the digest of every training batch that is taken."""
    iterate = Loader.__iter__

    def recorded(self):
        for k, batch in enumerate(iterate(self), self._start):
            if not isinstance(self._order, Evaluation):
                digest = hashlib.sha256(batch["tokens"].__array__().tobytes()).hexdigest()
                with (folder / "batches.txt").open("a") as file:
                    file.write(f"{k} {digest}\n")
            yield batch

    Loader.__iter__ = recorded


def _arrange(end: End) -> None:
    def strike() -> None:
        for number in end.sends:
            os.kill(os.getpid(), number)

    def later() -> None:
        time.sleep(end.delay)
        strike()

    def forever(*_, **__) -> None:
        while True:
            time.sleep(1)

    iterate = Loader.__iter__

    def at_batch(self):
        for k, batch in enumerate(iterate(self), self._start):
            training = not isinstance(self._order, Evaluation)
            if k == end.at and end.place == ("loader" if training else "stuck evaluation"):
                forever()
            if training and k == end.at and end.place == "step":
                threading.Thread(target=later).start() if end.delay else strike()
            yield batch

    if end.place in ("step", "loader", "stuck evaluation"):
        Loader.__iter__ = at_batch
        return

    def before(owner, name, applies, act=strike):
        whole = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if applies(*args):
                act()
            return whole(*args, **kwargs)

        setattr(owner, name, wrapped)

    def after(owner, name, applies):
        whole = getattr(owner, name)

        def wrapped(*args, **kwargs):
            result = whole(*args, **kwargs)
            if applies(*args):
                strike()
            return result

        setattr(owner, name, wrapped)

    of_step = lambda folder: f"/{end.at}" in str(folder) and f"/{end.at}/" not in str(folder)  # noqa: E731
    handler = ocp.PyTreeCheckpointHandler
    if end.place == "copy":
        before(ocp.AsyncCheckpointer, "save", lambda self, path, **_: path.name == str(end.at))
    elif end.place == "write":  # arrays are on their way, in the background
        before(handler, "finalize", lambda self, path: of_step(path))
    elif end.place == "written":  # all is written, and not committed
        after(handler, "finalize", lambda self, path: of_step(path))
    elif end.place == "commit":  # committed, without a manifest
        before(manifest, "write", lambda folder, step, *_: step == end.at)
    elif end.place == "manifest":  # a manifest that lies beside its place
        before(
            type(epath.Path("/")), "replace", lambda self, to: str(to).endswith(f"/{end.at}/{manifest.NAME}")
        )
    elif end.place == "journal":
        after(manifest, "write", lambda folder, step, *_: step == end.at)
    elif end.place == "retire":  # the manifest of an old one is gone, its files are not
        before(
            type(epath.Path("/")),
            "rmtree",
            lambda self, *_: self.name.isdecimal() and int(self.name) < end.at,
        )
    elif end.place == "read":
        before(manifest, "check_digests", lambda *_: True)
    elif end.place == "evaluation":
        before(loop, "evaluate", lambda run_eval, state, *_: int(state.step) == end.at)
    elif end.place == "stuck step":
        before(StepLog, "step", lambda self, step, *_: step == end.at, forever)
    elif end.place == "stuck save":
        before(handler, "finalize", lambda self, path: of_step(path), forever)
    else:
        raise ValueError(end.place)


# Imported here, so that forked processes need not.
import orbax.checkpoint as ocp  # noqa: E402
from etils import epath  # noqa: E402

from blockjax.data import Evaluation, Loader  # noqa: E402
from blockjax.train import loop, manifest  # noqa: E402
from blockjax.train.log import StepLog  # noqa: E402
