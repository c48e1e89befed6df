"""How far the runs of a sweep are, from what lies in their folders."""

from __future__ import annotations

import dataclasses
import re

from etils import epath

from blockjax.analysis.plots import series
from blockjax.analysis.positions import by_position
from blockjax.errors import UsageError
from blockjax.sweep.plan import Plan, PlannedRun
from blockjax.train.checkpoint import complete_steps
from blockjax.train.folder import RunFolder, check_identity
from blockjax.train.metrics import read_metrics

LOG = "log.txt"  # in a run folder: what the local launcher's process printed
BITS = "val/bits_per_byte"
END = re.compile(r"--- exit code (-?\d+)")


@dataclasses.dataclass(frozen=True)
class RunState:
    """How far a run is.

    Attributes:
      lines: of `metrics.jsonl`.
      finished: it was validated after its last step, and that step has a checkpoint.
      exit_code: of the process that trained it last, where the local launcher's log has it.
    """

    lines: list[dict]
    finished: bool = False
    exit_code: int | None = None

    @property
    def step(self) -> int:
        """The last update in the metrics."""
        return max((line["step"] for line in self.lines), default=0)

    @property
    def bits(self) -> float | None:
        """Final validation bits per byte; None before the end."""
        return series(self.lines, BITS)[1][-1] if self.finished else None

    @property
    def positions(self) -> dict[int, float]:
        """Final validation bits per byte by position in the document; empty before the end."""
        lines = [line for line in self.lines if BITS in line]
        return by_position(lines[-1]) if self.finished else {}

    def describe(self, steps: int) -> str:
        """In words, for one that is to make `steps` updates."""
        at = f"step {self.step:,} of {steps:,}" if self.lines else "not started"
        if self.finished:
            return "finished"
        return f"failed with exit code {self.exit_code} ({at})" if self.exit_code else at


def read_states(plan: Plan) -> dict[str, RunState]:
    """The state of every run, by name.

    Raises:
      UsageError: the folder cannot be read, or a run in it has another identity; names what differs.
    """
    try:
        root = epath.Path(plan.folder)
        if root.exists() and not root.is_dir():
            raise UsageError(f"--sweep={plan.folder} is a file; name a folder.")
        return {run.name: read_state(plan, run) for run in plan.runs}
    except ImportError as error:
        raise UsageError(f"--sweep={plan.folder}: {error}. Install blockjax[gcs].") from error
    except OSError as error:
        raise UsageError(f"--sweep={plan.folder} cannot be read: {error}.") from error


def read_state(plan: Plan, run: PlannedRun) -> RunState:
    """The state of one run.

    Raises:
      UsageError: its folder holds a run of another identity; names what differs.
    """
    path = plan.path(run)
    if not epath.Path(path).exists():
        return RunState([])
    folder = RunFolder(path, create=False)
    record = folder.read_record()
    if record is not None:
        check_identity(record, {**record, "config": run.config.to_dict()}, path)
    lines = read_metrics(folder.local / "metrics.jsonl")
    validated = run.steps in series(lines, BITS)[0]
    finished = validated and run.steps in complete_steps(folder.checkpoints)
    log = folder.path / LOG
    words = log.read_bytes().decode(errors="replace") if log.exists() else ""
    ended = END.fullmatch(words.rstrip().rpartition("\n")[2])
    return RunState(lines, finished, int(ended[1]) if ended else None)
