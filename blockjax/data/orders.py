"""Orders: which tokens are in row b of batch k, from (seed, k) alone.

A document t1..tn has n + 1 positions. Its inputs are `[boundary, t1, .., tn]` and its targets
`[t1, .., tn, boundary]`: every position has a target, and no target depends on the next document.
A *stream* is an endless run of documents, in an order permuted anew each epoch; prefix sums over
the permutation turn a position of the stream into a document and an offset, so any row of any batch
is read directly. Nothing here knows how many processes there are.
"""

import functools
import heapq
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from blockjax.data.index import TokenIndex
from blockjax.errors import UsageError, nearest

Batch = dict[str, np.ndarray]


def permutation(seed: Sequence[int], size: int) -> np.ndarray:
    """A permutation of `range(size)`, int64, that depends on `seed` only.

    It sorts raw Philox output, whose values numpy promises to keep; `Generator.permutation` is
    allowed to change between versions, and a resumed run must not change its order.
    """
    return np.argsort(np.random.Philox(np.random.SeedSequence(seed)).random_raw(size), kind="stable")


class Fragment(NamedTuple):
    """A run of positions [offset, offset + length) of one document."""

    document: int
    offset: int
    length: int


class DocumentStream:
    """Documents end to end, epoch after epoch.

    Args:
        lengths: [D] int64, positions of each document, at least 1.
        seed: what the order depends on, non-negative integers.
        documents: [D] int64, numbers of the documents; None for 0..D-1.
    """

    def __init__(self, lengths: np.ndarray, seed: Sequence[int], documents: np.ndarray | None = None):
        self.lengths, self.seed = lengths, tuple(seed)
        self.documents = np.arange(len(lengths)) if documents is None else documents
        self.epoch_length = int(lengths.sum())
        # Two, since a batch and those read ahead of it can be on both sides of an epoch's end.
        self._epoch = functools.lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents in the order of `epoch`, [D], and where each begins in it, [D + 1]."""
        order = permutation((*self.seed, epoch), len(self.lengths))
        return self.documents[order], np.concatenate([[0], np.cumsum(self.lengths[order])])

    def read(self, position: int, count: int) -> list[Fragment]:
        """The fragments of `count` positions from `position` on."""
        fragments = []
        while count > 0:
            epoch, within = divmod(position, self.epoch_length)
            documents, begins = self._epoch(epoch)
            rank = int(begins.searchsorted(within, side="right")) - 1
            while count > 0 and rank < len(documents):
                offset = within - int(begins[rank])
                length = min(int(begins[rank + 1]) - within, count)
                fragments.append(Fragment(int(documents[rank]), offset, length))
                rank, within, position, count = rank + 1, within + length, position + length, count - length
        return fragments


def assemble(index: TokenIndex, rows: Sequence[Sequence[Fragment]], seq_len: int) -> Batch:
    """Lays fragments into rows from the left; what is left free on the right is padding.

    Returns:
        `R` rows of `T` positions:
        tokens [R, T] int32, inputs;
        targets [R, T] int32, -1 where there is no loss (padding);
        segment_ids [R, T] int32, 0, 1, .. for the fragments of a row, -1 for padding;
        positions [R, T] int32, distance from the start of the fragment;
        offsets [R, T] int32, distance from the start of the document;
        starts [R, T] bool, whether the input is the boundary that begins a document;
        target_bytes [R] float32, UTF-8 bytes that the row's targets stand for: whole numbers, spread
            evenly over the targets of a document, whose sum over its fragments is exact (as long as a
            row holds less than 2**24 bytes).
    """
    counts = [len(row) for row in rows]
    document, offset, length = np.array(list(itertools.chain(*rows)), np.int64).reshape(-1, 3).T
    row = np.repeat(np.arange(len(rows)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)  # first fragment of the row
    begin = np.cumsum(length) - length
    size = index.offsets[document + 1] - index.offsets[document]

    # From here on an element is a position, and `number` is its fragment.
    number = np.repeat(np.arange(len(length)), length)
    position = np.arange(len(number)) - begin[number]
    in_document = position + offset[number]
    source = in_document + index.offsets[document][number]
    cell = position + (row * seq_len + begin - begin[first])[number]

    starts = in_document == 0
    tokens = index.tokens[np.maximum(source - 1, 0)].astype(np.int32)
    tokens[starts] = index.boundary
    targets = index.tokens[np.minimum(source, len(index.tokens) - 1)].astype(np.int32)
    targets[in_document == size[number]] = index.boundary

    def grid(values: np.ndarray, padding: int, dtype: type) -> np.ndarray:
        out = np.full(len(rows) * seq_len, padding, dtype)
        out[cell] = values
        return out.reshape(len(rows), seq_len)

    share = index.num_bytes[document]
    num_bytes = share * (offset + length) // (size + 1) - share * offset // (size + 1)
    return {
        "tokens": grid(tokens, index.boundary, np.int32),
        "targets": grid(targets, -1, np.int32),
        "segment_ids": grid((np.arange(len(row)) - first)[number], -1, np.int32),
        "positions": grid(position, 0, np.int32),
        "offsets": grid(in_document, 0, np.int32),
        "starts": grid(starts, False, np.bool_),
        "target_bytes": np.bincount(row, num_bytes, minlength=len(rows)).astype(np.float32),
    }


class Order:
    """Batches of `batch_size` rows of `seq_len` positions, by number."""

    def __init__(self, index: TokenIndex, batch_size: int, seq_len: int):
        if batch_size < 1 or seq_len < 1:
            raise UsageError(f"batch_size and seq_len must be at least 1, and are {batch_size} and {seq_len}")
        self.index, self.batch_size, self.seq_len = index, batch_size, seq_len

    def row(self, k: int, b: int) -> list[Fragment]:
        """What row `b` of batch `k` holds."""
        raise NotImplementedError

    def batch(self, k: int, rows: Iterable[int] | None = None) -> Batch:
        """The rows numbered `rows` (all if None), in that order, of batch `k`; see `assemble`."""
        rows = range(self.batch_size) if rows is None else rows
        return assemble(self.index, [self.row(k, int(b)) for b in rows], self.seq_len)


class Packed(Order):
    """Rows cut from one stream, an epoch's worth of them at a time dealt in a permuted order.

    Neighbouring rows often come from one document; the permutation keeps them out of one batch,
    whose gradient would otherwise know that document only. No position is padding, none is left
    out. A document may go on in another row, as a new segment.
    """

    def __init__(self, index: TokenIndex, batch_size: int, seq_len: int, seed: int):
        super().__init__(index, batch_size, seq_len)
        self._stream = DocumentStream(index.num_targets, (seed,))
        self.deck = max(1, self._stream.epoch_length // seq_len)  # rows permuted together
        self._dealt = functools.lru_cache(maxsize=2)(lambda n: permutation((seed, n, 1), self.deck))

    def row(self, k: int, b: int) -> list[Fragment]:
        deck, place = divmod(k * self.batch_size + b, self.deck)
        row = deck * self.deck + int(self._dealt(deck)[place])
        return self._stream.read(row * self.seq_len, self.seq_len)


class Stream(Order):
    """A stream for each row: row b of batch k + 1 goes on where row b of batch k ended.

    Raises:
        UsageError: fewer documents than rows.
    """

    def __init__(self, index: TokenIndex, batch_size: int, seq_len: int, seed: int):
        super().__init__(index, batch_size, seq_len)
        if len(index) < batch_size:
            raise UsageError(
                f"the order 'stream' needs a document for each row: batch_size is {batch_size}, and "
                f"{index.name} has {len(index)} documents; use the order 'packed' or a smaller batch_size"
            )
        lengths = index.num_targets
        self._streams = [
            DocumentStream(lengths[documents], (seed, b), documents)
            for b, documents in enumerate(deal(lengths, batch_size, seed))
        ]

    def row(self, k: int, b: int) -> list[Fragment]:
        return self._streams[b].read(k * self.seq_len, self.seq_len)


class Evaluation(Order):
    """The same rows at every evaluation of every run, each position at most once.

    Rows are shuffled once, whatever the seed of the run, so that the first batches are a fair sample.
    What the last batch lacks is padding: targets -1, segment ids -1, no target bytes.

    Args:
        batches: how many batches at most; None for the whole split. `len()` is how many there are.
    """

    def __init__(self, index: TokenIndex, batch_size: int, seq_len: int, batches: int | None = None):
        super().__init__(index, batch_size, seq_len)
        if batches is not None and batches < 1:
            raise UsageError(f"the number of evaluation batches must be at least 1, and is {batches}")
        whole = self._lay()
        self._batches = whole if batches is None else min(batches, whole)

    def _lay(self) -> int:
        """Decides what is in which row; returns the number of batches that hold all."""
        self._stream = DocumentStream(self.index.num_targets, (0,))
        self._rows = permutation((0,), -(-self._stream.epoch_length // self.seq_len))
        return -(-len(self._rows) // self.batch_size)

    def __len__(self) -> int:
        return self._batches

    @property
    def longest(self) -> int:
        """Positions of the longest document of the split."""
        return int(self.index.num_targets.max(initial=1))

    def row(self, k: int, b: int) -> list[Fragment]:
        place = k * self.batch_size + b
        if place >= len(self._rows):
            return []
        return _read_epoch(self._stream, int(self._rows[place]) * self.seq_len, self.seq_len)


class StreamedEvaluation(Evaluation):
    """As `Evaluation` with a stream for each row, as `Stream` has it: row b of batch k + 1 goes on.

    Every row of the first batch starts a document. Rows whose documents are at an end, or that never had
    one, are padding.
    """

    def _lay(self) -> int:
        lengths = self.index.num_targets
        self._streams = [
            DocumentStream(lengths[documents], (0, b), documents)
            for b, documents in enumerate(deal(lengths, self.batch_size, seed=0))
        ]
        return max(-(-stream.epoch_length // self.seq_len) for stream in self._streams)

    def row(self, k: int, b: int) -> list[Fragment]:
        return _read_epoch(self._streams[b], k * self.seq_len, self.seq_len)


def _read_epoch(stream: DocumentStream, begin: int, count: int) -> list[Fragment]:
    """As `stream.read`, up to the end of its first epoch."""
    return stream.read(begin, min(count, max(0, stream.epoch_length - begin)))


def deal(lengths: np.ndarray, lanes: int, seed: int) -> list[np.ndarray]:
    """Documents (ascending int64) of each lane: longest first, each to the lane with the least so far."""
    shuffled = permutation((seed,), len(lengths))  # decides between equal lengths
    load = [(0, lane) for lane in range(lanes)]
    dealt = np.empty(len(lengths), np.int64)
    for document in shuffled[np.argsort(-lengths[shuffled], kind="stable")].tolist():
        total, lane = load[0]
        dealt[document] = lane
        heapq.heapreplace(load, (total + int(lengths[document]), lane))
    return np.split(np.argsort(dealt, kind="stable"), np.cumsum(np.bincount(dealt, minlength=lanes))[:-1])


ORDERS = {"packed": Packed, "stream": Stream}
EVALUATIONS = {"packed": Evaluation, "stream": StreamedEvaluation}
"""How validation rows lie beside each training order."""


def make_order(name: str, index: TokenIndex, batch_size: int, seq_len: int, seed: int) -> Order:
    """The training order `"packed"` or `"stream"`.

    Args:
        batch_size: rows of the global batch.
        seq_len: positions of a row.
        seed: non-negative.

    Raises:
        UsageError: unknown name, a size below 1, a negative seed, or too few documents.
    """
    if name not in ORDERS:
        raise UsageError(f"there is no order {name!r}.{nearest(name, ORDERS)}")
    if seed < 0:
        raise UsageError(f"the seed of the data order must not be negative, and is {seed}")
    return ORDERS[name](index, batch_size, seq_len, seed)
