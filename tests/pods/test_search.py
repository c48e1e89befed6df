"""Meshes by a cheap model, held to what planning a job says."""

import math

import pytest

from blockjax.errors import UsageError
from blockjax.pods.compile import local_bytes, plan_job
from blockjax.pods.search import activations, cut_bytes, meshes, search, traffic
from blockjax.train.state import plan_state


def test_all_meshes():
    found = list(meshes(12))
    assert all(math.prod(mesh.values()) == 12 for mesh in found)
    assert len({tuple(mesh.values()) for mesh in found}) == len(found) == 10 * 4  # 2, 2 and 3 on four axes
    assert found[0] == dict(data=12, fsdp=1, seq=1, tensor=1)


@pytest.mark.parametrize(
    "mesh", [dict(data=8), dict(data=2, fsdp=2, tensor=2), dict(fsdp=8), dict(seq=2, fsdp=4)]
)
def test_bytes_of_the_state_are_those_of_its_shardings(tiny, pod, mesh):
    elsewhere = plan_job(tiny, pod, dict(data=8))
    state = plan_state(elsewhere.model, elsewhere.config, elsewhere.mesh).abstract
    job = plan_job(tiny, pod, dict(data=1) | mesh)
    planned = plan_state(job.model, job.config, job.mesh).abstract
    assert cut_bytes(state, dict(job.mesh.shape)) == local_bytes(planned)


def test_a_search(tiny, pod):
    found = search(tiny, pod)
    tried = [guess.job.axes for guess in found]
    assert len(set(tried)) == len(tried) and {"data:8", "fsdp:8", "data:2,fsdp:2,tensor:2"} <= set(tried)
    assert all(guess.fits for guess in found)
    seconds = [guess.estimate.serial for guess in found]
    assert seconds == sorted(seconds)
    # What does not divide is not tried: 4 heads, 64 tokens in blocks.
    assert "tensor:8" not in tried


def test_what_does_not_fit_comes_last_by_size(tiny, pod):
    tiny.model.update(width=8192, ffn=32768, depth=32)
    found = search(tiny, pod)
    assert not any(guess.fits for guess in found)
    sizes = [guess.bytes for guess in found]
    assert sizes == sorted(sizes) and "fsdp" in found[0].job.axes


def test_no_mesh_at_all(tiny, pod):
    tiny.data.update(batch_size=1, seq_len=63)
    tiny.model.update(heads=3, kv_heads=3)
    with pytest.raises(UsageError, match=r"No mesh of v5e:2x4 .* 1 sequences"):
        search(tiny, pod)


def test_what_remat_keeps_is_ordered(tiny, pod):
    model = plan_job(tiny, pod, dict(data=8)).model
    one, two = activations(model, 1), activations(model, 2)
    assert one["full"] < one["dots"] < one["matmuls"] < one["none"]
    assert two["full"] == one["full"] and two["dots"] < one["dots"]


def test_traffic_by_hand(tiny, pod):
    job = plan_job(tiny, pod, dict(data=2, fsdp=2, seq=2))
    tokens, weights, vector = 16 * 64 // 8, 1000.0, 4 * 64
    sent = traffic(job, tokens, weights)
    assert sent["fsdp"] == 2 * 500 + 500 and sent["tensor"] == 0
    # Two layers; half of each of four rows goes once around, in forward, again, and twice back.
    assert sent["seq"] == 500 + 2 * 4 * 4 * 32 * 2 * vector
    assert sent["data"] == 500
    job = plan_job(tiny, pod, dict(data=2, tensor=4))
    assert traffic(job, tokens, weights)["tensor"] == 6 * 2 * 2 * (4 * tokens * 64) * 3 / 4
