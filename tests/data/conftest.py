import numpy as np
import pytest

from blockjax.data.index import TokenIndex

BOUNDARY = 1000


@pytest.fixture
def make_index():
    """An index of documents of the given numbers of tokens; every token of the whole is another id."""

    def make(lengths, bytes_per_token=3):
        lengths = np.asarray(lengths, np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        tokens = np.arange(offsets[-1], dtype=np.uint32) + BOUNDARY + 1
        return TokenIndex("made up", tokens, offsets, lengths * bytes_per_token + 1, BOUNDARY)

    return make
