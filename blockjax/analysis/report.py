"""The report of a run: `report/report.md` and the pictures and samples it shows."""

from __future__ import annotations

import functools
import itertools
import statistics

import jax
import matplotlib.pyplot as plt
from etils import epath

from blockjax import data
from blockjax.analysis.plots import plot_learning_rate, plot_loss, series
from blockjax.generate import Sampling
from blockjax.train.metrics import read_metrics
from blockjax.train.run import Run, generate_text

SAMPLE_TOKENS = 200
PROMPT_CHARACTERS = 40
SAMPLING = Sampling(temperature=0.8, top_p=0.95)


def write(run: Run) -> epath.Path | None:
    """Writes the report into the run folder.

    Every process must call it, since all hold a part of the parameters; the
    first one writes.

    Returns:
      Path of `report.md`, or None on other processes.
    """
    asked = prompts(run)
    texts = generate_text(run, asked, SAMPLE_TOKENS, sampling=SAMPLING, seed=run.config.seed)
    if jax.process_index() > 0:
        return None
    lines = read_metrics(run.folder.local / "metrics.jsonl")
    folder = run.folder.local / "report"
    folder.mkdir(exist_ok=True)
    pictures = {"loss.png": plot_loss(lines), "learning_rate.png": plot_learning_rate(lines)}
    masks = {}
    for spec, layers in layer_groups(run):
        name = f"mask_{str(spec).replace(' ', '_')}.png"
        seq_len = run.config.data.seq_len
        pictures[name] = spec.mask(seq_len, run.model.config.attention_block).plot()
        masks[name] = f"{spec}: {layers}"
    for name, figure in pictures.items():
        figure.savefig(folder / name, dpi=130)
        plt.close(figure)
    (folder / "report.md").write_text(render(run, lines, masks, list(zip(asked, texts, strict=True))))
    run.folder.sync()
    return run.folder.path / "report" / "report.md"


def prompts(run: Run) -> list[str]:
    """Nothing, and how three validation documents begin."""
    c = run.config
    corpus = data.open_corpus(c.data.source, c.run.data_dir, text_field=c.data.text_field, quiet=True)
    documents = itertools.islice(corpus.documents("validation"), 3)
    return ["", *(text.strip().partition("\n")[0][:PROMPT_CHARACTERS] for _, text in documents)]


def layer_groups(run: Run) -> list[tuple]:
    """Distinct rows of the layer table, each with the layers that have it in words."""
    table = run.model.config.layers()
    groups = []
    for spec in dict.fromkeys(table):
        layers = [str(i) for i, other in enumerate(table) if other == spec]
        groups.append((spec, f"layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}"))
    return groups


def render(run: Run, lines: list[dict], masks: dict[str, str], samples: list[tuple[str, str]]) -> str:
    """The text of `report.md`."""
    c, m = run.config, run.model.config

    def value(key: str, form: str, pick=lambda values: values[-1]) -> str:
        values = series(lines, key)[1]
        return format(pick(values), form) if values else "-"

    usual = functools.partial(value, pick=statistics.median)
    record = run.folder.read_record()
    rows = {
        "validation": f"**{value('val/bits_per_byte', '.4f')} bits per byte**, perplexity "
        f"{value('val/perplexity', '.3f')} per token",
        "training loss": f"{value('train/loss', '.4f')} nats per token at the last step",
        "steps": f"{run.step:,} of {c.data.batch_size} x {c.data.seq_len} tokens",
        "speed": f"{usual('train/tokens_per_second', ',.0f')} tokens/s, "
        f"MFU {usual('train/mfu_useful', '.1%')} useful, "
        f"{usual('train/mfu_executed', '.1%')} executed (medians)",
        "model": f"{m.num_params():,} parameters: {m.depth} layers, width {m.width}, "
        f"{m.heads} heads of {m.head_dim}",
        "optimizer": f"{c.optimizer.name}, peak learning rate {c.optimizer.learning_rate:g}, "
        f"{c.optimizer.schedule}",
        "corpus": f"{record['corpus']['name']}, digest `{record['corpus']['digest'][:16]}`",
        "tokenizer": f"{record['tokenizer']['name']}, {record['tokenizer']['vocab_size']:,} ids",
        "devices": f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}, jax {jax.__version__}",
    }
    table = "\n".join(f"| {key} | {text} |" for key, text in rows.items())
    shown = "\n\n".join(f"![{text}]({name})\n\n{text}" for name, text in masks.items())
    texts = "\n\n".join(
        f"Prompt: {f'`` {prompt} ``' if prompt else 'start of a document'}\n\n````text\n{prompt}{text}\n````"
        for prompt, text in samples
    )
    return f"""# {run.folder.path.name}

| | |
|---|---|
{table}

## Loss

![loss](loss.png)

## Learning rate

![learning rate](learning_rate.png)

## What each layer sees

A block of queries and keys that is partial is computed and masked entry by entry, a full one is computed
without a mask, an empty one is skipped.

{shown}

## Samples

Up to {SAMPLE_TOKENS} tokens at temperature {SAMPLING.temperature}, top-p {SAMPLING.top_p}. The prompts are
how validation documents begin.

{texts}
"""
