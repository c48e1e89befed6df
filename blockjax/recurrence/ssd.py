"""The layer of Mamba-2: a state whose decay each token chooses (SSD, arXiv:2405.21060)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from blockjax.errors import UsageError
from blockjax.parameters import RMSNorm, weight
from blockjax.partials import wide
from blockjax.recurrence.convolution import ShortConvolution
from blockjax.recurrence.mixer import Mixer, Sizes, Work, linear_work, rate_parameters
from blockjax.recurrence.past import Past, linear_recurrence


@dataclasses.dataclass(frozen=True)
class SSD(Mixer):
    """S <- exp(-A dt) S + B (dt x)^T, y = S^T C + D x, in heads of `head_dim` channels.

    Attributes:
      state: rows of S, the size of B and C, which all heads share.
      expand: inner width over M; the inner width divides into heads of `model.head_dim`.
      conv: tokens that the convolution of x, B and C reaches.
    """

    kind = "ssd"

    state: int = 128
    expand: int = 2
    conv: int = 4

    @property
    def reach(self) -> int:
        return self.conv - 1

    def check(self, sizes: Sizes) -> None:
        self.least(state=1, expand=1, conv=2)
        if self.expand * sizes.width % sizes.head_dim:
            raise UsageError(
                f"model.pattern: ssd needs an inner width of whole heads, but expand={self.expand} * "
                f"model.width={sizes.width} does not divide by model.head_dim={sizes.head_dim}."
            )

    def heads(self, sizes: Sizes) -> int:
        return self.expand * sizes.width // sizes.head_dim

    def build(self, sizes: Sizes, *, rngs: nnx.Rngs) -> nnx.Module:
        return SSDLayer(self, sizes, rngs=rngs)

    def work(self, sizes: Sizes) -> Work:
        return linear_work(self.heads(sizes), self.state, sizes.head_dim, delta=False)


class SSDLayer(nnx.Module):
    """Short convolution, state, skip D, norm of the gated output."""

    def __init__(self, options: SSD, sizes: Sizes, *, rngs: nnx.Rngs):
        M, N, H, R = sizes.width, options.heads(sizes), sizes.head_dim, options.state
        self.options, self.sizes = options, sizes
        heads = dict(heads=N, head_dim=H)
        self.gate, self.x = (weight(rngs, dict(model=M) | heads, fan_in=M) for _ in range(2))
        self.b, self.c = (weight(rngs, dict(model=M, state=R), fan_in=M) for _ in range(2))
        self.dt = weight(rngs, dict(model=M, heads=N), fan_in=M)
        self.x_conv = ShortConvolution(options.conv, heads, rngs=rngs)
        self.b_conv, self.c_conv = (ShortConvolution(options.conv, dict(state=R), rngs=rngs) for _ in "bc")
        self.log_a, self.dt_bias = rate_parameters((N,), N, rngs=rngs)
        self.skip = nnx.Param(jnp.ones(N, jnp.float32), axes=("gain",))
        self.norm = RMSNorm(N * H, sizes.norm_eps)
        out = dict(heads=N, head_dim=H, model=M)
        self.o = weight(rngs, out, fan_in=N * H, scale=(2 * sizes.depth) ** -0.5)

    def empty(self, batch: int) -> tuple:
        """The states [B, N, state, H] float32, and the memories of three convolutions."""
        N, H, dtype = self.options.heads(self.sizes), self.sizes.head_dim, self.sizes.dtype
        state = jnp.zeros((batch, N, self.options.state, H), jnp.promote_types(dtype, jnp.float32))
        convolutions = (self.x_conv, self.b_conv, self.c_conv)
        return state, *(convolution.empty(batch, dtype) for convolution in convolutions)

    def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, tuple | None]:
        """x [B, T, M] -> [B, T, M], and the memory."""
        state, *before = past.memory or (None,) * 4
        project = lambda names, w: jnp.einsum(f"BTM,M{names}->BT{names}", x, w[...].astype(x.dtype))  # noqa: E731
        gate, inner = project("NH", self.gate), project("NH", self.x)
        b, c, dt = project("S", self.b), project("S", self.c), project("N", self.dt)
        inputs = zip((self.x_conv, self.b_conv, self.c_conv), (inner, b, c), before, strict=True)
        (inner, b, c), after = zip(*(conv(a, past._replace(memory=m)) for conv, a, m in inputs), strict=True)
        dt = jax.nn.softplus(wide(dt) + self.dt_bias[...])
        v = (wide(inner) * dt[..., None]).astype(x.dtype)
        options = dict(log_decay=-jnp.exp(self.log_a[...]) * dt, scale=1.0)
        y, state = linear_recurrence(c[:, :, None], b[:, :, None], v, past, state, **options)
        y = y + (self.skip[...][:, None] * inner).astype(x.dtype)
        y = self.norm((y * jax.nn.silu(gate)).reshape(*y.shape[:2], -1)).reshape(y.shape)
        y = jnp.einsum("BTNH,NHM->BTM", y, self.o[...].astype(x.dtype))
        return y, (state, *after) if past.keep else None
