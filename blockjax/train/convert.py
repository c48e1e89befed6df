"""A trained pre-norm run as the start of one with depth attention."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from blockjax import data
from blockjax.errors import UsageError
from blockjax.parallel.mesh import make_mesh
from blockjax.train import config as configs
from blockjax.train.checkpoint import Checkpoints
from blockjax.train.config import ConfigDict
from blockjax.train.folder import RunFolder
from blockjax.train.lock import held
from blockjax.train.loop import open_data
from blockjax.train.run import Run, claim, describe_tokenizer, open_run, padded_vocab
from blockjax.train.state import plan_state
from blockjax.train.step import batch_sharding, context


class Conversion(NamedTuple):
    """What `convert` did.

    Attributes:
      step: of the checkpoint that it took.
      difference: the largest between logits of both models on a validation batch.
      largest: of these logits.
    """

    step: int
    difference: float
    largest: float


def convert(config: ConfigDict, source: str, run: str, *, quiet: bool = False) -> Conversion:
    """Writes a run folder whose step 0 is the newest checkpoint of another run, with depth attention added.

    What is added starts without effect. Queries of zero take the mean of all sources, and every reader's norm
    is that of their sum, epsilon included, which is the stream of the pre-norm model (arXiv:2603.15031); a
    gate of zero leaves that stream alone (arXiv:2605.18855). Logits are the same but for the rounding of
    sums in another order, under `delta` bit for bit. `train.loop.train` with the same `config` and `run` goes
    on from there, with a fresh optimizer.

    Args:
      config: of the new run: `model` as in the trained one but for `residual`, and the same tokenizer.
      source: folder of the trained run, which is left alone.
      run: a fresh folder.

    Raises:
      UsageError: there is no trained run, it is not pre-norm, the new one is, the models differ elsewhere, or
        the folder is in use.
    """
    if not source:
        raise UsageError("No trained run to start from: name its folder with --from_run=runs/NAME.")
    configs.check(config)
    mesh = make_mesh(config.mesh)
    configs.check_mesh(config, mesh)
    old = open_run(source, mesh)
    tokenizer = data.open_tokenizer(config.data.tokenizer)
    _check_models(old, config, tokenizer, source)
    folder = RunFolder(run)
    if folder.read_record() is not None:
        raise UsageError(f"Run folder {run} holds a run already; name a fresh one.")
    corpus, _, _, evaluation = open_data(config, quiet)
    model_config = configs.check(config, vocab_size=padded_vocab(tokenizer))
    with (
        held(folder),
        jax.set_mesh(mesh),
        contextlib.closing(Checkpoints(folder.checkpoints, config.run)) as checkpoints,
    ):
        plan = plan_state(model_config, config, mesh)
        state = plan.make()
        params = state.params | nnx.to_pure_dict(nnx.state(old.model, nnx.Param))
        batch = data.Loader(evaluation, batch_sharding(mesh)).batch(0)

        before, trained = nnx.split(old.model)

        def compare(params, trained):
            logits, expected = (
                nnx.merge(graph, values)(batch["tokens"], **context(batch))
                for graph, values in ((plan.graph, params), (before, trained))
            )
            return jnp.max(jnp.abs(logits - expected)), jnp.max(jnp.abs(expected))

        everywhere = NamedSharding(mesh, PartitionSpec())
        found = jax.jit(compare, out_shardings=everywhere)(params, trained)
        claim(folder, config, corpus, tokenizer)
        checkpoints.save(0, dataclasses.replace(state, params=params))
    return Conversion(old.step, *map(float, jax.device_get(found)))


def _check_models(old: Run, config: ConfigDict, tokenizer: data.Tokenizer, source: str) -> None:
    if old.config.model.residual != "prenorm":
        raise UsageError(
            f"{source} has model.residual={old.config.model.residual!r} already; only prenorm converts."
        )
    if config.model.residual == "prenorm":
        raise UsageError(
            "model.residual='prenorm' adds nothing; set the rule that the new run is to have, such as "
            "--config.model.residual=block_attn_res:size=8."
        )
    trained, new = (configs.flatten(c.model) for c in (old.config, config))
    differs = [key for key in sorted(new) if key != "residual" and trained[key] != new[key]]
    if differs:
        changes = "; ".join(f"model.{key} is {trained[key]!r} there, {new[key]!r} here" for key in differs)
        raise UsageError(f"The model of {source} is another one: {changes}. Only model.residual may change.")
    if describe_tokenizer(old.tokenizer) != describe_tokenizer(tokenizer):
        raise UsageError(
            f"{source} was trained with the tokenizer {old.tokenizer.name}, not {tokenizer.name}; "
            "set data.tokenizer to that."
        )
