"""Trains a config at several settings and seeds: those that `sweep(add, config)` of the config file names.

Command: python experiments/sweep.py --config=configs/NAME.py --sweep=runs/NAME --jobs=2

Any key of the config can be set for all runs: --config.run.steps=100. The same command skips what is
finished and continues the rest; table and plot are in sweep.md of the sweep folder.
"""

import os
import sys

from absl import flags
from ml_collections import config_flags

from blockjax import cli
from blockjax.sweep.launch import LAUNCHERS, launch

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "file in configs/ with sweep(add, config), with an optional argument after ':'"
)
SWEEP = flags.DEFINE_string("sweep", None, "sweep folder, on disk or gs://; runs go to folders in it")
LAUNCHER = flags.DEFINE_enum("launcher", "local", LAUNCHERS, "where runs go; none only summarises")
JOBS = flags.DEFINE_integer(
    "jobs",
    None,
    "runs at a time (local: 1, slurm: all); each gets a part of CUDA_VISIBLE_DEVICES",
    lower_bound=1,
)
ONLY = flags.DEFINE_string("only", None, "start only runs whose name contains this, or matches it as a glob")
SLURM = flags.DEFINE_multi_string("slurm", None, "key=value of the Slurm job, such as timeout_min=600")
XPK = flags.DEFINE_multi_string("xpk", None, "key=value of xpk workload create, such as cluster=NAME")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "say what would be started")

TRAIN = os.path.relpath(os.path.join(os.path.dirname(__file__), "train.py"))


def main() -> None:
    code = launch(
        config_flags.get_config_filename(flags.FLAGS["config"]),
        CONFIG.value,
        SWEEP.value,
        script=TRAIN,
        launcher=LAUNCHER.value,
        jobs=JOBS.value,
        only=ONLY.value,
        slurm=SLURM.value,
        xpk=XPK.value,
        dry_run=DRY_RUN.value,
    )
    sys.exit(code)


if __name__ == "__main__":
    cli.run(main)
