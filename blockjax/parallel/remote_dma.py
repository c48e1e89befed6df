"""The ring on TPUs whose forward is one kernel that moves the keys itself, by remote copies."""

from dataclasses import dataclass
from typing import Any

from blockjax import partials
from blockjax.kernels.block_sparse_attention import tpu
from blockjax.kernels.block_sparse_attention.spec import Cotangents
from blockjax.kernels.block_sparse_attention.tpu.layout import Route
from blockjax.kernels.platforms import target
from blockjax.parallel.shards import Job, Keys, Queries


@dataclass(frozen=True)
class RemoteDma:
    """Keys go half way round in both directions inside the forward kernel: see `tpu/ring.py`.

    The backward is that of another schedule: gradients of keys travel too, in float32 and one step behind
    the keys, so that a round sends three times the bytes and its results are no kernel's own accumulators.
    The compiler hides such sends behind kernels of a shard as well as a kernel could.
    """

    otherwise: Any

    def refuses(self, job: Job) -> str | None:
        platform, implementation = target().platform, job.options.get("implementation")
        if platform != "tpu" and tpu.INTERPRET is None:
            return f"its forward is a TPU kernel, and this runs on {platform}"
        if implementation not in (None, "tpu"):
            return f"its forward is a TPU kernel, not implementation={implementation!r}"
        return self.otherwise.refuses(job)

    def rounds(self, job: Job, K: int, backward: bool) -> int:
        if backward:
            return self.otherwise.rounds(job, K, backward)
        route = self.route(job, K)
        return max(route.copies) if route else 0

    def route(self, job: Job, K: int) -> Route | None:
        """None if no place has keys that another needs."""
        ring = job.ring
        live = [t for t in range(1, ring.size) if ring.live(t, "keys").any()]
        return Route.of(ring.axis, ring.size, ring.stride, live, heads=K) if live else None

    def forward(self, job: Job, queries: Queries, keys: Keys) -> partials.Partial:
        route, here = self.route(job, keys.k.shape[2]), job.ring.place
        if route is None:
            return job.forward(queries, keys, job.piece(queries.lists, here, here))
        return job.forward_round(queries, keys, route)

    def backward(self, job: Job, queries: Queries, keys: Keys, statistics: Cotangents):
        return self.otherwise.backward(job, queries, keys, statistics)
