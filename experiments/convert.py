"""Makes a trained pre-norm run the start of one with depth attention.

Command: python experiments/convert.py --config=configs/lm.py --config.model.residual=delta_block:size=8
         --from_run=runs/base --run=runs/depth

The config is that of the new run. experiments/train.py with the same config and --run goes on from there.
"""

from absl import flags
from ml_collections import config_flags

from blockjax import cli
from blockjax.train.convert import convert

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "file in configs/, with an optional argument after ':'"
)
FROM = flags.DEFINE_string("from_run", None, "folder of the trained run, on disk or gs://")
RUN = flags.DEFINE_string("run", None, "fresh run folder, on disk or gs://")


def main() -> None:
    done = convert(CONFIG.value, FROM.value, RUN.value)
    print(
        f"Step {done.step} of {FROM.value} is step 0 of {RUN.value}. Largest difference of logits on a "
        f"validation batch: {done.difference:.2g}, of logits up to {done.largest:.3g}."
    )


if __name__ == "__main__":
    cli.run(main)
