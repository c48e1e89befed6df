"""Which backend of an op serves a call."""

import functools
import logging
from collections.abc import Mapping
from typing import Any

from blockjax.errors import UsageError


def choose(op: str, backends: Mapping[str, Any], spec, implementation: str | None = None) -> str:
    """The name of the backend for this call: the one asked for, else the first that supports it.

    Args:
        op: its name, for the log.
        backends: each with `supports(spec) -> reason | None`.

    Raises:
        UsageError: there is none of this name, or it cannot serve the call.
    """
    if implementation is not None:
        if implementation not in backends:
            raise UsageError(
                f"There is no implementation {implementation!r}; choose from {', '.join(backends)}."
            )
        reason = backends[implementation].supports(spec)
        if reason is not None:
            raise UsageError(f"implementation={implementation!r} cannot serve this call: {reason}")
        return implementation
    for name, backend in backends.items():
        reason = backend.supports(spec)
        if reason is None:
            return name
        log_fallback(op, name, reason)
    raise AssertionError("unreachable: xla supports every call")


@functools.cache
def log_fallback(op: str, name: str, reason: str) -> None:
    """Cached, so that each reason is said once."""
    logging.getLogger(f"{__package__}.{op}.api").info("%s: not %s: %s", op, name, reason)
