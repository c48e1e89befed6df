"""Steps whose loss or gradient is not finite are skipped, and losses far from the recent ones are seen.

All of it is decided on the device: the host learns of it with the metrics.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

DECAY = 0.99  # of the running mean and square of the loss: about the last hundred steps
FIRST = 10  # losses before one can be a spike
LEAST_DEVIATION = 1e-3  # nats

Health = dict[str, jax.Array]


def healthy() -> Health:
    """Before the first step: int32 and float32 scalars.

    `skipped` counts skipped steps, `in_a_row` those since the last good one, `losses` the good ones;
    `loss_mean` and `loss_square` are running sums of them.
    """
    counters = {name: jnp.zeros((), jnp.int32) for name in ("skipped", "in_a_row", "losses")}
    return counters | {name: jnp.zeros((), jnp.float32) for name in ("loss_mean", "loss_square")}


def observe(health: Health, loss: jax.Array, grad_norm: jax.Array) -> tuple[jax.Array, Health, Health]:
    """What a step says of itself.

    Args:
      health: before the step.
      loss, grad_norm: float32 scalars.

    Returns:
      Whether the update may be made, the health after the step, and metrics: `skipped_steps`,
      `skipped_in_a_row`, and `loss_spike`, the distance of the loss from the running mean in running
      standard deviations; 0 for the first `FIRST` losses.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    seen = health["losses"]
    weight = jnp.maximum(1 - DECAY ** seen.astype(jnp.float32), 1e-6)
    mean = health["loss_mean"] / weight
    variance = health["loss_square"] / weight - mean**2
    deviation = jnp.maximum(jnp.sqrt(jnp.maximum(variance, 0.0)), LEAST_DEVIATION)
    spike = jnp.where(seen >= FIRST, (loss - mean) / deviation, 0.0)
    good = {
        "skipped": health["skipped"],
        "in_a_row": jnp.zeros((), jnp.int32),
        "losses": seen + 1,
        "loss_mean": DECAY * health["loss_mean"] + (1 - DECAY) * loss,
        "loss_square": DECAY * health["loss_square"] + (1 - DECAY) * loss**2,
    }
    bad = health | {"skipped": health["skipped"] + 1, "in_a_row": health["in_a_row"] + 1}
    after = choose(finite, good, bad)
    metrics = {
        "skipped_steps": after["skipped"],
        "skipped_in_a_row": after["in_a_row"],
        "loss_spike": spike,
    }
    return finite, after, metrics


def choose(which: jax.Array, yes: Any, no: Any) -> Any:
    """The leaves of one tree or the other; a NaN in the one not chosen goes nowhere."""
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), yes, no)
