"""FLOP accounting, and what a device could do at most."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np

from blockjax.models import LayerSpec, TransformerConfig
from blockjax.parallel.mesh import make_mesh

# Dense bfloat16 peak of one device, FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v2": 23e12,  # two devices a chip, as v3 and TPU7x
    "TPU v3": 61.5e12,
    "TPU v4 lite": 138e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
}


class FlopCounter:
    """FLOPs of a training step, useful and executed.

    Matmuls with weights take 6 FLOPs per parameter and token, each time that they are applied, attention
    3.5 * 4 * N * H per pair of a query and a key (forward, and a backward that
    recomputes the scores), recurrence 3 times its forward pass. *Useful* counts
    pairs that are visible, within documents and windows, and states that are
    written and read token by token; *executed* counts all pairs of listed tiles,
    and the products of chunks.
    """

    def __init__(self, config: TransformerConfig, seq_len: int):
        self._config, self._seq_len = config, seq_len
        self._per_token = 6.0 * config.num_params(embedding=False, applied=True)
        self._per_pair = 3.5 * 4 * config.heads * config.head_dim
        works = [spec.mixer.work(config) for spec in config.layers() if spec.mixer is not None]
        self._recurrence = 3 * sum(work.useful for work in works)
        self._chunks = 3 * sum(work.executed for work in works)
        self._layers: tuple[LayerSpec, ...] = ()
        self._pairs = 0

    def useful(self, tokens: int, visible_pairs: float) -> float:
        """FLOPs that the model asks for, given the visible pairs of all layers."""
        return (self._per_token + self._recurrence) * tokens + self._per_pair * visible_pairs

    def executed(self, tokens: int, locality: np.ndarray | None = None) -> float:
        """FLOPs of the tiles that are computed; `locality` [L] if it is not the config's."""
        pairs = self._executed_pairs(self._config.layers(locality))
        return (self._per_token + self._chunks + self._per_pair * pairs / self._seq_len) * tokens

    def _executed_pairs(self, layers: tuple[LayerSpec, ...]) -> int:
        if layers != self._layers:
            attending = [spec for spec in layers if spec.attends]
            masks = {spec: spec.mask(self._seq_len, self._config.attention_block) for spec in set(attending)}
            self._layers, self._pairs = layers, sum(int(masks[spec].executed_pairs()) for spec in attending)
        return self._pairs


def peak_flops() -> tuple[float, str]:
    """FLOP/s of all devices together, and where the figure comes from.

    Known accelerators: the data sheet. Others, such as a CPU: the rate of a
    float32 matrix product measured now (about 0.2 s).
    """
    kind = jax.devices()[0].device_kind
    for name, flops in PEAK_FLOPS.items():
        if kind.startswith(name):
            return flops * jax.device_count(), f"data sheet of {name}"
    n = 1024
    with jax.set_mesh(make_mesh({}, jax.local_devices()[:1])):  # on a larger mesh every device would do it
        x = jnp.ones((n, n), jnp.float32)
        product = jax.jit(lambda a: a @ a)
        product(x).block_until_ready()
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < 0.2:
            product(x).block_until_ready()
            count += 1
        rate = count * 2 * n**3 / (time.perf_counter() - start)
    # Devices that share a host's cores share its rate.
    return rate * jax.process_count(), f"a measured {n}x{n} float32 matrix product"
