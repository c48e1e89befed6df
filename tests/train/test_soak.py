"""Two thousand steps with a checkpoint every twenty leave nothing behind in the process."""

import contextlib
import ctypes
import os
import threading

import jax
import numpy as np
import pytest

from blockjax.train import loop
from blockjax.train.checkpoint import Checkpoints


def resident_pages() -> int:
    """Once the allocator gave back what is free: it keeps more of that the longer it runs."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])


@pytest.mark.usefixtures("dense_attention")
@pytest.mark.parametrize("steps", [120, pytest.param(2000, marks=pytest.mark.reliability)])
def test_nothing_grows(tiny, one_device, tmp_path, monkeypatch, steps):
    seen = []
    save = Checkpoints.save

    def measured(self, step, state):
        self.wait()  # so that each look finds the same work done
        files = len(os.listdir("/proc/self/fd"))
        seen.append((len(jax.live_arrays()), threading.active_count(), files, resident_pages()))
        save(self, step, state)

    monkeypatch.setattr(Checkpoints, "save", measured)
    config = tiny(run__steps=steps, run__checkpoint_every=20, run__log_every=20, run__report=False)
    config.model.update(depth=1, pattern="8")
    with one_device():
        loop.train(config, str(tmp_path), quiet=True)
    arrays, threads, files, pages = np.array(seen[2:-1]).T  # without the first, and the last evaluation
    # The loader reads ahead: how many batches are ready differs by as many as it keeps.
    assert np.ptp(arrays) <= 6 * (config.run.prefetch + 2), arrays
    assert np.ptp(threads) <= 2, threads
    assert np.ptp(files) <= 4, files
    if steps >= 1000:
        half = len(arrays) // 2
        for name, numbers in (("arrays", arrays), ("threads", threads), ("files", files)):
            assert abs(np.mean(numbers[half:]) - np.mean(numbers[:half])) <= 1 + 0.02 * np.mean(numbers), name
        # The first half is warm-up. TensorStore 0.1.86 itself keeps 30 kB of each checkpoint, for good.
        later = pages[half:] * os.sysconf("SC_PAGE_SIZE") / 2**20
        growth = np.polyfit(np.arange(len(later)), later, 1)[0] * len(later)
        assert growth < 4, f"{growth:.1f} MiB more over {len(later)} checkpoints"
