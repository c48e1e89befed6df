"""The report of a run: `report/report.md` and the pictures and samples it shows."""

from __future__ import annotations

import functools
import itertools
import re
import statistics
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.figure import Figure

from blockjax import data
from blockjax.analysis.plots import (
    plot_depth_weights,
    plot_learning_rate,
    plot_locality,
    plot_loss,
    plot_token_weights,
    save,
    series,
)
from blockjax.generate import Sampling
from blockjax.parallel.mesh import partition_spec
from blockjax.train.inspect import QUERIES, Findings, make_inspect_step
from blockjax.train.loop import open_data
from blockjax.train.metrics import read_metrics
from blockjax.train.run import Run, generate_text

SAMPLE_TOKENS = 200
PROMPT_CHARACTERS = 40
SAMPLING = Sampling(temperature=0.8, top_p=0.95)
MOST_MASKS = 4
SHOWN_TOKENS = 96

MASKS = "What each layer sees"
NOTES = {
    MASKS: "A block of queries and keys that is partial is computed and masked entry by entry, a full one is "
    "computed without a mask, an empty one is skipped."
}


class Picture(NamedTuple):
    """A figure and the words below it."""

    figure: Figure
    caption: str = ""


Sections = dict[str, dict[str, Picture]]  # title -> file name -> picture


def write(run: Run) -> epath.Path | None:
    """Writes the report into the run folder.

    Every process must call it, since all hold a part of the parameters; the
    first one writes.

    Returns:
      Path of `report.md`, or None on other processes.
    """
    asked = prompts(run)
    texts = generate_text(run, asked, SAMPLE_TOKENS, sampling=SAMPLING, seed=run.config.seed)
    found, first = look(run) if run.config.run.inspect else (None, None)
    if jax.process_index() > 0:
        return None
    lines = read_metrics(run.folder.local / "metrics.jsonl")
    folder = run.folder.local / "report"
    folder.mkdir(exist_ok=True)
    sections = {
        "Loss": {"loss.png": Picture(plot_loss(lines))},
        "Learning rate": {"learning_rate.png": Picture(plot_learning_rate(lines))},
        MASKS: mask_pictures(run),
    }
    if found is not None:
        sections |= inside_pictures(run, found, first)
    for name, picture in itertools.chain(*(pictures.items() for pictures in sections.values())):
        save(picture.figure, folder / name)
    (folder / "report.md").write_text(render(run, lines, sections, list(zip(asked, texts, strict=True))))
    run.folder.sync()
    return run.folder.path / "report" / "report.md"


def look(run: Run) -> tuple[Findings, np.ndarray]:
    """What attention and depth attention do on the first validation batch, and its first tokens [T]."""
    everywhere = NamedSharding(run.mesh, PartitionSpec())
    with jax.set_mesh(run.mesh):
        *_, evaluation = open_data(run.config, quiet=True)
        batch = data.Loader(evaluation, NamedSharding(run.mesh, partition_spec(("batch", "time")))).batch(0)
        graph, params = nnx.split(run.model)
        inspect = jax.jit(make_inspect_step(graph), out_shardings=everywhere)
        found = inspect(params, run.step, batch)
        first = jax.jit(lambda tokens: tokens[0], out_shardings=everywhere)(batch["tokens"])
    return jax.device_get(found), np.asarray(first)


def mask_pictures(run: Run) -> dict[str, Picture]:
    """The mask of each kind of layer that has one; of `MOST_MASKS` from the first to the last if more."""
    groups = [(spec, layers) for spec, layers in layer_groups(run) if spec.attends]
    if len(groups) > MOST_MASKS:
        groups = [groups[round(i)] for i in np.linspace(0, len(groups) - 1, MOST_MASKS)]
    pictures = {}
    for spec, layers in groups:
        name = f"mask_{re.sub(r'[^a-z0-9.]+', '_', str(spec))}.png"
        mask = spec.mask(run.config.data.seq_len, run.model.config.attention_block)
        pictures[name] = Picture(mask.plot(), f"{spec}: {layers}")
    return pictures


