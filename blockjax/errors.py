"""The one exception that means: what the user gave cannot work."""


class UsageError(ValueError):
    """A mistake in the input, in one sentence: what is wrong, the numbers, the way out.

    Raised before anything is compiled. The entry points in `experiments/` print
    the message without a traceback and leave with exit code 2.
    """
