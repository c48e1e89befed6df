# ---
# # ruff: noqa: E402
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # blockjax in ten minutes
#
# blockjax cuts a transformer into *blocks*: tiles of queries and keys (block-sparse attention) and runs of
# layers (depth attention). Here we draw masks, train a small decoder on Python's own source files, change how
# far its layers see while it writes, and look at which layers read from which.
#
# CPU, GPU and TPU all do (`Runtime > Change runtime type`). On two CPU cores training takes about two minutes
# and the rest about one. Start with `Runtime > Run all`.

# %%
# @title Set-up: installs blockjax with the JAX that fits this machine
import glob
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys

REPOSITORY = "https://github.com/blockjax/blockjax"  # @param {type: "string"}


def jax_for_this_machine():
    """On a GPU, for the CUDA of the JAX that is there already: it fits the driver."""
    if shutil.which("nvidia-smi"):
        return "jax[cuda12]" if importlib.util.find_spec("jax_cuda12_plugin") else "jax[cuda13]"
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return "jax[tpu]" if chips or {"TPU_NAME", "COLAB_TPU_ADDR"} & os.environ.keys() else "jax"


if getattr(importlib.util.find_spec("blockjax"), "origin", None) is None:
    wanted = [f"blockjax @ git+{REPOSITORY}", jax_for_this_machine()]
    print("Installing", " and ".join(wanted), "(one to two minutes)")
    done = subprocess.run([sys.executable, "-m", "pip", "install", *wanted], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    importlib.invalidate_caches()
    loaded = {name: sys.modules[name].__version__ for name in ("jax", "numpy") if name in sys.modules}
    if any(version != importlib.metadata.version(name) for name, version in loaded.items()):
        raise RuntimeError("Installed, with a newer NumPy. Choose Runtime > Restart session and run all.")

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import blockjax as bj
from blockjax import partials
from blockjax.analysis import plots, report
from blockjax.generate import Sampling, generate
from blockjax.train import loop
from blockjax.train.config import base_config, small
from blockjax.train.display import quiet
from blockjax.train.loss import cross_entropy
from blockjax.train.metrics import read_metrics
from blockjax.train.run import generate_text

# %matplotlib inline
quiet()
print(f"JAX {jax.__version__} on {jax.device_count()} x {jax.devices()[0].device_kind}")

# %% [markdown]
# ## Masks
#
# A `BlockMask` says which blocks of keys each block of queries visits. It is a value: count it, draw it,
# combine it with `&` and `|`. Lists of blocks may differ from head to head, and may be computed inside `jit`.

# %%
T, HEADS, BLOCK = 1024, 4, 64
n = T // BLOCK
causal = bj.BlockMask.causal(T, bq=BLOCK, bk=BLOCK)
drawn = np.random.default_rng(0).random((HEADS, n, n)) < 0.2
blocks = bj.BlockMask.from_block_bool(drawn | np.eye(n, dtype=bool), bq=BLOCK, bk=BLOCK) & causal
masks = {
    "causal": causal,
    "window of 256": bj.BlockMask.window(T, left=256, bq=BLOCK, bk=BLOCK),
    "chunks of 256": bj.BlockMask.chunked(T, size=256, bq=BLOCK, bk=BLOCK),
    "random blocks": blocks,
}
for name, mask in masks.items():
    print(
        f"{name:<14} visits {mask.density():5.1%} of all blocks; {mask.visible_pairs():9,.0f} visible pairs"
    )

# %% [markdown]
# Dark blocks are full and computed without a mask, orange ones are partial and masked entry by entry, light
# ones are skipped.

# %%
figure, axes = plt.subplots(2, 3, figsize=(10.5, 7.2), layout="constrained")
panels = [(name, mask, 0) for name, mask in masks.items()] + [("random blocks", blocks, h) for h in (1, 2)]
for ax, (name, mask, head) in zip(axes.flat, panels, strict=True):
    mask.plot(head=head, ax=ax)
    ax.set_title(f"{name}, head {head}" if mask is blocks else name)
    ax.get_legend().remove()

# %% [markdown]
# ## Attention over the listed blocks
#
# The same call runs on every machine and never builds an array of tokens x tokens. Here it is compared with
# the reference, dense attention in float32. `lse` is the log of each row's sum of exponentials.

# %%
q = jax.random.normal(jax.random.key(0), (1, T, HEADS, 64))
k, v = jax.random.normal(jax.random.key(1), (2, 1, T, 2, 64))  # two query heads share each key head

o, lse = bj.block_sparse_attention(q, k, v, blocks, return_lse=True)
expected = bj.block_sparse_attention(q, k, v, blocks, return_lse=True, implementation="reference")
print(f"o {o.shape}, lse {lse.shape}")
print(f"largest difference: {abs(o - expected[0]).max():.1e} in o, {abs(lse - expected[1]).max():.1e} in lse")

# %% [markdown]
# With `lse`, attention over some of the keys can be completed later: `merge` adds two such parts exactly.
# Blocks of keys in a kernel and blocks of layers in depth attention are added this way.


# %%
def attend(first, count):
    """Attention over `count` blocks of keys from block `first` on, as a partial."""
    keys = slice(first * BLOCK, (first + count) * BLOCK)
    part = blocks.columns(first, count)
    o, lse = bj.block_sparse_attention(q, k[:, keys], v[:, keys], part, return_lse=True)
    return o.swapaxes(1, 2), lse


merged, _ = partials.merge(attend(0, n // 2), attend(n // 2, n // 2))
print(f"two halves of the keys against all at once: {abs(merged.swapaxes(1, 2) - o).max():.1e}")

# %% [markdown]
# ## Training
#
# A decoder of four layers and 0.9M parameters that reads bytes, on the Python standard library.
#
# - `locality="beta:2,smallest=16"`: how far each layer sees. Locality 0 is everything, locality 1 the last
#   16 tokens; layer $l$ of $L$ has $(l/(L-1))^2$, so the first layer sees all and the last one very little.
# - `locality_warmup`: during the first half of training localities rise from 0 to these values.
# - `residual="block_attn_res:blocks=4"`: each sublayer reads a learned softmax mean of what earlier blocks
#   of layers wrote ([Attention Residuals](https://arxiv.org/abs/2603.15031)), not just their sum.

# %%
STEPS = 240  # @param {type: "integer"}
RUN = "runs/notebook"  # @param {type: "string"}
STEPS = int(os.environ.get("BLOCKJAX_STEPS", STEPS))  # the tests take fewer

config = small(base_config("nano"))  # as configs/quickstart.py does
config.model.update(locality="beta:2,smallest=16", residual="block_attn_res:blocks=4")
config.data.batch_size = 4 * jax.device_count()
config.optimizer.update(warmup_steps=STEPS // 12, locality_warmup=STEPS // 2)
config.run.update(steps=STEPS, log_every=20, eval_every=max(1, STEPS // 4), eval_sequences=32, inspect=False)
run = loop.train(config, RUN)

# %%
model, tokenizer = run.model, run.tokenizer
for layer, spec in enumerate(model.config.layers()):
    print(f"layer {layer}: {spec}")
figure = plots.plot_loss(read_metrics(run.folder.local / "metrics.jsonl"))

# %% [markdown]
# After two minutes it knows what Python looks like, if not yet how to spell.

# %%
PROMPT = "class Parser:\n    def "
sampling = Sampling(temperature=0.7, top_p=0.9)
(text,) = generate_text(run, [PROMPT], 200, sampling=sampling)
print(PROMPT + text)

# %% [markdown]
# ## A dial for locality
#
# Windows are data, not code: `hidden` takes the locality of each layer as an argument, so one compiled
# function serves every setting. Dial 0 is attention over everything, dial 1 the schedule of the config.

# %%
*_, validation = loop.open_data(config, quiet=True)
batches = [validation.batch(i) for i in range(len(validation))]
table = model.config.local_rule.table(model.config.depth)  # locality of each layer


@nnx.jit
def bits_per_byte(model, batch, locality):
    print("compiling")  # Python runs while JAX traces, and then no more
    context = {key: batch[key] for key in ("positions", "segment_ids")}
    hidden = model.hidden(batch["tokens"], **context, locality=locality)
    nats, _ = cross_entropy(hidden, model.head_weight(), batch["targets"])
    return nats / jnp.log(2) / batch["target_bytes"].sum()


dials, bits = [0.0, 0.25, 0.5, 0.75, 1.0], []
for dial in dials:
    locality = dial * table
    bits.append(np.mean([bits_per_byte(model, batch, locality) for batch in batches]))
    layers = "; ".join(str(spec) for spec in model.config.layers(locality))
    print(f"dial {dial:4}: {bits[-1]:.3f} bits per byte ({layers})")

# %%
figure, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
ax.plot(dials, bits, "o-")
ax.set(xlabel="dial: 0 sees everything, 1 is the schedule", ylabel="bits per byte, validation", xticks=dials)
ax.grid(alpha=0.3)

# %% [markdown]
# Because of the warm-up the model has met the whole range of the dial, most of it early on. Without it
# (`locality_warmup=0` above, and another `RUN`) dial 0 is a whole bit per byte worse than dial 1.
#
# Generation takes the same argument: same weights, same prompt, same random numbers.

# %%
ids = np.array([tokenizer.boundary, *tokenizer.encode(PROMPT)])
options = dict(sampling=sampling, stop=tokenizer.boundary, vocab_size=tokenizer.vocab_size)
for dial in (0.0, 1.0):
    (new,) = generate(model, [ids], 200, locality=dial * table, **options)
    print(f"--- dial {dial:g}\n{PROMPT}{tokenizer.decode(new)}\n")

# %% [markdown]
# ## Looking inside
#
# `report.look` runs the model on a validation batch and measures what attention and depth attention do.
# First, how local attention is: which share of it falls on the last 16 tokens, of those that a layer sees.
# Entropy says over how many keys it spreads.

# %%
found, tokens = report.look(run)
windows = [None if spec.full else spec.window for spec in model.config.layers()]
figure = plots.plot_locality(found.attention._asdict(), windows if any(windows) else None)

# %% [markdown]
# Next, depth attention: what each sublayer (row) reads of the embedding and of earlier blocks (columns). A
# plain residual stream gives every source the same weight.

# %%
residual = model.config.residual_rule
sources = ["embedding", *(f"block {b}" for b in range(residual.blocks))]
sublayers = [f"{kind} {layer}" for layer in range(model.config.depth) for kind in ("attention", "MLP")]
figure = plots.plot_depth_weights(found.depth_weights[:, 0], sources, [*sublayers, "head"])

# %% [markdown]
# The weights differ from token to token. Here is what the output head reads along a few lines of code;
# `model.inspect(tokens)` gives the same for every reader.

# %%
text = [tokenizer.decode([int(i)]) for i in tokens[:64]]
figure = plots.plot_token_weights(found.token_weights[: len(text)], text, sources)

# %% [markdown]
# ## Where to go from here
#
# The run folder holds metrics, TensorBoard files and checkpoints; a training cell that was interrupted goes
# on from the last one. Another model needs another `RUN`. Try `mode=segment` or `mode=bias` in `locality`,
# `residual="attn_res"`, or your own text with `config.data.source = "text/*.txt"`. The repository has larger
# configs, sweeps over both questions, and training on meshes of many devices.
