"""Eight CPU devices for every test, set before jax is imported.

With BLOCKJAX_TEST_PLATFORM=cuda the GPUs instead, for the tests marked `gpu`.
"""

import fnmatch
import os
import pathlib

import pytest

ON_GPU = os.environ.get("BLOCKJAX_TEST_PLATFORM", "cpu") == "cuda"
os.environ["JAX_PLATFORMS"] = "cuda,cpu" if ON_GPU else "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
# As many threads of XLA as may wait for each other: eight devices, each in several collectives at a time.
os.environ.setdefault("NPROC", "64")
if not ON_GPU:
    # Most time goes to compiling programs that run once, on tiny arrays; subprocesses take part.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if ON_GPU:
    os.environ["XLA_FLAGS"] += " --xla_gpu_autotune_level=0"  # tuning takes longer than the tests
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # workers share the memory
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu, where installed, asks the network otherwise
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# A second run reads what the first one compiled; subprocesses take part.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_configure():
    if ON_GPU:
        import jax
        from blockjax.kernels.block_sparse_attention import hopper

        kind = jax.devices()[0].device_kind
        if not hopper.HOPPER.search(kind):
            raise pytest.UsageError(f"BLOCKJAX_TEST_PLATFORM=cuda needs a Hopper GPU, not {kind}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test marked `sample`, cases whose id fits none of its patterns are `exhaustive`."""
    for item in items:
        sample = item.get_closest_marker("sample")
        if sample and not any(fnmatch.fnmatchcase(item.callspec.id, pattern) for pattern in sample.args):
            item.add_marker(pytest.mark.exhaustive)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not ON_GPU:
        pytest.skip("needs a Hopper GPU: make test-gpu")


@pytest.fixture
def optimized():
    """For tests of what the compiler makes: as users compile."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def bucket(monkeypatch):
    """Keeps `gs://BUCKET/runs/` in memory; `bucket()` maps names of objects to their contents."""
    from etils.epath import backend
    from fsspec.implementations.memory import MemoryFileSystem

    filesystem = MemoryFileSystem(skip_instance_cache=True)
    filesystem.store, filesystem.pseudo_dirs = {}, [""]
    monkeypatch.setattr(type(backend.fsspec_backend), "_get_filesystem", lambda self, name: filesystem)
    return lambda: {name.partition("runs/")[2]: file.getvalue() for name, file in filesystem.store.items()}


@pytest.fixture
def dense_attention(monkeypatch):
    """For tests of something else: models compile in a third less time."""
    from blockjax.kernels.block_sparse_attention import api, reference

    monkeypatch.setattr(api, "BACKENDS", {"reference": reference})
