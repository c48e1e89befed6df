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
        platform, implementation = target().platform, job.options["implementation"]
        if platform != "tpu" and tpu.INTERPRET is None:
            return f"its forward is a TPU kernel, and this runs on {platform}"
        if implementation not in (None, "tpu"):
            return f"its forward is a TPU kernel, not implementation={implementation!r}"
        return self.otherwise.refuses(job)

    def forward(self, job: Job, queries: Queries, keys: Keys) -> partials.Partial:
        ring = job.ring
        live = [t for t in range(1, ring.size) if ring.live(t, "keys").any()]
        if not live:
            return job.forward(queries, keys, job.piece(queries.lists, ring.place, ring.place))
        route = Route.of(ring.axis, ring.size, ring.stride, live, heads=keys.k.shape[2])
        return job.forward_round(queries, keys, route)

    def backward(self, job: Job, queries: Queries, keys: Keys, statistics: Cotangents):
        return self.otherwise.backward(job, queries, keys, statistics)
