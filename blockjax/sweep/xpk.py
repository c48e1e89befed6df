"""Sweeps on Cloud TPU: scripts that hand each run to a GKE cluster with xpk.

The options are those of `xpk workload create`
(https://github.com/AI-Hypercomputer/xpk, src/xpk/parser/workload.py of June 2026).
"""

from __future__ import annotations

import hashlib
import pathlib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

from blockjax.errors import UsageError
from blockjax.sweep.options import parse_options
from blockjax.sweep.plan import Plan, PlannedRun

# What --xpk= takes, each with an example.
OPTIONS = {
    "cluster": "name",
    "tpu-type": "v5litepod-16",
    "docker-image": "gcr.io/PROJECT/IMAGE:TAG",
    "num-slices": 1,
    "project": "name",
    "zone": "us-east5-b",
    "priority": "medium",
    "max-restarts": 3,
    "termination-grace-period-seconds": 30,
    "ttl-seconds-after-finished": 43200,
    "scheduler": "default-scheduler",
    "docker-image-pull-secret": "name",
    "env": ["NAME=value"],
    "env-file": "file",
    "storage": ["name"],
    "reservation": "name",
    "on-demand": True,
    "spot": True,
    "flex": True,
}
REQUIRED = ("cluster", "tpu-type", "docker-image")
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # xpk's name_type, with at most 40 characters
NAME_LIMIT = 40
PYTHON, TRAIN = "python", "experiments/train.py"  # in the image


def check(words: Sequence[str], plan: Plan) -> dict:
    """Reads the words of `--xpk`, and checks that the image can find what the commands name.

    Returns:
      Options by name.

    Raises:
      UsageError: an option is unknown, missing or of another type, the sweep folder is not in a bucket, or
        the config file lies outside the repository.
    """
    options = parse_options("xpk", words, OPTIONS)
    missing = [f"--xpk={key}={OPTIONS[key]}" for key in REQUIRED if key not in options]
    if missing:
        raise UsageError(f"xpk needs {' and '.join(missing)}.")
    if not plan.folder.startswith("gs://"):
        raise UsageError(
            f"--sweep={plan.folder}: all hosts must reach it; name one with --sweep=gs://BUCKET/NAME."
        )
    file = pathlib.Path(plan.spec.partition(":")[0])
    if file.is_absolute() or ".." in file.parts:
        raise UsageError(
            f"--config={plan.spec}: the image has files of the repository only, such as configs/lm.py."
        )
    return options


def workload(text: str) -> str:
    """A name that Kubernetes takes, of its own for every text: lower case, at most 40 characters."""
    if NAME.fullmatch(text) and len(text) <= NAME_LIMIT:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    words = words if words[:1].isalpha() else f"s-{words}"
    return f"{words[: NAME_LIMIT - 9].strip('-')}-{digest}"


def scripts(plan: Plan, runs: Iterable[PlannedRun], options: Mapping) -> dict[str, str]:
    """Shell scripts by file name: one a run, and `all.sh`, which runs them."""
    sweep = plan.folder.rpartition("/")[2]
    files = {}
    for run in runs:
        words = ["xpk", "workload", "create", f"--workload={workload(f'{sweep}-{run.name}')}"]
        words += [word for key, value in options.items() for word in _flag(key, value)]
        inner = shlex.join(plan.command(run, TRAIN, python=PYTHON, distributed=True))
        words.append(f"--command={inner}")
        files[f"{run.name}.sh"] = f"#!/bin/bash\n{' \\\n  '.join(map(shlex.quote, words))}\n"
    lines = ["#!/bin/bash", "# Submits all; exit code 1 if one cannot be.", 'here=$(dirname "$0")', "code=0"]
    lines += [f'bash "$here"/{shlex.quote(name)} || code=1' for name in files]
    return files | {"all.sh": "\n".join([*lines, "exit $code", ""])}


def write(files: Mapping[str, str], folder: pathlib.Path) -> None:
    """Writes scripts, in place of those that lie there."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.sh"):
        old.unlink()
    for name, text in files.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def _flag(key: str, value: bool | int | str | Sequence[str]) -> list[str]:
    if isinstance(value, bool):
        return [f"--{key}"] * value
    return [f"--{key}={item}" for item in (value if isinstance(value, list) else [value])]
