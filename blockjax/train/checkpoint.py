"""Asynchronous orbax checkpoints of the `TrainState`.

The data order is a function of (seed, step), so the state is all that a
resumed run needs.
"""

from __future__ import annotations

import orbax.checkpoint as ocp
from etils import epath

from blockjax.train.config import ConfigDict
from blockjax.train.state import TrainState


class Checkpoints:
    """The checkpoints of one run, `<folder>/<step>`.

    Args:
      folder: absolute path or bucket URL; need not exist.
      config: `keep_checkpoints`, how many of the newest to keep.
    """

    def __init__(self, folder: epath.Path, config: ConfigDict):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep_checkpoints, enable_async_checkpointing=True
        )
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

    def restore_params(self, step: int, like: dict) -> dict:
        """Reads the parameters only, into the shapes and shardings of `like`."""
        restore_args = ocp.checkpoint_utils.construct_restore_args({"params": like})
        args = ocp.args.PyTreeRestore({"params": like}, restore_args=restore_args, partial_restore=True)
        return self._manager.restore(step, args=args)["params"]

    def close(self) -> None:
        """Waits and releases the threads."""
        self._manager.close()


def _tree(state: TrainState) -> dict:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}
