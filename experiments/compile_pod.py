"""Compiles the training step of a config for a TPU pod, on a machine without one.

Command: python experiments/compile_pod.py --config=configs/lm.py:7b --topology=v5p:8x8x8 \\
           --mesh=data:8,fsdp:64

Prints memory, collectives, FLOPs and a roofline. Any key of the config can be set:
--config.data.seq_len=8192. Needs libtpu on x86 Linux; compiling takes minutes. See docs/pods.md.
"""

import sys

from absl import flags
from ml_collections import config_flags

from blockjax import cli
from blockjax.pods.run import compile_pod

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "file in configs/, with an optional argument after ':'"
)
TOPOLOGY = flags.DEFINE_string("topology", None, "chip and shape of the pod, such as v5p:8x8x8 or v6e:16x16")
MESH = flags.DEFINE_string("mesh", None, "devices along axes, such as data:8,fsdp:64; default: config.mesh")
SEARCH = flags.DEFINE_bool("search", False, "look for the best mesh, by sizes first, then by compiling a few")
BEST_OF = flags.DEFINE_integer("best_of", 3, "meshes that --search compiles", lower_bound=1)
VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", None, "rows of the embedding, in place of those for the tokenizer", lower_bound=1
)
OUT = flags.DEFINE_string("out", None, "folder for the compiled program")


def main() -> None:
    code = compile_pod(
        CONFIG.value,
        TOPOLOGY.value,
        MESH.value,
        best_of=BEST_OF.value if SEARCH.value else 0,
        vocab_size=VOCAB_SIZE.value,
        out=OUT.value,
    )
    sys.exit(code)


if __name__ == "__main__":
    cli.run(main)
