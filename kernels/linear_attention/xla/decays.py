"""What decays do within chunks: how much of each token another one sees, of the entry state, of the exit.

With G the running sum of log-decays in a chunk of C tokens, token i sees token j <= i as `e^(G_i - G_j)`, the
state that enters as `e^G_i`, and leaves `e^(G_C - G_j)` of its own write. A document start in between makes
it 0. All exponents are sums of log-decays, so at most 0, and `e^-G` is never formed; what is not visible is
masked before exp. Axes before the last two are batch.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from blockjax.kernels.linear_attention.spec import running_sums

ROWS = 16
"""Of a sub-block whose decays per channel are computed pair by pair, as in KDA (arXiv:2510.26692)."""


@dataclass(frozen=True)
class Decays:
    """Those of chunks; subclasses add how pairs of tokens are weighted.

    Attributes:
      enter, leave: [..., C, 1 | Hk], of a state that enters, and what leaves of a token's write.
      across: [..., 1 | Hk, 1], what leaves of the state that enters.
      visible: [..., C, C] bool: j <= i, and of the same document.
      sums: two parts of the running sum G [..., C, 1 | Hk], see `running_sums`.
    """

    enter: jax.Array
    leave: jax.Array
    across: jax.Array
    visible: jax.Array
    sums: tuple[jax.Array, jax.Array]

    @staticmethod
    def of(log_decay: jax.Array, documents: jax.Array | None, before: jax.Array | None) -> "Decays":
        """For log-decays [..., C, 1 | Hk], documents [..., C] and the one before each chunk [..., 1]."""
        C = log_decay.shape[-2]
        visible = jnp.tri(C, dtype=bool)
        prefix = jnp.cumsum(log_decay, axis=-2)
        # Suffixes are sums of their own: a difference of prefixes would lose what large decays hide.
        after = jnp.pad(log_decay, [(0, 0)] * (log_decay.ndim - 2) + [(0, 1), (0, 0)])[..., 1:, :]
        suffix = jnp.flip(jnp.cumsum(jnp.flip(after, -2), axis=-2), -2)
        total = prefix[..., -1:, :]
        if documents is not None:
            visible = visible & (documents[..., :, None] == documents[..., None, :])
            last = documents[..., -1:]
            prefix = jnp.where((documents == before)[..., None], prefix, -jnp.inf)
            suffix = jnp.where((documents == last)[..., None], suffix, -jnp.inf)
            total = jnp.where((last == before)[..., None], total, -jnp.inf)
        weights = jnp.exp(prefix), jnp.exp(suffix), jnp.exp(total).swapaxes(-1, -2)
        kind = TokenDecays if log_decay.shape[-1] == 1 else ChannelDecays
        return kind(*weights, visible, running_sums(log_decay, axis=-2))

    def difference(self, a: slice, b: slice) -> jax.Array:
        """G_i - G_j of tokens i in a and j in b, as many or one: [..., tokens, 1 | Hk]."""
        return sum(x[..., a, :] - x[..., b, :] for x in self.sums)


class TokenDecays(Decays):
    """One a token: a matrix [..., C, C] of weights."""

    def weights(self) -> jax.Array:
        exponent = sum(x - x.swapaxes(-1, -2) for x in self.sums)
        return jnp.exp(jnp.where(self.visible, exponent, -jnp.inf))

    def scores(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """`sum_c a_ic b_jc e^(G_i - G_j)_c` of a, b [..., C, Hk]: [..., C, C], 0 where not visible."""
        return (a @ b.swapaxes(-1, -2)) * self.weights()

    def rows(self, p: jax.Array, b: jax.Array) -> jax.Array:
        """The gradient of `a` for that of scores, p [..., C, C]: `sum_j p_ij b_jc e^(G_i - G_j)_c`."""
        return (p * self.weights()) @ b

    def columns(self, p: jax.Array, a: jax.Array) -> jax.Array:
        """The gradient of `b`: `sum_i p_ij a_ic e^(G_i - G_j)_c`."""
        return (p * self.weights()).swapaxes(-1, -2) @ a


class ChannelDecays(Decays):
    """One a token and channel: they stand inside the sum over channels.

    Rows of a sub-block see earlier ones through its first row m: `(a e^(G_i - G_m)) (b e^(G_m - G_j))^T`.
    Both exponents are at most 0. Within a sub-block weights are computed pair by pair.
    """

    def scores(self, a: jax.Array, b: jax.Array) -> jax.Array:
        C, strips = a.shape[-2], []
        for low, high in self.blocks():
            near = jnp.einsum(
                "...ic,...jc,...ijc->...ij", a[..., low:high, :], b[..., low:high, :], self.near(low, high)
            )
            far = (a[..., low:high, :] * self.since(low, high)) @ (
                b[..., :low, :] * self.until(low)
            ).swapaxes(-1, -2)
            none = jnp.zeros((*near.shape[:-1], C - high), near.dtype)
            strips.append(jnp.concatenate([far, near, none], -1))
        return jnp.where(self.visible, jnp.concatenate(strips, -2), 0)

    def rows(self, p: jax.Array, b: jax.Array) -> jax.Array:
        p, strips = jnp.where(self.visible, p, 0), []
        for low, high in self.blocks():
            near = jnp.einsum(
                "...ij,...jc,...ijc->...ic",
                p[..., low:high, low:high],
                b[..., low:high, :],
                self.near(low, high),
            )
            far = p[..., low:high, :low] @ (b[..., :low, :] * self.until(low))
            strips.append(near + far * self.since(low, high))
        return jnp.concatenate(strips, -2)

    def columns(self, p: jax.Array, a: jax.Array) -> jax.Array:
        p, C, total = jnp.where(self.visible, p, 0), a.shape[-2], 0
        for low, high in self.blocks():
            near = jnp.einsum(
                "...ij,...ic,...ijc->...jc",
                p[..., low:high, low:high],
                a[..., low:high, :],
                self.near(low, high),
            )
            far = p[..., low:high, :low].swapaxes(-1, -2) @ (a[..., low:high, :] * self.since(low, high))
            none = jnp.zeros((*near.shape[:-2], C - high, near.shape[-1]), near.dtype)
            total += jnp.concatenate([far * self.until(low), near, none], -2)
        return total

    def blocks(self) -> list[tuple[int, int]]:
        C = self.enter.shape[-2]
        return [(low, min(low + ROWS, C)) for low in range(0, C, ROWS)]

    def since(self, low: int, high: int) -> jax.Array:
        """e^(G_i - G_m) for the rows of a sub-block."""
        return jnp.exp(self.difference(slice(low, high), slice(low, low + 1)))

    def until(self, low: int) -> jax.Array:
        """e^(G_m - G_j) for all rows before a sub-block."""
        return jnp.exp(self.difference(slice(low, low + 1), slice(0, low)))

    def near(self, low: int, high: int) -> jax.Array:
        """e^(G_i - G_j) within a sub-block, [..., rows, rows, Hk]."""
        parts = [x[..., low:high, :] for x in self.sums]
        exponent = sum(x[..., :, None, :] - x[..., None, :, :] for x in parts)
        return jnp.exp(jnp.where(self.visible[..., low:high, low:high, None], exponent, -jnp.inf))
