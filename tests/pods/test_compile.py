"""Jobs and their memory, on CPU devices that pass for a pod."""

import dataclasses

import pytest

from blockjax.errors import UsageError
from blockjax.pods import report
from blockjax.pods.chips import GIB
from blockjax.pods.compile import Memory, compile_job, needed_bytes, plan_job
from blockjax.pods.roofline import Estimate, Work, count_work
from blockjax.train.flops import FlopCounter


@pytest.mark.parametrize(
    ("changes", "mesh", "words"),
    [
        ({}, dict(data=3), ["data=3", "there are 8"]),
        ({}, dict(data=2, fsdp=2), ["data=2", "there are 8"]),
        ({"data.batch_size": 12}, dict(data=8), ["12 sequences", "data*fsdp=8"]),
        ({"model.heads": 6, "model.kv_heads": 6}, dict(tensor=4, data=2), ["model.heads=6", "mesh.tensor=4"]),
        ({"model.width": 60}, dict(fsdp=8), ["model.width=60", "mesh.fsdp=8"]),
    ],
)
def test_jobs_refused(tiny, pod, changes, mesh, words):
    tiny.update_from_flattened_dict(changes)
    with pytest.raises(UsageError) as error:
        plan_job(tiny, pod, dict(data=1) | mesh)
    assert all(word in str(error.value) for word in words), error.value


def test_vocabulary(tiny, pod):
    assert plan_job(tiny, pod, dict(data=8)).model.vocab_size == 264  # of bytes, padded
    assert plan_job(tiny, pod, dict(data=8), 512).model.vocab_size == 512
    with pytest.raises(UsageError, match="vocab_size=0"):
        plan_job(tiny, pod, dict(data=8), 0)


def test_memory_of_a_step(tiny, pod, attention_by_reference):
    job = plan_job(tiny, pod, dict(data=2, fsdp=4))
    memory, count = compile_job(job).memory, job.model.num_params()
    gains = job.model.width * (2 * job.model.depth + 1) + 2 * job.model.head_dim * job.model.depth
    # Four bytes a parameter and eight of AdamW; gains are whole everywhere.
    assert memory.params == 4 * ((count - gains) // 4 + gains)
    assert 2 * memory.params <= memory.optimizer <= 2 * memory.params + 64
    assert memory.batch == 4 * 4 * 16 * 64 // 8
    assert memory.fits and memory.total >= memory.params + memory.optimizer + memory.temporaries


def test_what_libtpu_says_when_memory_is_short():
    temporaries = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required "
        "for HLO temporaries (49.82G) exceeds available HBM (15.75G). HLO module: jit_step."
    )
    used = "Ran out of memory in memory space hbm. Used 512.5M of 16.0M hbm. Exceeded hbm capacity by 496.5M."
    assert needed_bytes(temporaries) == int(49.82 * GIB)
    assert needed_bytes(used) == int(512.5 * (1 << 20))
    assert needed_bytes("INTERNAL: Mosaic failed to compile") is None


def test_what_does_not_fit_is_said_with_the_numbers_and_ways_out(tiny, pod):
    tiny.run.remat = "none"
    job = plan_job(tiny, pod, dict(data=8))
    memory = Memory(4 * GIB, 8 * GIB, 0, 7 * GIB, 0, 19 * GIB, 16 * GIB)
    assert not memory.fits
    assert report.verdict(memory) == "It does not fit: 19.00 of 16.00 GiB, 3.00 GiB too much."
    ways = " ".join(report.advice(job, memory))
    for words in ("remat=full", "accumulate=2", "fsdp", "--search"):
        assert words in ways, ways
    assert "1.00 GiB are left" in report.verdict(dataclasses.replace(memory, total=15 * GIB))


def test_flops_of_a_step(tiny, pod):
    job = plan_job(tiny, pod, dict(data=8))
    tokens, counter = 16 * 64, FlopCounter(job.model, 64)
    pairs = 16 * 2 * 64 * 65 / 2  # sequences, layers, a causal triangle
    work = count_work(job)
    assert work.useful == counter.useful(tokens, pairs)
    layers = job.model.num_params() - 2 * 264 * 64
    attention = 4 * 4 * 16 * (16 * 2 * 64 * 64)  # tiles are whole
    assert work.executed == pytest.approx(counter.executed(tokens) + 2 * layers * tokens + attention)
    tiny.run.remat = "dots"
    assert count_work(plan_job(tiny, pod, dict(data=8))).executed == counter.executed(tokens)


def test_bounds_of_a_step():
    bounds = Estimate(Work(useful=300.0, executed=400.0), peak=100.0, compute=4.0, memory=5.0, links=2.0)
    assert (bounds.best, bounds.serial) == (5.0, 7.0)
    assert bounds.mfu(bounds.best) == pytest.approx(0.6)
