"""Continues prompts with a trained run.

Command: python experiments/generate.py --run=runs/quickstart --prompt="def "
"""

import dataclasses

from absl import flags

from blockjax import cli
from blockjax.generate import Sampling
from blockjax.train.run import generate_text, open_run

RUN = flags.DEFINE_string("run", "runs/quickstart", "run folder, on disk or gs://")
PROMPT = flags.DEFINE_multi_string("prompt", [""], "text to continue; repeat for a batch")
TOKENS = flags.DEFINE_integer("tokens", 256, "most tokens to add to each prompt", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "divides the logits; 0 takes the most likely token")
TOP_K = flags.DEFINE_integer("top_k", 0, "draw from the k most likely tokens; 0: all")
TOP_P = flags.DEFINE_float("top_p", 1.0, "draw from the most likely tokens that reach this probability")
REPEATS = flags.DEFINE_integer(
    "repeats", 0, "how often each part of model.loop with a * is applied; 0: as in training", lower_bound=0
)
SEED = flags.DEFINE_integer("seed", 0, "of the draws")


def main() -> None:
    sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
    run = open_run(RUN.value)
    if REPEATS.value:
        run = dataclasses.replace(run, model=run.model.with_repeats(REPEATS.value))
    texts = generate_text(run, PROMPT.value, TOKENS.value, sampling=sampling, seed=SEED.value)
    for prompt, text in zip(PROMPT.value, texts, strict=True):
        print(f"--- {prompt!r}\n{prompt}{text}")


if __name__ == "__main__":
    cli.run(main)
