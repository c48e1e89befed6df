"""Lightning Attention: linear attention with a fixed decay for each head.

Source: Lightning Attention-2 (arXiv:2401.04658); the layer is TransNormerLLM's (arXiv:2307.14995).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blockjax.errors import UsageError
from blockjax.parameters import RMSNorm, weight
from blockjax.recurrence.mixer import Mixer, Sizes, Work, linear_work
from blockjax.recurrence.past import Past, linear_recurrence


def _linear(heads: int) -> np.ndarray:
    return 8 / heads * np.arange(heads)


def _alibi(heads: int) -> np.ndarray:
    """ALiBi's slopes (arXiv:2108.12409, sec. 3) continued to any number of heads, as its code does."""
    power = 2 ** int(np.log2(heads))
    slopes = 2.0 ** (-8 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4 / power * np.arange(1, 2 * (heads - power) + 1, 2))
    return np.concatenate([slopes, between])


# Slopes of the heads, and of layer l of L what multiplies them. The published ones disagree.
DECAYS = {
    "tnl": (_alibi, lambda l, L: 1 - l / max(L - 1, 1) + 1e-5),
    "minimax": (_alibi, lambda l, L: 1 - l / (L - 1 + 1e-5) + 1e-5),
    "fla": (_linear, lambda l, L: 1 - l / L),
    "alibi": (_alibi, lambda l, L: 1.0),
}


@dataclasses.dataclass(frozen=True)
class Lightning(Mixer):
    """S <- exp(-s_h) S + k v^T with the slope s_h of a head, o = scale q S.

    Attributes:
      decay: which slopes, a key of `DECAYS`. `tnl`: 2^(-8 (h + 1) / N) (1 - l / (L - 1) + 1e-5) of head h in
        layer l of L; `minimax`: divided by L - 1 + 1e-5; `fla`: (8 / N) h (1 - l / L), so that head 0 keeps
        all; `alibi`: the first without the factor of the layer.
      scale: of queries. The source has 1, fla H^-0.5.
    """

    kind = "lightning"

    decay: str = "tnl"
    scale: float = 1.0

    @property
    def by_depth(self) -> bool:
        return self.decay != "alibi"

    def check(self, sizes: Sizes) -> None:
        if self.decay not in DECAYS:
            known = " or ".join(map(repr, DECAYS))
            raise UsageError(f"model.pattern: decay={self.decay!r} of lightning must be {known}.")
        if not 0 < self.scale < float("inf"):
            raise UsageError(f"model.pattern: scale={self.scale} of lightning must be above 0.")

    def log_decay(self, sizes: Sizes, layer: int | jax.Array | None) -> jax.Array:
        """[N] float32 of a layer."""
        slopes, factor = DECAYS[self.decay]
        return -jnp.asarray(slopes(sizes.heads), jnp.float32) * jnp.asarray(
            factor(layer, sizes.depth), jnp.float32
        )

    def build(self, sizes: Sizes, *, rngs: nnx.Rngs) -> nnx.Module:
        return LightningLayer(self, sizes, rngs=rngs)

    def work(self, sizes: Sizes) -> Work:
        return linear_work(sizes.heads, sizes.head_dim, sizes.head_dim, delta=False)


class LightningLayer(nnx.Module):
    """silu on q, k, v; a norm over all heads; a sigmoid gate of rank H.

    As many states as heads, whatever the number of key/value heads.
    """

    def __init__(self, options: Lightning, sizes: Sizes, *, rngs: nnx.Rngs):
        M, N, H = sizes.width, sizes.heads, sizes.head_dim
        heads = dict(model=M, heads=N, head_dim=H)
        self.options, self.sizes = options, sizes
        self.q, self.k, self.v = (weight(rngs, heads, fan_in=M) for _ in range(3))
        self.gate_in = weight(rngs, dict(model=M, rank=H), fan_in=M)
        self.gate_out = weight(rngs, dict(rank=H, heads=N, head_dim=H), fan_in=H)
        self.norm = RMSNorm(N * H, sizes.norm_eps)
        out = dict(heads=N, head_dim=H, model=M)
        self.o = weight(rngs, out, fan_in=N * H, scale=(2 * sizes.depth) ** -0.5)

    def empty(self, batch: int) -> jax.Array:
        """[B, N, H, H] float32."""
        N, H = self.sizes.heads, self.sizes.head_dim
        return jnp.zeros((batch, N, H, H), jnp.promote_types(self.sizes.dtype, jnp.float32))

    def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, jax.Array | None]:
        """x [B, T, M] -> [B, T, M], and the state."""
        q, k, v = (
            jax.nn.silu(jnp.einsum("BTM,MNH->BTNH", x, w[...].astype(x.dtype)))
            for w in (self.q, self.k, self.v)
        )
        log_decay = self.options.log_decay(self.sizes, past.layer)
        options = dict(log_decay=log_decay, scale=self.options.scale)
        o, state = linear_recurrence(q, k, v, past, past.memory, **options)
        o = self.norm(o.reshape(*o.shape[:2], -1)).reshape(o.shape)
        gate = jnp.einsum("BTM,MR->BTR", x, self.gate_in[...].astype(x.dtype))
        gate = jnp.einsum("BTR,RNH->BTNH", gate, self.gate_out[...].astype(x.dtype))
        return jnp.einsum("BTNH,NHM->BTM", o * jax.nn.sigmoid(gate), self.o[...].astype(x.dtype)), state
