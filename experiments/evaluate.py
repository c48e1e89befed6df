"""Evaluates a trained run with the memory of its recurrent layers carried along documents, and without.

Command: python experiments/evaluate.py --run=runs/recurrence/gdn-seed0

Prints bits per byte by position in the document; writes evaluation.json and evaluation.png to the run folder.
"""

from absl import flags

from blockjax import cli
from blockjax.analysis import positions
from blockjax.train.evaluate import MEMORIES, evaluate_memory
from blockjax.train.run import open_run

RUN = flags.DEFINE_string("run", None, "run folder, on disk or gs://")
SEQUENCES = flags.DEFINE_integer("sequences", 100_000, "rows of data.seq_len tokens to read at most")


def main() -> None:
    run = open_run(RUN.value)
    found = evaluate_memory(run, SEQUENCES.value)
    print(f"Step {found['step']:,}, {found['sequences']:,} rows; bits per byte with the memory")
    for line in positions.write({name: found[name] for name in MEMORIES}, run.folder.path):
        print("".join(f"{cell:>14}" for cell in line))


if __name__ == "__main__":
    cli.run(main)
