"""Where libtpu is, the TPU compiler, which works on a CPU-only x86 machine too; imports nothing of JAX."""

from __future__ import annotations

import importlib.util
import os
import pathlib


def find() -> str | None:
    """Path of the compiler, if it is installed: named, importable, or where `make test` puts it."""
    if named := os.environ.get("TPU_LIBRARY_PATH"):
        return named
    found = importlib.util.find_spec("libtpu")
    beside = pathlib.Path(__file__).parents[2] / ".libtpu" / "libtpu"
    file = (pathlib.Path(found.origin).parent if found and found.origin else beside) / "libtpu.so"
    return str(file) if file.exists() else None


def variables(path: str, chip: str) -> dict[str, str]:
    """The environment in which `path` compiles for a chip family and asks no network where it is."""
    return dict(
        TPU_LIBRARY_PATH=path,
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE=f"{chip}-4",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
