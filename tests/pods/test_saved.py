"""A step on disk, loaded again on CPU devices; on a TPU it is the same code."""

import json

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from blockjax.errors import UsageError
from blockjax.pods import saved
from blockjax.pods.compile import compile_job, plan_job
from blockjax.train.state import plan_state
from blockjax.train.step import BATCH_KEYS, batch_sharding
from tests.pods.conftest import small_config

MESH = dict(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def compiled(pod, attention_by_reference):
    """Compiled anew: a program for CPUs that came from JAX's cache cannot be written again (jax 0.12)."""
    job, folder = plan_job(small_config(), pod, MESH), jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    outcome = compile_job(job)
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()
    return job, outcome


@pytest.fixture
def written(compiled, tmp_path):
    """Folder, job and outcome."""
    folder = saved.prepare(str(tmp_path / "a" / "b"))
    saved.write(folder, *compiled)
    return folder, *compiled


def test_the_same_step_comes_back(written):
    folder, job, outcome = written
    step = saved.load(str(folder), job.config, job.mesh)
    rng = np.random.default_rng(0)
    with jax.set_mesh(job.mesh):
        plan = plan_state(job.model, job.config, job.mesh)
        batch = {key: rng.integers(0, 200, (16, 64)).astype(np.int32) for key in BATCH_KEYS}
        batch |= dict(segment_ids=np.zeros((16, 64), np.int32))
        batch = jax.device_put(batch, batch_sharding(job.mesh))
        expected, actual = plan.make(), plan.make()
        for _ in range(2):  # the second takes what the first made
            expected, metrics = outcome.executable(expected, batch)
            actual, found = step(actual, batch)
            assert float(metrics["loss"]) == float(found["loss"])
    assert int(actual.step) == 2
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)


def test_the_header(written):
    folder = written[0]
    header = saved.read_header(str(folder))
    assert header["mesh"] == dict(data=2, fsdp=2, seq=1, tensor=2) and header["topology"] == "v5e:2x4"
    assert header["jax"] == jax.__version__ and header["bytes"] == (folder / saved.PROGRAM).stat().st_size
    assert header["config"]["model.depth"] == 2 and "run.log_every" not in header["config"]
    assert "data.source" not in header["config"] and "optimizer.clip_norm" in header["config"]


def test_another_config_mesh_or_version_is_refused(written):
    folder, job, _ = written
    config = job.config.copy_and_resolve_references()
    config.run.log_every += 1  # not of the step
    saved.load(str(folder), config, job.mesh)
    config.optimizer.clip_norm = 2.0
    with pytest.raises(UsageError, match=r"optimizer.clip_norm is 2.0, it was 1.0.*compile_pod"):
        saved.load(str(folder), config, job.mesh)
    other = plan_job(job.config, job.topology, dict(data=8, fsdp=1, tensor=1))
    with pytest.raises(UsageError, match=r"mesh is \{'data': 8"):
        saved.load(str(folder), other.config, other.mesh)
    header = json.loads((folder / saved.HEADER).read_text()) | {"jax": "0.1", "compiler": "libtpu of old"}
    (folder / saved.HEADER).write_text(json.dumps(header))
    with pytest.raises(UsageError, match=r"it was '0.1'; compiler is .* it was 'libtpu of old'"):
        saved.load(str(folder), job.config, job.mesh)


def test_damaged_and_missing_files_are_refused(written, tmp_path):
    folder, _, _ = written
    (folder / saved.PROGRAM).write_bytes((folder / saved.PROGRAM).read_bytes()[:-1])
    with pytest.raises(UsageError, match="copy it again"):
        saved.read_header(str(folder))
    (folder / saved.HEADER).write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        saved.read_header(str(folder))
    with pytest.raises(UsageError, match=r"no compiled step .*program.json is missing"):
        saved.read_header(str(tmp_path))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be made"):
        saved.prepare(str(tmp_path / "file" / "x"))
