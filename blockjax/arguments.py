"""Argument strings: `350m,runlocal,depth=3`, and `beta:5,reversed` for one of several kinds."""

from __future__ import annotations

from collections.abc import Mapping

from ml_collections import ConfigDict

from blockjax.errors import UsageError, nearest


def parse_arg(arg: str | None, *, name: str = "Config argument", **defaults) -> ConfigDict:
    """Reads an argument string such as `350m,runlocal,depth=3`.

    Args:
      arg: comma-separated `key=value`, or `key` for True; the first may be the
        bare value of the first default.
      name: what the string is, for errors.
      **defaults: every key with its default, whose type the value takes.

    Returns:
      A `ConfigDict` of all keys.

    Raises:
      UsageError: an unknown key or a value of another type.
    """
    values = dict(defaults)
    for i, part in enumerate(p.strip() for p in (arg or "").split(",") if p.strip()):
        key, equals, value = part.partition("=")
        if not equals and key not in defaults and i == 0 and defaults:
            key, value = next(iter(defaults)), part
        elif not equals:
            value = "True"
        if key not in defaults:
            raise UsageError(f"Unknown {name[0].lower()}{name[1:]} {key!r}.{nearest(key, defaults)}")
        values[key] = typed(f"{name} {key}", value, defaults[key])
    return ConfigDict(values)


def parse_choice(text: str, choices: Mapping[str, Mapping], *, name: str) -> tuple[str, ConfigDict]:
    """Reads `kind` or `kind:arg`, where `arg` is an argument string with the defaults of that kind.

    Raises:
      UsageError: an unknown kind, key or type.
    """
    kind, _, arg = text.partition(":")
    if kind not in choices:
        raise UsageError(f"Unknown {name} {kind!r}.{nearest(kind, choices)}")
    return kind, parse_arg(arg, name=f"Option of {name}={text}:", **choices[kind])


def typed(name: str, text: str, default: bool | int | float | str) -> bool | int | float | str:
    """What `text` says, in the type of `default`.

    Raises:
      UsageError: it says nothing of that type.
    """
    kind = type(default)
    try:
        return (
            {"true": True, "1": True, "false": False, "0": False}[text.lower()]
            if kind is bool
            else kind(text)
        )
    except (KeyError, ValueError) as error:
        raise UsageError(f"{name}={text} must be of type {kind.__name__}, such as {default}.") from error
