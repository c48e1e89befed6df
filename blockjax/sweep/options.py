"""Options of a launcher: repeated `--FLAG=key=value`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from blockjax.arguments import typed
from blockjax.errors import UsageError, nearest


def parse_options(flag: str, words: Sequence[str], known: Mapping[str, object]) -> dict:
    """Reads the words of a repeated flag.

    Args:
      flag: its name, for errors.
      words: `key=value`, or `key` for True.
      known: an example of every key's value, whose type the value takes; a list collects all its values.

    Returns:
      The keys given, with their values.

    Raises:
      UsageError: an unknown key, one given twice, or a value of another type.
    """
    values: dict = {}
    for word in words:
        key, equals, text = word.partition("=")
        if key not in known:
            raise UsageError(f"Unknown --{flag} option {key!r}.{nearest(key, known)}")
        if isinstance(known[key], list):
            values.setdefault(key, []).append(text)
        elif key in values:
            raise UsageError(f"--{flag}={key} is given twice.")
        else:
            values[key] = typed(f"--{flag}={key}", text if equals else "True", known[key])
    return values
