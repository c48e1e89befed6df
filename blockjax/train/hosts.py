"""What the processes of a run tell each other outside of their programs: barriers, agreement, places."""

from __future__ import annotations

import itertools
import os
import socket
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from blockjax.train.endings import Hung

LIMIT = 600.0  # seconds that processes wait for each other where nothing else is said
GATHER_SECONDS = 2.0  # for other processes to say where they hang
_numbers = itertools.count()


def barrier(name: str, limit: float = LIMIT) -> None:
    """Waits until every process is here.

    Args:
      name: what it is good for, for people.
      limit: seconds.

    Raises:
      Hung: names the processes that did not come, and their hosts.
    """
    client = _client()
    if client is None:
        return
    # Processes make the same calls in the same order, so they count alike.
    key = f"blockjax/{next(_numbers)}/{name}"
    client.key_value_set(f"{key}/{jax.process_index()}", socket.gethostname())
    try:
        client.wait_at_barrier(key, int(limit * 1000))
    except jax.errors.JaxRuntimeError as error:
        came = {int(k.rpartition("/")[2]) for k, _ in client.key_value_dir_get(f"{key}/")}
        raise Hung(missing(name, limit, came)) from error


def missing(name: str, limit: float, came: set[int]) -> str:
    """Who did not come to a barrier, in a sentence."""
    absent = [i for i in range(jax.process_count()) if i not in came]
    if not absent:
        return f"The barrier {name!r} failed: a process left it early."
    hosts = hostnames()
    names = ", ".join(f"process {i} ({hosts.get(i, 'unknown host')})" for i in absent)
    return f"At the barrier {name!r}, {names} did not come within {limit:g} s; see to it and start all again."


def leave(code: int) -> None:
    """Ends the process with this code, at once: Python's own way would wait for a process that hangs.

    Process 0 goes last, since the service by which the others learn who hangs ends with it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(GATHER_SECONDS)
    os._exit(code)


def introduce() -> None:
    """Tells the other processes on which host this one runs."""
    if (client := _client()) is not None:
        client.key_value_set(
            f"blockjax/host/{jax.process_index()}", socket.gethostname(), allow_overwrite=True
        )


def hostnames() -> dict[int, str]:
    """Hosts of the processes that introduced themselves."""
    return _published("host")


def publish_place(place: str) -> None:
    """Tells the other processes where this one hangs."""
    if (client := _client()) is not None:
        client.key_value_set(f"blockjax/place/{jax.process_index()}", place, allow_overwrite=True)


def places() -> dict[int, str]:
    """Where processes hang, of those that said so."""
    return _published("place")


def agree(ok: bool) -> bool:
    """Whether it is so in every process."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def of_first(make: Callable[[], list[int]]) -> list[int]:
    """What `make` returns in process 0, in every process; numbers below 2**31."""
    if jax.process_count() == 1:
        return make()
    mine = make() if jax.process_index() == 0 else []
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(mine))))
    values = np.zeros(count, np.int32)
    values[: len(mine)] = mine[:count]
    return [int(x) for x in multihost_utils.broadcast_one_to_all(values)]


def _published(kind: str) -> dict[int, str]:
    client = _client()
    if client is None:
        return {}
    return {
        int(key.rpartition("/")[2]): value for key, value in client.key_value_dir_get(f"blockjax/{kind}/")
    }


def _client():
    """The client of JAX's coordination service; None in a single process."""
    from jax._src import distributed  # there is no public name for it

    return distributed.global_state.client
