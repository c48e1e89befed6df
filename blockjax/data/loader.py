"""From an order to global arrays on devices, read ahead in the background."""

import sys
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from blockjax.data.orders import Order
from blockjax.errors import UsageError

THREADS = 2  # one batch is laid out while another is copied to the devices


class Loader:
    """Iterates over batches `start`, `start + 1`, .. of an order, as dicts of global `jax.Array`.

    It holds no state to be saved: a run that made k steps goes on with `start=k`. Each process reads
    the rows that its own devices hold and no others; each iteration begins at `start` again.

    Args:
        order: where batches come from.
        sharding: of the [B, T] entries, over both axes if need be; [B] entries take its first axis.
        start: number of the first batch.
        stop: number after the last batch; None for no end.
        prefetch: batches kept ready.

    Raises:
        UsageError: the sharding does not divide the batch.
    """

    def __init__(
        self, order: Order, sharding: Sharding, start: int = 0, stop: int | None = None, prefetch: int = 4
    ):
        self._order, self._sharding, self._row_sharding = order, sharding, sharding
        self._start, self._stop, self._prefetch = start, stop, prefetch
        self._shape = (order.batch_size, order.seq_len)
        if isinstance(sharding, NamedSharding):
            self._row_sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
            try:
                sharding.shard_shape(self._shape)
            except ValueError as error:
                raise UsageError(
                    f"a batch of {order.batch_size} rows of {order.seq_len} positions cannot be divided "
                    f"evenly as {sharding.spec} over the mesh {dict(sharding.mesh.shape)}; change "
                    "batch_size, seq_len or the mesh"
                ) from error

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        import grain

        stop = sys.maxsize if self._stop is None else self._stop
        batches = grain.MapDataset.range(self._start, stop).map(self.batch)
        options = grain.ReadOptions(
            num_threads=min(THREADS, self._prefetch), prefetch_buffer_size=self._prefetch
        )
        return iter(batches.to_iter_dataset(options))

    def batch(self, k: int) -> dict[str, jax.Array]:
        """Batch `k`, read now."""
        rows = self._local_rows()
        local = self._order.batch(k, rows)
        where = np.zeros(self._shape[0], np.int64)  # of each global row among the local ones
        where[rows] = np.arange(len(rows))
        return {name: self._place(values, where) for name, values in local.items()}

    def _local_rows(self) -> np.ndarray:
        local = np.zeros(self._shape[0], bool)
        for rows, _ in self._sharding.addressable_devices_indices_map(self._shape).values():
            local[rows] = True
        return np.flatnonzero(local)

    def _place(self, values: np.ndarray, where: np.ndarray) -> jax.Array:
        shape = (self._shape[0], *values.shape[1:])
        sharding = self._sharding if values.ndim == 2 else self._row_sharding
        return jax.make_array_from_callback(shape, sharding, lambda at: values[(where[at[0]], *at[1:])])
