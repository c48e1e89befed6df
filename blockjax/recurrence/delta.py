"""Layers of the delta rule: Gated DeltaNet (arXiv:2412.06464) and Kimi Delta Attention (arXiv:2510.26692)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from blockjax.parameters import RMSNorm, weight
from blockjax.partials import wide
from blockjax.recurrence.convolution import ShortConvolution
from blockjax.recurrence.mixer import Mixer, Sizes, Work, linear_work, rate_parameters, unit
from blockjax.recurrence.past import Past, linear_recurrence


@dataclasses.dataclass(frozen=True)
class GDN(Mixer):
    """S <- exp(g) S + beta k (v - exp(g) S^T k)^T with one decay g a head and token, chosen by the token.

    Attributes:
      expand: value channels of a head over `model.head_dim`, its key channels.
      conv: tokens that the convolution of q, k and v reaches.
      negative: beta in (0, 2) instead of (0, 1), which allows negative eigenvalues (arXiv:2411.12537).
    """

    kind = "gdn"

    expand: int = 1
    conv: int = 4
    negative: bool = False

    @property
    def reach(self) -> int:
        return self.conv - 1

    def check(self, sizes: Sizes) -> None:
        self.least(expand=1, conv=2)

    def build(self, sizes: Sizes, *, rngs: nnx.Rngs) -> nnx.Module:
        return DeltaLayer(self, sizes, rngs=rngs)

    def work(self, sizes: Sizes) -> Work:
        return linear_work(sizes.heads, sizes.head_dim, self.expand * sizes.head_dim, delta=True)


@dataclasses.dataclass(frozen=True)
class KDA(GDN):
    """As `GDN` with a decay for each key channel, its projection and that of the gate of rank H."""

    kind = "kda"


class DeltaLayer(nnx.Module):
    """Short convolutions, q and k of unit length, the delta rule, a norm of each head, a gate.

    As many states as heads. What differs is the decay, [B, T, N] or [B, T, N, H], and the gate: silu of full
    rank for `GDN`, a sigmoid of rank H for `KDA`.
    """

    def __init__(self, options: GDN, sizes: Sizes, *, rngs: nnx.Rngs):
        M, N, H = sizes.width, sizes.heads, sizes.head_dim
        self.options, self.sizes = options, sizes
        keys, values = dict(heads=N, head_dim=H), dict(heads=N, head_dim=options.expand * H)
        self.q, self.k = (weight(rngs, dict(model=M) | keys, fan_in=M) for _ in "qk")
        self.v = weight(rngs, dict(model=M) | values, fan_in=M)
        self.q_conv, self.k_conv = (ShortConvolution(options.conv, keys, rngs=rngs) for _ in "qk")
        self.v_conv = ShortConvolution(options.conv, values, rngs=rngs)
        self.beta = weight(rngs, dict(model=M, heads=N), fan_in=M)
        if options.kind == "kda":
            self.decay_in, self.gate_in = (weight(rngs, dict(model=M, rank=H), fan_in=M) for _ in "dg")
            self.decay_out = weight(rngs, dict(rank=H) | keys, fan_in=H)
            self.gate_out = weight(rngs, dict(rank=H) | values, fan_in=H)
            self.log_a, self.decay_bias = rate_parameters((N, H), N, rngs=rngs)
        else:
            self.decay = weight(rngs, dict(model=M, heads=N), fan_in=M)
            self.gate = weight(rngs, dict(model=M) | values, fan_in=M)
            self.log_a, self.decay_bias = rate_parameters((N,), N, rngs=rngs)
        self.norm = RMSNorm(options.expand * H, sizes.norm_eps)
        fan_in, out = N * options.expand * H, dict(values, model=M)
        self.o = weight(rngs, out, fan_in=fan_in, scale=(2 * sizes.depth) ** -0.5)

    def empty(self, batch: int) -> tuple:
        """The states [B, N, H, expand * H] float32, and the memories of three convolutions."""
        N, H, dtype = self.sizes.heads, self.sizes.head_dim, self.sizes.dtype
        shape = batch, N, H, self.options.expand * H
        state = jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))
        convolutions = (self.q_conv, self.k_conv, self.v_conv)
        return state, *(convolution.empty(batch, dtype) for convolution in convolutions)

    def decays_and_gate(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log-decays, float32, at most 0; and what multiplies the output, [B, T, N, expand * H]."""

        def product(names: str, a: jax.Array, w: nnx.Param) -> jax.Array:
            return jnp.einsum(names, a, w[...].astype(x.dtype))

        if self.options.kind == "gdn":
            rate = product("BTM,MN->BTN", x, self.decay)
            gate = jax.nn.silu(product("BTM,MNH->BTNH", x, self.gate))
            a = jnp.exp(self.log_a[...])
        else:
            low_rank = lambda down, up: product("BTR,RNH->BTNH", product("BTM,MR->BTR", x, down), up)  # noqa: E731
            rate = low_rank(self.decay_in, self.decay_out)
            gate = jax.nn.sigmoid(low_rank(self.gate_in, self.gate_out))
            a = jnp.exp(self.log_a[...])[:, None]
        return -a * jax.nn.softplus(wide(rate) + self.decay_bias[...]), gate

    def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, tuple | None]:
        """x [B, T, M] -> [B, T, M], and the memory."""
        state, *before = past.memory or (None,) * 4
        q, k, v = (jnp.einsum("BTM,MNH->BTNH", x, w[...].astype(x.dtype)) for w in (self.q, self.k, self.v))
        inputs = zip((self.q_conv, self.k_conv, self.v_conv), (q, k, v), before, strict=True)
        (q, k, v), after = zip(*(conv(a, past._replace(memory=m)) for conv, a, m in inputs), strict=True)
        beta = jax.nn.sigmoid(wide(jnp.einsum("BTM,MN->BTN", x, self.beta[...].astype(x.dtype))))
        log_decay, gate = self.decays_and_gate(x)
        options = dict(kind="delta", log_decay=log_decay, beta=beta * (2 if self.options.negative else 1))
        o, state = linear_recurrence(unit(q), unit(k), v, past, state, **options)
        y = jnp.einsum("BTNH,NHM->BTM", self.norm(o) * gate, self.o[...].astype(x.dtype))
        return y, (state, *after) if past.keep else None
