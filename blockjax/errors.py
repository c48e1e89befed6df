"""The one exception that means: what the user gave cannot work."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A mistake in the input, in one sentence: what is wrong, the numbers, the way out.

    Raised before anything is compiled. The entry points in `experiments/` print
    the message without a traceback and leave with exit code 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the closest known ones, else all of them."""
    known = [str(k) for k in known]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return " Did you mean " + " or ".join(repr(c) for c in close) + "?"
    return " Known: " + ", ".join(sorted(known)) + "."
