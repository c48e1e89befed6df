"""Runs an entry point: flags, and a sentence instead of a traceback for what the user got wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from blockjax.errors import UsageError, nearest
from blockjax.train.display import quiet
from blockjax.train.config import flat_keys, load_config


def run(main: Callable[[], None]) -> None:
    """Parses flags and calls `main()`; leaves with code 2 on a `UsageError`, 130 on Ctrl-C."""
    try:
        app.run(lambda _: _quietly(main), flags_parser=_parse)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)


def _parse(argv: Sequence[str]) -> list[str]:
    # ml_collections ends in tracebacks for these mistakes, so they are looked for first.
    argv = list(argv)
    given = {}
    for i, word in enumerate(argv):
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("--"):
            given[name] = value if equals else " ".join(argv[i + 1 : i + 2])
    if "config" in given:
        known = flat_keys(load_config(given["config"]))
        for name in given:
            key = name.removeprefix("config.")
            if key != name and key not in known:
                raise UsageError(f"Unknown config key {key!r}.{nearest(key, known)}")
    elif any(name.startswith("config.") for name in given):
        raise UsageError(
            "--config.KEY=VALUE changes a config file; name it with --config=configs/NAME.py first."
        )
    try:
        return flags.FLAGS(argv) if not _wants_help(argv) else app.parse_flags_with_usage(argv)
    except flags.Error as error:
        raise UsageError(f"{error}. See --help for all flags.") from error


def _quietly(main: Callable[[], None]) -> None:
    quiet()  # once absl has read its own flags
    main()


def _wants_help(argv: Sequence[str]) -> bool:
    return any(word.lstrip("-") in ("help", "helpfull", "helpshort") for word in argv)
