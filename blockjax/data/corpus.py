"""A corpus: named splits of documents with random access, and a digest of what they hold."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blockjax.data.sources import file_source, stdlib_source
from blockjax.errors import UsageError

READ_AHEAD = 256  # records asked of array_record at a time


class Documents(Sequence):
    """The documents of one split as `(id, text)`, read from array_record on access.

    Args:
        records: a TFDS data source of dicts.
        text: the feature that holds the text.
        name: prefix of ids where the records carry none.
        rows: the records that belong to the split, int64; None for all.
    """

    def __init__(self, records: Sequence[dict], text: str, name: str, rows: np.ndarray | None = None):
        self._records, self._text, self._name = records, text, name
        self._rows = np.arange(len(records)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> tuple[str, str]:
        row = int(self._rows[i])
        return self._document(row, self._records[row])

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for begin in range(0, len(self), READ_AHEAD):
            rows = self._rows[begin : begin + READ_AHEAD].tolist()
            yield from map(self._document, rows, self._records.__getitems__(rows))

    def _document(self, row: int, record: dict) -> tuple[str, str]:
        name = record["id"].decode() if "id" in record else f"{self._name}:{row}"
        return name, record[self._text].decode("utf-8", "replace")


@dataclass(frozen=True)
class Corpus:
    """Text in splits.

    Attributes:
        name: short name, for people.
        digest: hex SHA-256; corpora with the same digest hold the same documents.
        splits: documents by split name.
    """

    name: str
    digest: str
    splits: Mapping[str, Documents]

    def documents(self, split: str) -> Documents:
        """The documents of `split`.

        Raises:
            UsageError: there is no such split.
        """
        if split not in self.splits:
            sizes = ", ".join(f"{name} ({len(d)} documents)" for name, d in self.splits.items())
            raise UsageError(f"corpus {self.name} has no split {split!r}; it has {sizes}")
        return self.splits[split]


def open_corpus(
    source: str, data_dir: str | Path, *, text_field: str = "text", quiet: bool = False
) -> Corpus:
    """Opens a corpus, preparing it under `data_dir` the first time.

    Args:
        source: `"stdlib"`; a text, `.jsonl`, `.jsonl.gz` or `.parquet` file, a folder or a glob of them;
            or `"tfds:name[/config][:feature]"`, a TFDS dataset already prepared as array_record under
            `data_dir` or TFDS's own folder, which is read where it lies. Files are split 90/5/5 into
            train, validation and test by a hash of the document's id, and a source of one or two
            documents is cut into pieces first (see `Source`). A TFDS dataset keeps its splits;
            validation and test, where missing, are 5 % of train each, by a hash.
        data_dir: local folder for prepared data; processes that start at once may share it.
        text_field: field of JSONL, column of Parquet or feature of TFDS that holds the text.
        quiet: no progress on stderr.

    Raises:
        UsageError: the source is missing, empty, or not what it is said to be.
    """
    data_dir = Path(data_dir).expanduser()
    if source.startswith("tfds:"):
        from blockjax.data.tfds_source import open_tfds

        name, digest, splits = open_tfds(source.removeprefix("tfds:"), data_dir, text_field)
        return Corpus(name, digest, {s: Documents(*where) for s, where in splits.items()})

    from blockjax.data.text_corpus import prepared

    files = stdlib_source() if source == "stdlib" else file_source(source, text_field)
    builder = prepared(files, data_dir, quiet)
    splits = {s: Documents(builder.as_data_source(s), "text", s) for s in builder.info.splits}
    return Corpus(files.name, builder.info.metadata["digest"], splits)
