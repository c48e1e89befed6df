"""A run as others meet it: its folder, its model, its tokenizer."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from blockjax import data
from blockjax.errors import UsageError
from blockjax.generate import Sampling, generate
from blockjax.models import Transformer
from blockjax.parallel.mesh import make_mesh
from blockjax.train import config as configs
from blockjax.train import hosts
from blockjax.train.checkpoint import Checkpoints, steps_in
from blockjax.train.folder import RunFolder, check_identity
from blockjax.train.state import plan_state

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model and where it came from.

    Attributes:
      folder: the run folder.
      config: the config as it ran.
      model: the decoder, its parameters placed on `mesh`.
      tokenizer: of the run.
      mesh: the devices.
      step: updates done.
    """

    folder: RunFolder
    config: configs.ConfigDict
    model: Transformer
    tokenizer: data.Tokenizer
    mesh: Mesh
    step: int


def open_run(path: str, mesh: Mesh | None = None) -> Run:
    """Loads the newest complete checkpoint of a run folder; parameters only.

    Args:
      path: run folder, on disk or `gs://`.
      mesh: where to put the parameters; defaults to one device.

    Raises:
      UsageError: no run there, no checkpoint yet, or another tokenizer behind the same name.
    """
    mesh = mesh or make_mesh({}, jax.devices()[:1])
    folder = RunFolder(path, create=False)
    record = folder.read_record()
    if record is None:
        raise UsageError(f"There is no run in {path}: run.json is missing. Train one with `make train`.")
    config = configs.complete(record["config"])
    configs.check(config)
    tokenizer = data.open_tokenizer(config.data.tokenizer)
    check_identity(record, {**record, "tokenizer": describe_tokenizer(tokenizer)}, path)
    model_config = configs.check(config, vocab_size=padded_vocab(tokenizer))
    with jax.set_mesh(mesh):
        plan = plan_state(model_config, config, mesh)
        checkpoints = Checkpoints(folder.checkpoints, config.run)
        found = checkpoints.restore_params(plan.abstract.params)
        checkpoints.close()
    if found is None:
        raise UsageError(f"Run folder {path} has no checkpoint yet.")
    params, step = found
    for skipped in checkpoints.skipped:
        log.warning("%s: checkpoint %d is passed over: %s.", path, *skipped)
    return Run(folder, config, nnx.merge(plan.graph, params), tokenizer, mesh, step)


def generate_text(
    run: Run, prompts: Sequence[str], max_new_tokens: int, *, sampling: Sampling, seed: int = 0
) -> list[str]:
    """What the run's model writes after each prompt; an empty prompt starts a document.

    Args:
      prompts: texts; each is read as the beginning of a document.
      max_new_tokens: most tokens to add to each.
      sampling: how tokens are drawn.
      seed: of the draws.
    """
    boundary = run.tokenizer.boundary
    ids = [np.array([boundary, *run.tokenizer.encode(text)]) for text in prompts]
    with jax.set_mesh(run.mesh):
        new = generate(
            run.model,
            ids,
            max_new_tokens,
            sampling=sampling,
            seed=seed,
            stop=boundary,
            vocab_size=run.tokenizer.vocab_size,
        )
    return [run.tokenizer.decode(row) for row in new]


def padded_vocab(tokenizer: data.Tokenizer) -> int:
    """Rows of the embedding: a multiple of 8, so that it divides over tensor-parallel devices."""
    return math.ceil(tokenizer.vocab_size / 8) * 8


def describe_tokenizer(tokenizer: data.Tokenizer) -> dict:
    """What `run.json` says of a tokenizer."""
    return {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "digest": tokenizer.fingerprint}


def claim(
    folder: RunFolder, config: configs.ConfigDict, corpus: data.Corpus, tokenizer: data.Tokenizer
) -> None:
    """Writes `run.json` in a fresh folder; in a used one checks that it is the same run.

    Every process calls it: the first one writes, all compare.

    Raises:
      UsageError: another identity, tokenizer or corpus; names what differs. Or checkpoints of a run that
        cannot be known.
    """
    record = {
        "config": config.to_dict(),
        "tokenizer": describe_tokenizer(tokenizer),
        "corpus": {"name": corpus.name, "digest": corpus.digest},
    }
    if jax.process_index() == 0 and folder.read_record() is None:
        if steps_in(folder.checkpoints):
            raise UsageError(
                f"Run folder {folder.path} holds checkpoints but no run.json, which says of which run they "
                "are; bring it back, or use another folder with --run=runs/NAME."
            )
        folder.write_record(record)
    hosts.barrier("run.json is written")
    written = folder.read_record()
    if written is None:
        raise UsageError(
            f"Run folder {folder.path} must lie where all processes see it, on a shared disk or gs://."
        )
    check_identity(written, record, folder.path)
