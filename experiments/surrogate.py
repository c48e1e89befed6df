"""Puts a tied block in the place of each phase of a trained decoder's layers.

Command: python experiments/surrogate.py --run=runs/teacher --phases=3
         python experiments/surrogate.py --run=runs/teacher --teach=300   (first trains a small one there)

Writes RUN/surrogate/: how alike layers are, with the phases (PNG), and a table of errors and bits per byte.
Source: block-recurrent hypothesis (Raptor): phases by dynamic programming; each block alone, first on the
teacher's activations and then on its own, at last the whole on its own.
"""

import contextlib
import pathlib

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from blockjax import cli, data
from blockjax.analysis.plots import plot_phases, save
from blockjax.recurrence.phases import forcing
from blockjax.train import loop, surrogate
from blockjax.train.config import base_config, small
from blockjax.train.run import open_run
from blockjax.train.state import TrainState
from blockjax.train.step import batch_sharding, make_eval_step

RUN = flags.DEFINE_string("run", "runs/teacher", "run folder of the teacher, on disk")
TEACH = flags.DEFINE_integer("teach", 0, "first train a small teacher there for so many steps", lower_bound=0)
DEPTH = flags.DEFINE_integer("depth", 8, "layers of that teacher", lower_bound=2)
PHASES = flags.DEFINE_integer("phases", 3, "tied blocks", lower_bound=1)
ALONE = flags.DEFINE_integer("alone", 200, "steps of each block alone", lower_bound=2)
WHOLE = flags.DEFINE_integer("whole", 200, "steps of the whole", lower_bound=2)
RATE = flags.DEFINE_float("learning_rate", 1e-3, "of AdamW at its peak", lower_bound=0.0)
BATCHES = flags.DEFINE_integer("batches", 2, "validation batches for similarities", lower_bound=1)


def main() -> None:
    if TEACH.value:
        loop.train(teacher_config(), RUN.value)
    run = open_run(RUN.value)
    folder = pathlib.Path(RUN.value) / "surrogate"
    folder.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(run.mesh))
        _, _, order, evaluation = loop.open_data(run.config, quiet=True)
        place = batch_sharding(run.mesh)
        fixed = data.Loader(evaluation, place, stop=len(evaluation))
        some = [fixed.batch(k) for k in range(min(BATCHES.value, len(evaluation)))]
        found = surrogate.find_phases(run.model, some, PHASES.value)
        save(plot_phases(1 - found.weights, found.starts), folder / "similarity.png")
        model = surrogate.start(run.model, found.starts)
        print(f"Phases start at layers {found.starts}: model.loop={model.config.loop!r}.")
        rows = [("teacher", run.model), ("copies", model)]
        begin = 0
        for name, (loss, steps) in stages().items():
            batches, say = data.Loader(order, place, begin, begin + steps), reporter(name, steps)
            model = surrogate.train(loss, model, run.model, batches, optimizer(steps), steps, say=say)
            rows.append((name, model))
            begin += steps
        text = table(rows, run, fixed, some[0])
    (folder / "table.md").write_text(text)
    print(f"{text}\nWritten to {folder}.")


def teacher_config():
    """Layers of width 64 that see everything, on bytes of the Python standard library."""
    config = small(base_config("nano"))
    config.model.update(depth=DEPTH.value, width=64, heads=4, kv_heads=4, head_dim=16, ffn=192)
    config.data.update(seq_len=128, batch_size=8)
    config.run.update(steps=TEACH.value, report=False, inspect=False)
    return config


def stages():
    """Losses and steps."""

    def alone(student, teacher, batch, step):
        return surrogate.blocks_alone(student, teacher, batch, forcing(step, ALONE.value))

    def whole(student, teacher, batch, step):
        return surrogate.whole(student, teacher, batch)

    return {"alone": (alone, ALONE.value), "whole": (whole, WHOLE.value)}


def optimizer(steps: int):
    config = base_config().optimizer
    config.update(name="adamw", learning_rate=RATE.value, final_scale=1e-2, weight_decay=1e-4, clip_norm=1.0)
    config.update(warmup_steps=min(20, steps // 2), query_rate=1.0)
    return config


def reporter(name: str, steps: int):
    def say(step: int, loss: float) -> None:
        if step == 1 or step % 20 == 0 or step == steps:
            print(f"{name}: step {step} of {steps}, loss {loss:.4g}", flush=True)

    return say


def table(rows, run, fixed, batch) -> str:
    """Bits per byte, parameters of layers, and the relative error after each layer."""
    L = run.model.config.depth
    head = ["", "bits per byte", "parameters", *(f"error {i}" for i in range(L))]
    lines = [head, ["---"] * len(head)]
    for name, model in rows:
        graph, params = nnx.split(model)
        state = TrainState(jnp.zeros((), jnp.int32), params, None, None)
        bits = loop.evaluate(jax.jit(make_eval_step(graph, longest=1)), state, fixed)["val/bits_per_byte"]
        errors = surrogate.layer_errors(model, run.model, batch)
        lines.append([name, f"{bits:.4f}", f"{model.config.num_params():,}", *(f"{e:.3f}" for e in errors)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    cli.run(main)
