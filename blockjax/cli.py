"""Runs an entry point: flags, and a sentence instead of a traceback for what the user got wrong."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
from absl import app, flags

from blockjax.arguments import typed
from blockjax.errors import UsageError, nearest
from blockjax.train import hosts
from blockjax.train.config import ConfigDict, flatten, load_config
from blockjax.train.display import quiet
from blockjax.train.endings import Diverged, Hung, Preempted

NO_CONFIG = "No config: name a file with --config=configs/NAME.py."


def run(main: Callable[[], None]) -> None:
    """Parses flags and calls `main()`; leaves with code 2 on a `UsageError`, 130 on Ctrl-C.

    Endings of a training job have codes of their own, in `train.endings`.
    """
    ending(lambda: app.run(lambda _: _quietly(main), flags_parser=_parse))


def ending(main: Callable[[], None]) -> None:
    """Calls `main()` and turns how it ends into a sentence and an exit code, as `run` says."""
    try:
        main()
    except UsageError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except Hung as end:
        print(end, file=sys.stderr)
        hosts.leave(end.exit_code)
    except (Preempted, Diverged) as end:
        print(end, file=sys.stderr)
        sys.exit(end.exit_code)
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)


def join_hosts(distributed: bool, coordinator: str | None, processes: int | None, index: int | None) -> None:
    """Joins the other processes of a run, if it has any; before anything asks for devices.

    Args:
      distributed: find the others through the TPU pod or Slurm.
      coordinator: address:port of process 0, where they cannot be found.
      processes, index: how many there are and which one this is, with `coordinator`.

    Raises:
      UsageError: they do not come together.
    """
    if not coordinator and (processes is not None or index is not None):
        raise UsageError("--processes and --process need --coordinator=ADDRESS:PORT of process 0.")
    if distributed or coordinator:
        try:
            jax.distributed.initialize(coordinator, processes, index)
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"The processes of the run do not come together: {error}") from error


def _parse(argv: Sequence[str]) -> list[str]:
    own = flags.FLAGS.get_key_flags_for_module(argv[0])
    given = [
        _flag(word, following) for word, following in itertools.zip_longest(argv[1:], argv[2:], fillvalue="")
    ]
    values = {name: value for name, value in given if name}
    config = load_config(values["config"]) if "config" in values else None
    if values.keys() & {"help", "helpshort", "helpfull"}:
        print("\n".join(_help(own, config)))
        sys.exit()
    if config is not None:
        _check_overrides(config, values)
    elif any(name.startswith("config.") for name in values):
        raise UsageError(NO_CONFIG)
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        raise UsageError(
            f"Unknown flag --{error.flagname}.{nearest(error.flagname, (f.name for f in own))}"
        ) from error
    except flags.Error as error:
        raise UsageError(f"{error}. See --help for all flags.") from error
    if rest[1:]:
        raise UsageError(f"Unexpected argument {rest[1]!r}: flags are written --NAME=VALUE. See --help.")
    if config is None and "config" in flags.FLAGS:
        raise UsageError(NO_CONFIG)
    return rest


def _flag(word: str, following: str) -> tuple[str, str]:
    """Name and value of `--name=value` and `--name value`; no name if the word is no flag."""
    if not word.startswith("-"):
        return "", ""
    name, equals, value = word.lstrip("-").partition("=")
    return name, value if equals else following


def _check_overrides(config: ConfigDict, given: dict[str, str]) -> None:
    # ml_collections ends in tracebacks for these mistakes, so they are looked for first.
    leaves = flatten(config)
    for name, value in given.items():
        prefix, dot, key = name.partition(".")
        if not dot or prefix not in ("config", "noconfig"):
            continue
        if key in leaves:
            # A bare --config.KEY or --noconfig.KEY sets a boolean; absl sees to it.
            if not isinstance(leaves[key], bool):
                typed(f"--config.{key}", value, leaves[key])
        elif below := [leaf for leaf in leaves if leaf.startswith(f"{key}.")]:
            raise UsageError(
                f"{key!r} is a section of the config: set its keys, such as --config.{below[0]}."
            )
        else:
            raise UsageError(f"Unknown config key {key!r}.{nearest(key, leaves)}")


def _help(own: Sequence[flags.Flag], config: ConfigDict | None) -> Iterator[str]:
    yield (sys.modules["__main__"].__doc__ or "").strip() + "\n"
    for flag in own:
        if "." not in flag.name:
            default = "" if flag.default in (None, "", False, [""]) else f" (default: {flag.default})"
            yield f"  --{flag.name:<14} {' '.join(flag.help.split())}{default}"
    if config is not None:
        yield "\nKeys of the config, with their values:"
        yield from (f"  --config.{key}={value}" for key, value in flatten(config).items())
    elif "config" in flags.FLAGS:
        yield "\nWith --config=FILE, --help lists the keys of the config too."


def _quietly(main: Callable[[], None]) -> None:
    quiet()  # once absl has read its own flags
    main()
