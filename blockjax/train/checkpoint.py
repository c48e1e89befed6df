"""Asynchronous orbax checkpoints of the `TrainState`.

The data order is a function of (seed, step), so the state is all that a
resumed run needs.
"""

from __future__ import annotations

import orbax.checkpoint as ocp
from etils import epath

from blockjax.train.step import TrainState


class Checkpoints:
    """The checkpoints of one run, `<folder>/<step>`.

    Args:
      folder: absolute path or bucket URL; need not exist.
      keep: how many of the newest to keep.
    """

    def __init__(self, folder: epath.Path, keep: int = 2):
        self.folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(folder, options=options)

    def latest(self) -> int | None:
        """The newest step that has a checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Starts writing; returns once the arrays are copied to the host. A saved step is left alone."""
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(_tree(state)))

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Reads a checkpoint into the shapes, dtypes and shardings of `like`.

        Args:
          step: from `latest`.
          like: a `TrainState` of arrays, or of `jax.ShapeDtypeStruct` with shardings.
        """
        return TrainState(**self._manager.restore(step, args=ocp.args.StandardRestore(_tree(like))))

    def wait(self) -> None:
        """Blocks until everything saved is on disk; raises what a write raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the threads."""
        self._manager.close()


def _tree(state: TrainState) -> dict:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}
