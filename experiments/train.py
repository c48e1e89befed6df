"""Trains a decoder: `python experiments/train.py --config=configs/quickstart.py --run=runs/quickstart`.

Any key of the config can be set: `--config.model.depth=12`. The same command
continues a run that was stopped.
"""

from absl import flags
from ml_collections import config_flags

from blockjax import cli
from blockjax.analysis import report
from blockjax.train import loop
from blockjax.train.config import check_profile

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "file in configs/, with an optional argument after ':'"
)
RUN = flags.DEFINE_string("run", None, "run folder, on disk or gs://; continued if it exists")
PROFILE = flags.DEFINE_list("profile", None, "first,last step of an xprof trace, written to RUN/profile")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "join the other hosts of a TPU pod or a Slurm job")
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "address:port of process 0, where hosts cannot be found"
)
PROCESSES = flags.DEFINE_integer("processes", None, "number of processes, with --coordinator")
PROCESS = flags.DEFINE_integer("process", None, "index of this process, with --coordinator")


def main() -> None:
    cli.join_hosts(DISTRIBUTED.value, COORDINATOR.value, PROCESSES.value, PROCESS.value)
    profile = check_profile(PROFILE.value, CONFIG.value.run.steps)
    run = loop.train(CONFIG.value, RUN.value, profile=profile)
    path = report.write(run) if CONFIG.value.run.report else None
    if path:
        print(f"Report: {path}")


if __name__ == "__main__":
    cli.run(main)
