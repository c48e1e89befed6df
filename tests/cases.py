"""Which cases of a matrix `make test` runs."""

import pytest


def sampled(cases, kept):
    """Parameters of a test: those that `kept(*case)` tells run always, the others in `make test-all`."""
    return [case if kept(*case) else pytest.param(*case, marks=pytest.mark.exhaustive) for case in cases]