def inside_pictures(run: Run, found: Findings, tokens: np.ndarray) -> Sections:
    """Locality of every layer, and depth weights if the model has them."""
    m = run.model.config
    sections = {}
    if found.attention is not None:
        specs = [spec for spec in m.layers() if spec.mixer is None]
        windows = [None if spec.full else spec.window for spec in specs]
        locality = Picture(
            plot_locality(found.attention._asdict(), windows if any(windows) else None),
            f"Each layer of attention on a validation batch, {QUERIES} sampled queries a sequence. "
            f"Local keys: {m.nearest}.",
        )
        sections["Locality"] = {"locality.png": locality}
    if found.depth_weights is None:
        return sections
    residual, (readers, heads, sources) = m.residual_rule, found.depth_weights.shape
    kinds = ["attention" if spec.mixer is None else spec.mixer.kind for spec in m.layers()]
    sublayers = [f"{kind} {layer}" for layer, mixer in enumerate(kinds) for kind in (mixer, "MLP")]
    blocks = sublayers if residual.size == 1 else [f"block {b}" for b in range(residual.blocks)]
    columns, rows = ["embedding", *blocks][:sources], [*sublayers, "output head"][:readers]
    each = rows if heads == 1 else [f"{row}, head {head}" for row in rows for head in range(heads)]
    text = [run.tokenizer.decode([int(i)]) for i in tokens[:SHOWN_TOKENS]]
    pictures = {
        "depth_weights.png": Picture(
            plot_depth_weights(found.depth_weights.reshape(-1, sources), columns, each),
            f"What each sublayer reads of earlier outputs under `{m.residual}`, mean over a validation "
            f"batch{'; a row for each head' if heads > 1 else ''}. Blank: not there yet.",
        ),
        "token_weights.png": Picture(
            plot_token_weights(found.token_weights[: len(text)], text, columns),
            f"What the last reader, {rows[-1]}, reads at each token of a validation sequence.",
        ),
    }
    return sections | {"Depth attention": pictures}


def prompts(run: Run) -> list[str]:
    """Nothing, and how three validation documents begin."""
    c = run.config
    corpus = data.open_corpus(c.data.source, c.run.data_dir, text_field=c.data.text_field, quiet=True)
    documents = itertools.islice(corpus.documents("validation"), 3)
    return ["", *(text.strip().partition("\n")[0][:PROMPT_CHARACTERS] for _, text in documents)]


def layer_groups(run: Run) -> list[tuple]:
    """Distinct kinds of layers, each with the layers of it in words."""
    table = run.model.config.layers()
    groups = []
    for spec in {str(spec): spec for spec in table}.values():
        layers = [str(i) for i, other in enumerate(table) if str(other) == str(spec)]
        groups.append((spec, f"layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}"))
    return groups


def render(run: Run, lines: list[dict], sections: Sections, samples: list[tuple[str, str]]) -> str:
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
        f"{m.heads} heads of {m.head_dim}"
        + "".join(f", {text}" for text in (m.locality, m.residual) if text),
        "layers": "; ".join(f"{spec}: {layers}" for spec, layers in layer_groups(run)),
        "optimizer": f"{c.optimizer.name}, peak learning rate {c.optimizer.learning_rate:g}, "
        f"{c.optimizer.schedule}",
        "corpus": f"{record['corpus']['name']}, digest `{record['corpus']['digest'][:16]}`",
        "tokenizer": f"{record['tokenizer']['name']}, {record['tokenizer']['vocab_size']:,} ids",
        "devices": f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}, jax {jax.__version__}",
    }
    table = "\n".join(f"| {key} | {text} |" for key, text in rows.items())
    parts = []
    for title, section in sections.items():
        parts += [f"## {title}", NOTES.get(title, "")]
        for name, picture in section.items():
            parts += [f"![{picture.caption or title}]({name})", picture.caption]
    pictures = "\n\n".join(filter(None, parts))
    texts = "\n\n".join(
        f"Prompt: {f'`` {prompt} ``' if prompt else 'start of a document'}\n\n````text\n{prompt}{text}\n````"
        for prompt, text in samples
    )
    return f"""# {run.folder.path.name}

| | |
|---|---|
{table}

{pictures}

## Samples

Up to {SAMPLE_TOKENS} tokens at temperature {SAMPLING.temperature}, top-p {SAMPLING.top_p}. The prompts are
how validation documents begin.

{texts}
"""
