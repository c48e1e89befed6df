import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from blockjax.data import Evaluation, Loader, make_order
from blockjax.errors import UsageError

LENGTHS = [5, 1, 17, 3, 40, 2, 9, 11, 6, 4]


@pytest.fixture
def order(make_index):
    return make_order("packed", make_index(LENGTHS), 4, 8, seed=3)


@pytest.fixture
def sharding():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    return NamedSharding(mesh, PartitionSpec("data"))


def same(batch, expected):
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        assert isinstance(batch[key], jax.Array) and batch[key].dtype == value.dtype
        np.testing.assert_array_equal(batch[key], value)


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_batches_come_in_order(order, sharding, prefetch):
    batches = list(Loader(order, sharding, start=2, stop=12, prefetch=prefetch))
    assert len(batches) == 10
    for k, batch in enumerate(batches, 2):
        same(batch, order.batch(k))


def test_two_resumptions_go_on_where_they_stopped(order, sharding):
    whole = [b["tokens"] for b in Loader(order, sharding, stop=9)]
    parts = [b["tokens"] for start in (0, 3, 6) for b in Loader(order, sharding, start=start, stop=start + 3)]
    np.testing.assert_array_equal(whole, parts)


def test_there_is_no_end_unless_asked_for(order, sharding):
    batches = iter(Loader(order, sharding, start=10**9))
    same(next(batches), order.batch(10**9))
    assert not list(Loader(order, sharding, start=3, stop=3))


def test_evaluation_and_a_single_device(make_index):
    evaluation = Evaluation(make_index(LENGTHS), 4, 8)
    batches = list(Loader(evaluation, SingleDeviceSharding(jax.devices()[0]), stop=len(evaluation)))
    for k, batch in enumerate(batches):
        same(batch, evaluation.batch(k))


def test_a_failure_while_reading_ahead_reaches_the_caller(order, sharding):
    def fail(k, rows):
        raise OSError("disk gone")

    order.batch = fail
    with pytest.raises(OSError, match="disk gone"):
        next(iter(Loader(order, sharding)))


def test_a_batch_that_does_not_divide_is_refused(order):
    sharding = NamedSharding(AbstractMesh((3,), ("data",)), PartitionSpec("data"))
    with pytest.raises(UsageError, match=r"4 rows of 8 positions cannot be divided evenly .* \{'data': 3\}"):
        Loader(order, sharding)


MANY_DEVICES = """
    import jax, numpy as np
    from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
    from blockjax.data import Loader, make_order
    from blockjax.data.index import TokenIndex
    offsets = np.arange(0, 101, 10)
    index = TokenIndex("made up", np.arange(100, dtype=np.uint16), offsets, np.full(10, 12), 1000)
    order = make_order("stream", index, 8, 16, seed=0)
    mesh = jax.make_mesh((4, 2), ("data", "seq"), axis_types=(AxisType.Auto,) * 2)
    for spec in (("data", "seq"), ("data",), (None, "seq"), (("data", "seq"),), ()):
        loader = Loader(order, NamedSharding(mesh, PartitionSpec(*spec)), start=5)
        for k, batch in zip(range(5, 7), loader):
            for key, value in order.batch(k).items():
                assert np.array_equal(batch[key], value), (spec, key)
                assert batch[key].sharding.spec == PartitionSpec(*spec[: value.ndim])
    # A process that holds one device of the mesh reads the rows of that device only.
    class OneDevice(NamedSharding):
        def addressable_devices_indices_map(self, shape):
            return {mesh.devices[2, 0]: self.devices_indices_map(shape)[mesh.devices[2, 0]]}
    assert Loader(order, OneDevice(mesh, PartitionSpec("data")))._local_rows().tolist() == [4, 5]
    endless = iter(Loader(order, NamedSharding(mesh, PartitionSpec("data"))))
    next(endless)
    print("left with", len(jax.devices()), "devices")
"""


def test_many_devices_and_a_clean_exit():
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(MANY_DEVICES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left with 8 devices\n", "")
