"""What a sweep runs: `sweep(add, config)` of a config file, checked before anything starts.

A config file says beside `get_config` which settings to compare, each over some seeds:

    def sweep(add, config):
        for window in (64, 256):
            add(f"window-{window}", {"model.pattern": f"{window}*3,full"}, seeds=range(3))
        add("full", {"model.pattern": "full"}, seeds=range(3))

Each is compared to the first one, or to the one that `against` names.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterable, Mapping

from blockjax.errors import UsageError, nearest
from blockjax.train import config as configs
from blockjax.train.config import ConfigDict

Value = bool | int | float | str
NAME = re.compile(r"[a-z0-9]+([.-]+[a-z0-9]+)*")


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedRun:
    """One run of a sweep.

    Attributes:
      setting: its name but for the seed; runs that share it are averaged.
      seed: of parameters and of the order of data.
      overrides: what to set on top of the config file, by dotted key.
      config: the whole config, checked.
    """

    setting: str
    seed: int
    overrides: Mapping[str, Value]
    config: ConfigDict

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.setting}-seed{self.seed}"

    @property
    def steps(self) -> int:
        """Updates in all."""
        return self.config.run.steps


@dataclasses.dataclass(frozen=True)
class Plan:
    """All runs of a sweep.

    Attributes:
      spec: config file, with an optional argument after `:`.
      folder: of the sweep, on disk or gs://; run folders lie in it.
      common: what the command line sets for all runs, by dotted key.
      settings: what each setting sets, by dotted key.
      bases: the setting that each one is compared to; an own name for those that others are compared to.
      runs: setting by setting.
    """

    spec: str
    folder: str
    common: Mapping[str, Value]
    settings: Mapping[str, Mapping[str, Value]]
    bases: Mapping[str, str]
    runs: tuple[PlannedRun, ...]

    def path(self, run: PlannedRun) -> str:
        """The folder of a run."""
        return f"{self.folder}/{run.name}"

    def select(self, pattern: str | None) -> list[PlannedRun]:
        """The runs whose name contains `pattern` or matches it as a glob; all without one.

        Raises:
          UsageError: none does.
        """
        names = [run.name for run in self.runs]
        chosen = [
            r for r in self.runs if not pattern or pattern in r.name or fnmatch.fnmatch(r.name, pattern)
        ]
        if not chosen:
            raise UsageError(f"--only={pattern} matches none of {len(names)} runs.{nearest(pattern, names)}")
        return chosen

    def command(
        self, run: PlannedRun, train: str, *, python: str = sys.executable, distributed: bool = False
    ) -> list[str]:
        """The words of the command that trains `run`, or continues it.

        Args:
          run: one of `runs`.
          train: path of `experiments/train.py`.
          python: interpreter.
          distributed: whether it joins other processes.
        """
        words = [python, train, f"--config={self.spec}", f"--run={self.path(run)}"]
        words += [f"--config.{key}={as_text(value)}" for key, value in run.overrides.items()]
        return words + ["--distributed"] * distributed


def as_text(value: Value) -> str:
    """A value as it is written after `--config.KEY=`."""
    return value if isinstance(value, str) else repr(value)


def collect(spec: str, folder: str, config: ConfigDict) -> Plan:
    """Calls `sweep(add, config)` of a config file and checks every run that it asks for.

    `add(setting, overrides, seeds=(0,), against=None)` adds one run for each seed: `setting` is its name, of
    lower-case letters, digits, `-` and `.`, `overrides` the config keys that it sets, such as
    `{"model.depth": 6}`, `against` the setting that it is compared to, the first one if there is no other.
    `config` is what the runs have in common.

    Args:
      spec: `path/to/file.py` or `path/to/file.py:arg`.
      folder: of the sweep.
      config: what the file makes, with the overrides of the command line, which hold for every run.

    Raises:
      UsageError: no `sweep`, a name that cannot be used or is used twice, an unknown key, a value of
        another type, or a run whose config fails `train.config.check`.
    """
    if not folder or not folder.strip("/"):
        raise UsageError("No sweep folder: name one with --sweep=runs/NAME or --sweep=gs://BUCKET/NAME.")
    folder = folder if "://" in folder else os.path.expanduser(folder)
    before, now = configs.flatten(configs.load_config(spec)), configs.flatten(config)
    common = {key: value for key, value in now.items() if value != before[key]}
    if "seed" in common:
        raise UsageError(f"--config.seed={common['seed']}: a sweep sets the seeds itself; leave it out.")
    settings: dict[str, dict[str, Value]] = {}
    bases: dict[str, str] = {}
    runs: list[PlannedRun] = []

    def add(
        setting: str,
        overrides: Mapping[str, Value] | None = None,
        *,
        seeds: Iterable[int] = (0,),
        against: str | None = None,
    ) -> None:
        seeds = list(seeds)
        _check_setting(setting, settings, seeds)
        bases[setting] = next(iter(settings), setting) if against is None else against
        if bases[setting] not in (setting, *settings):
            raise UsageError(
                f"Setting {setting!r}: against={against!r} is no setting that was added before."
                f"{nearest(against, settings)}"
            )
        settings[setting] = own = _typed(setting, overrides or {}, now, common)
        for seed in seeds:
            values = {**common, **own, "seed": seed}
            at = config.copy_and_resolve_references()
            at.update_from_flattened_dict(values)
            try:
                configs.check(at)
            except UsageError as error:
                raise UsageError(f"Setting {setting!r}: {error}") from error
            runs.append(PlannedRun(setting, seed, values, at))

    file = spec.partition(":")[0]
    _call(file, add, config.copy_and_resolve_references())
    if not runs:
        raise UsageError(f"sweep(add, config) in {file} adds no runs; call add(name, overrides, seeds=...).")
    _check_distinct(runs)
    return Plan(spec, folder.rstrip("/"), common, settings, bases, tuple(runs))


def _call(file: str, add: Callable, config: ConfigDict) -> None:
    try:
        sweep = runpy.run_path(file).get("sweep")
        if callable(sweep):
            sweep(add, config)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        where = configs.where(error, file)
        raise UsageError(f"sweep in {file} fails{where}: {type(error).__name__}: {error}.") from error
    if not callable(sweep):
        raise UsageError(
            f"{file} has no function sweep(add, config) that says what to run; train it alone with "
            f"experiments/train.py --config={file}."
        )


def _check_setting(setting: str, known: Iterable[str], seeds: list[int]) -> None:
    if not isinstance(setting, str) or not NAME.fullmatch(setting):
        raise UsageError(
            f"Setting {setting!r}: a name has lower-case letters, digits, '-' and '.', and begins and ends "
            "with a letter or digit."
        )
    if setting in known:
        raise UsageError(f"Setting {setting!r} is added twice; add it once, with all its seeds.")
    if not seeds or any(type(seed) is not int for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UsageError(f"Setting {setting!r}: seeds={seeds} must be different integers, such as range(3).")


def _typed(setting: str, overrides: Mapping, now: Mapping, common: Mapping) -> dict[str, Value]:
    values = {}
    for key, value in overrides.items():
        where = f"Setting {setting!r}"
        if key == "seed":
            raise UsageError(f"{where} sets seed={value!r}; write add({setting!r}, ..., seeds=[{value!r}]).")
        if key in common:
            raise UsageError(
                f"--config.{key} is set by {where[0].lower()}{where[1:]} too; leave out one of them."
            )
        if key not in now:
            below = [leaf for leaf in now if leaf.startswith(f"{key}.")]
            hint = f" It is a section: set its keys, such as {below[0]!r}." if below else nearest(key, now)
            raise UsageError(f"{where}: unknown config key {key!r}.{hint}")
        kind = type(now[key])
        if type(value) not in ((int, float) if kind is float else (kind,)):
            raise UsageError(
                f"{where}: {key}={value!r} must be of type {kind.__name__}, such as {now[key]!r}."
            )
        values[key] = kind(value)
    return values


def _check_distinct(runs: Iterable[PlannedRun]) -> None:
    seen: dict[tuple, PlannedRun] = {}
    for run in runs:
        same = seen.setdefault(tuple(configs.flatten(run.config).items()), run)
        if same is not run:
            raise UsageError(
                f"Settings {same.setting!r} and {run.setting!r} are the same run at seed {run.seed}; "
                "drop one or let it differ."
            )
