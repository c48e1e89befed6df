"""A compiled step on disk: the executable as the compiler wrote it, and what it was compiled from.

No pickle is read: what the step takes and returns is worked out again from the config. An executable is
machine code all the same, so load only what you compiled.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import pathlib
import re
from collections.abc import Callable

import jax
from jax._src.lib import xla_client  # as jax.experimental.serialize_executable
from jax.sharding import Mesh

from blockjax.errors import UsageError
from blockjax.pods.compile import Job, Outcome
from blockjax.train.config import ConfigDict, check, flatten
from blockjax.train.state import plan_state
from blockjax.train.step import lower_train_step, make_dial

PROGRAM, HEADER = "program.bin", "program.json"
# Keys that leave the step as it is.
OUTSIDE = re.compile(
    r"seed|data\.(source|text_field|tokenizer|order)"
    r"|run\.(\w+_every|eval_sequences|inspect|keep_checkpoints|keep_hours|max_skipped|hang_seconds|prefetch|data_dir|tensorboard|report)"
)


def prepare(folder: str) -> pathlib.Path:
    """Makes the folder of a program that takes minutes to compile.

    Raises:
      UsageError: it cannot be made.
    """
    path = pathlib.Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out={folder} cannot be made: {error.strerror}.") from error
    return path


def write(path: pathlib.Path, job: Job, outcome: Outcome) -> None:
    """Writes `program.bin` and `program.json` into a folder, in place of those that lie there."""
    program = outcome.executable.runtime_executable().serialize()
    device = job.mesh.devices.flat[0]
    header = {
        **versions(device),
        "topology": job.topology.name,
        "device_kind": device.device_kind,
        "mesh": dict(job.mesh.shape),
        "vocab_size": job.model.vocab_size,
        "config": step_keys(job.config),
        "bytes": len(program),
        "sha256": hashlib.sha256(program).hexdigest(),
    }
    (path / PROGRAM).write_bytes(program)
    (path / HEADER).write_text(json.dumps(header, indent=1) + "\n")


def read_header(folder: str) -> dict:
    """What `program.json` says.

    Raises:
      UsageError: there is no compiled step, or it is damaged.
    """
    path = pathlib.Path(folder)
    try:
        header = json.loads((path / HEADER).read_text())
        program = (path / PROGRAM).read_bytes()
    except FileNotFoundError as error:
        raise UsageError(
            f"There is no compiled step in {folder}: {pathlib.Path(error.filename).name} is missing. "
            f"Write one with experiments/compile_pod.py --out={folder}."
        ) from error
    except json.JSONDecodeError as error:
        raise UsageError(f"{path / HEADER} is damaged: {error}.") from error
    if hashlib.sha256(program).hexdigest() != header["sha256"]:
        raise UsageError(
            f"{path / PROGRAM} has {len(program)} bytes that are not the {header['bytes']} written; "
            "copy it again."
        )
    return header


def load(folder: str, config: ConfigDict, mesh: Mesh) -> Callable:
    """The step `(state, batch) -> (state, metrics)` on the devices of a mesh, not compiled again.

    Args:
      folder: that `write` wrote.
      config: of the run.
      mesh: of devices like those it was compiled for, from `parallel.make_mesh`.

    Raises:
      UsageError: another version, device, mesh or config; names what differs.
    """
    header, device = read_header(folder), mesh.devices.flat[0]
    here = {
        **versions(device),
        "device_kind": device.device_kind,
        "mesh": dict(mesh.shape),
    }
    differ = [f"{key} is {x!r}, it was {header[key]!r}" for key, x in here.items() if x != header[key]]
    now, then = step_keys(config), header["config"]
    differ += [
        f"{key} is {now.get(key)!r}, it was {then.get(key)!r}"
        for key in sorted(now.keys() | then.keys())
        if now.get(key) != then.get(key)
    ]
    if differ:
        raise UsageError(
            f"The step in {folder} was compiled for something else: {'; '.join(differ)}. "
            "Compile it again with experiments/compile_pod.py."
        )
    with jax.set_mesh(mesh):
        model = check(config, header["vocab_size"])
        plan = plan_state(model, config, mesh)
        dial = make_dial(model, config.optimizer.locality_warmup)
        lowered = lower_train_step(plan, config, mesh, dial)
    program = device.client.deserialize_executable(
        (pathlib.Path(folder) / PROGRAM).read_bytes(),
        executable_devices=xla_client.DeviceList(tuple(mesh.devices.flat)),
    )
    out, tree = jax.tree.flatten(lowered.out_info)
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    places = [x.sharding for x in jax.tree.leaves(plan.abstract)]
    places += [everywhere] * (len(out) - len(places))

    def step(state, batch):
        shards = program.execute_sharded(jax.tree.leaves((state, batch)))
        arrays = [
            jax.make_array_from_single_device_arrays(x.shape, place, parts)
            for x, place, parts in zip(
                out, places, shards.disassemble_into_single_device_arrays(), strict=True
            )
        ]
        return jax.tree.unflatten(tree, arrays)

    return step


def versions(device: jax.Device) -> dict[str, str]:
    """Of everything that decides whether an executable can be read."""
    jaxlib = importlib.metadata.version("jaxlib")
    return {"jax": jax.__version__, "jaxlib": jaxlib, "compiler": device.client.platform_version}


def step_keys(config: ConfigDict) -> dict:
    """The keys of a config that a step depends on, but for the mesh."""
    return {
        key: value
        for key, value in flatten(config).items()
        if not OUTSIDE.fullmatch(key) and not key.startswith("mesh.")
    }
