"""What the memory of recurrent layers gives a trained run: an evaluation with it, and one without."""

from __future__ import annotations

import json

import jax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from blockjax import data
from blockjax.errors import UsageError
from blockjax.train.folder import check_identity, replace_text
from blockjax.train.loop import evaluate, open_data
from blockjax.train.run import Run
from blockjax.train.state import TrainState
from blockjax.train.step import batch_sharding, make_dial, make_eval_step

MEMORIES = ("carried", "reset")
"""Along a document, from row to row of `data.seq_len` tokens; or none where a row begins."""


def evaluate_memory(run: Run, sequences: int, *, quiet: bool = False) -> dict:
    """Evaluates a run twice on the same streams of validation documents; attention sees its row in both.

    Args:
      run: of `open_run`.
      sequences: rows of `data.seq_len` tokens to read at most, as `run.eval_sequences`.

    Returns:
      `step`, `sequences`, and under each of `MEMORIES` what `train.loop.evaluate` returns; written to
      `evaluation.json` of the run folder, too.

    Raises:
      UsageError: the run has no recurrent layers or does not read streams, or its corpus has changed.
    """
    config, model = run.config.copy_and_resolve_references(), run.model
    if not model.config.recurrent or config.data.order != "stream":
        raise UsageError(
            "Only recurrent layers that read data.order='stream' have a memory to carry, and the run in "
            f"{run.folder.path} has model.pattern={config.model.pattern!r}, data.order={config.data.order!r}."
        )
    if sequences < 1:
        raise UsageError(f"--sequences={sequences} must be at least 1.")
    config.run.eval_sequences = sequences
    with jax.set_mesh(run.mesh):
        corpus, _, _, evaluation = open_data(config, quiet)
        record = run.folder.read_record()
        read = {"name": corpus.name, "digest": corpus.digest}
        check_identity(record, {**record, "corpus": read}, run.folder.path)
        graph, params = nnx.split(model)
        dial = make_dial(model.config, config.optimizer.locality_warmup)
        run_eval = jax.jit(
            make_eval_step(graph, evaluation.longest, dial), out_shardings=NamedSharding(run.mesh, P())
        )
        found = {"step": run.step, "sequences": len(evaluation) * config.data.batch_size}
        for name in MEMORIES:
            memory = model.memory(config.data.batch_size) if name == "carried" else None
            state = TrainState(run.step, params, None, None, memory)
            batches = data.Loader(evaluation, batch_sharding(run.mesh), stop=len(evaluation))
            found[name] = evaluate(run_eval, state, batches)
    replace_text(run.folder.path / "evaluation.json", json.dumps(found, indent=2))
    return found
