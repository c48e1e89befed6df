"""Asynchronous orbax checkpoints of the `TrainState`, each with a manifest that restoring verifies.

The data order is a function of (seed, step), so the state is all that a
resumed run needs.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from blockjax.errors import UsageError
from blockjax.train import hosts, manifest
from blockjax.train.config import ConfigDict
from blockjax.train.folder import replace_text
from blockjax.train.manifest import Damaged
from blockjax.train.state import TrainState

JOURNAL = "checkpoints.json"  # beside the folder of checkpoints, and not lost with it
UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of what orbax has not committed
Watch = Callable[[str], contextlib.AbstractContextManager]


class Skipped(NamedTuple):
    """A step that was not restored, and why: the end of a sentence."""

    step: int
    reason: str


class Checkpoints:
    """The checkpoints of one run, `<folder>/<step>`.

    A step is *complete* when its manifest is there and matches. Its processes make the same calls in the same
    order.

    Args:
      folder: absolute path or bucket URL; need not exist.
      config: `keep_checkpoints`, `keep_every` and `keep_hours`, see `expired`.
      watch: a context manager around what may hang, given its name.
      clock: seconds since 1970.

    Attributes:
      skipped: what the last `restore` or `restore_params` passed over, the newest first.
    """

    def __init__(
        self,
        folder: epath.Path,
        config: ConfigDict,
        *,
        watch: Watch = contextlib.nullcontext,
        clock: Callable[[], float] = time.time,
    ):
        folder = epath.Path(folder)
        self._folder, self._config, self._watch, self._clock = folder, config, watch, clock
        self._writer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._journal = folder.parent / JOURNAL
        self._saved: int | None = None
        self._finisher: threading.Thread | None = None
        self._failure: tuple[int, Exception] | None = None
        self.skipped: list[Skipped] = []

    def prepare(self, num_bytes: int) -> None:
        """Makes the folder ready to be written, and clears what dead saves left; process 0.

        Args:
          num_bytes: of a checkpoint.

        Raises:
          UsageError: it cannot be written, or has no room for a checkpoint.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / ".writable").touch()
            (self._folder / ".writable").unlink()
            for path in self._folder.iterdir():
                if UNFINISHED in path.name:
                    path.rmtree()
        except OSError as error:
            raise UsageError(f"The folder {self._folder} cannot be written: {error}.") from error
        if "://" not in str(self._folder):
            free = shutil.disk_usage(self._folder).free
            if free < num_bytes:
                raise UsageError(
                    f"A checkpoint takes {num_bytes / 1e9:.3g} GB, and {self._folder} has room for "
                    f"{free / 1e9:.3g} GB; make room, or use another disk with --run."
                )

    def restore(self, like: TrainState) -> tuple[TrainState, int] | None:
        """The newest complete checkpoint, in the shapes, dtypes and shardings of `like`, and its step.

        Args:
          like: a `TrainState` of arrays, or of `jax.ShapeDtypeStruct` with shardings.

        Returns:
          None if the run has none yet.

        Raises:
          UsageError: it had complete ones, and none can be used: names each and what is wrong with it.
        """
        found = self._newest(_tree(like))
        return found and (TrainState(**found[0]), found[1])

    def restore_params(self, like: dict) -> tuple[dict, int] | None:
        """The parameters only, in the shapes and shardings of `like`; else as `restore`."""
        found = self._newest({"params": like}, "params/")
        return found and (found[0]["params"], found[1])

    def save(self, step: int, state: TrainState) -> None:
        """Starts writing; returns once the arrays are copied to the host. A step is saved once.

        Raises:
          UsageError: this one cannot be written, or the one before could not.
        """
        if step == self._saved:
            return
        self.wait()
        first = jax.process_index() == 0
        try:
            if first:
                replace_text(
                    self._journal, json.dumps({"complete": self._read_journal()[0], "writing": step})
                )
            tree = _tree(state)
            found = manifest.digests(tree)
            with self._watch(f"the copy of checkpoint {step} to the host"):
                # What lies there under this number was not complete, else the run would have gone on from it.
                self._writer.save(self._folder / str(step), args=ocp.args.PyTreeSave(tree), force=True)
        except Exception as error:
            raise self._cannot_write(step, error) from error
        self._saved = step
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        work = lambda: self._finish(step, shapes, found)  # noqa: E731
        self._finisher = threading.Thread(target=work, name=f"checkpoint-{step}", daemon=True)
        self._finisher.start()

    def wait(self) -> None:
        """Waits until what was saved is complete.

        Raises:
          UsageError: it could not be written.
        """
        if self._finisher:
            self._finisher.join()
            self._finisher = None
        if self._failure:
            (step, error), self._failure = self._failure, None
            self._saved = None
            raise self._cannot_write(step, error) from error

    def close(self) -> None:
        """Waits and releases the threads; raises as `wait`."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # it was raised by `wait`
                self._writer.close()

    def _finish(self, step: int, shapes: Any, found: jax.Array) -> None:
        """What follows the copy to the host: the commit, the manifest, the end of older ones."""
        try:
            with self._watch(f"the writing of checkpoint {step}"):
                self._writer.wait_until_finished()
                if jax.process_index() == 0:
                    leaves = manifest.describe(shapes, np.asarray(found))
                    manifest.write(self._folder / str(step), step, leaves, self._clock())
                    replace_text(self._journal, json.dumps({"complete": step, "writing": None}))
                    self._retire()
        except Exception as error:
            self._failure = step, error

    def _retire(self) -> None:
        times, dead = {}, []
        for step in steps_in(self._folder):
            folder = self._folder / str(step)
            if folder.is_dir() and not (folder / manifest.NAME).exists():
                dead.append(step)
                continue
            with contextlib.suppress(Damaged):
                times[step] = manifest.read(folder, step)["time"]
        c = self._config
        gone = expired(
            times, self._clock(), newest=c.keep_checkpoints, every=c.keep_every, hours=c.keep_hours
        )
        for step in gone:
            # A kill here leaves a dead one, which goes the next time.
            (self._folder / str(step) / manifest.NAME).unlink()
        for step in (*gone, *(step for step in dead if step < max(times))):
            (self._folder / str(step)).rmtree()

    def _newest(self, like: dict, below: str = "") -> tuple[dict, int] | None:
        self.skipped = []
        self._saved = None
        with self._watch("the search for checkpoints"):
            steps = hosts.of_first(lambda: steps_in(self._folder))
        for step in steps:
            reason, tree = "", None
            with self._watch(f"the reading of checkpoint {step}"):
                try:
                    tree = self._read(step, like, below)
                except Damaged as error:
                    reason = str(error)
                usable = hosts.agree(not reason)
            if usable:
                return tree, step
            self.skipped.append(Skipped(step, reason or "another process could not read it"))
        complete, writing = self._read_journal()
        lost = [s for s in self.skipped if s.step != writing]
        if complete is None and not lost:
            return None
        words = "; ".join(f"{step}: {reason}" for step, reason in self.skipped) or "there are none"
        known = "" if complete is None else f", though step {complete} was once complete"
        raise UsageError(
            f"None of the checkpoints in {self._folder} can be used{known}: {words}. "
            "Bring one back, or start another run with --run=runs/NAME."
        )

    def _read(self, step: int, like: dict, below: str) -> dict:
        folder = self._folder / str(step)
        content = manifest.read(folder, step)
        manifest.check_tree(content, like, below)
        restore_args = ocp.checkpoint_utils.construct_restore_args(like)
        args = ocp.args.PyTreeRestore(like, restore_args=restore_args, partial_restore=bool(below))
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                tree = reader.restore(folder, args=args)
        except Exception as error:  # whatever damaged files make of orbax and its libraries
            raise Damaged(f"it cannot be read ({type(error).__name__}: {first_line(error)})") from error
        manifest.check_digests(content, tree)
        return tree

    def _read_journal(self) -> tuple[int | None, int | None]:
        """The newest step that was ever complete, and the one that was being written."""
        try:
            content = json.loads(self._journal.read_text())
            return content["complete"], content["writing"]
        except (OSError, ValueError, LookupError, TypeError):
            return None, None

    def _cannot_write(self, step: int, error: Exception) -> UsageError:
        complete, _ = self._read_journal()
        known = "no other is complete" if complete is None else f"step {complete} is complete and stays"
        return UsageError(
            f"Checkpoint {step} cannot be written to {self._folder} ({type(error).__name__}: "
            f"{first_line(error)}); {known}. See to the disk; the same command goes on from there."
        )


def steps_in(folder: epath.Path) -> list[int]:
    """Steps of which there is something, the newest first."""
    if not folder.is_dir():
        return []
    names = (path.name for path in folder.iterdir())
    return sorted((int(name) for name in names if name.isdecimal() and str(int(name)) == name), reverse=True)


def complete_steps(folder: epath.Path) -> list[int]:
    """Steps with a manifest that matches their files, the newest first; their arrays are not read."""
    found = []
    for step in steps_in(folder):
        with contextlib.suppress(Damaged):
            manifest.read(folder / str(step), step)
            found.append(step)
    return found


def expired(
    times: Mapping[int, float], now: float, *, newest: int, every: int = 0, hours: float = 0.0
) -> list[int]:
    """Steps that are kept no longer.

    Args:
      times: when each complete step was written, in seconds.
      now: in seconds.
      newest: how many of the last are kept.
      every: multiples of this step are kept; 0: none for that.
      hours: those younger than this are kept.
    """
    last = sorted(times)[-newest:]
    return [
        step
        for step, written in sorted(times.items())
        if step not in last and not (every and step % every == 0) and now - written >= hours * 3600
    ]


def first_line(error: Exception) -> str:
    """What an error says, without what follows in further lines."""
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


def _tree(state: TrainState) -> dict:
    tree = {"step": state.step, "params": state.params, "opt_state": state.opt_state, "health": state.health}
    return tree if state.memory is None else tree | {"memory": state.memory}
