"""Where documents come from: the standard library, or files the user names."""

import glob
import gzip
import hashlib
import itertools
import json
import os
import stat
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blockjax.errors import UsageError

SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".jsonl.gz", ".parquet")
"""What a folder is searched for. A file named directly may have any suffix; an unknown one is plain text."""

MIN_DOCUMENTS = 3
"""One for each of train, validation and test; with fewer, documents are cut into pieces."""

MAX_PIECE = 64 * 1024
"""Characters in a piece of a document that is cut."""

# Tests repeat their text many times over; the others hold no source of the library itself, or (the
# build configuration) paths of one machine.
STDLIB_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "lib-dynload",
}
STDLIB_LEFT_OUT_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "config-", "sitecustomize")


@dataclass(frozen=True)
class Source:
    """Text files in a fixed order; iterating reads them anew as `(id, text)`, empty documents left out.

    A text file is one document, a line of JSONL or a row of Parquet is one document. A source with
    fewer than `MIN_DOCUMENTS` documents (one large text file, say) is cut at line breaks into about
    20 pieces, or into more of at most `MAX_PIECE` characters, so that it still has three splits.

    Attributes:
        name: short name, for people and for paths.
        files: `(id, path)`, sorted by id; the id does not change when the whole is moved elsewhere.
        text_field: field of a JSONL line, or column of a Parquet file, that holds the text.
        strict: whether a text file that is not UTF-8 is an error; else it is left out.
    """

    name: str
    files: tuple[tuple[str, Path], ...]
    text_field: str = "text"
    strict: bool = True

    def signature(self) -> str:
        """Hex digest that changes when a file is added, removed or written to; reads no contents."""
        parts = [self.text_field]
        for name, path in self.files:
            found = path.stat()
            parts.append(f"{name}\0{found.st_size}\0{found.st_mtime_ns}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def __iter__(self) -> Iterator[tuple[str, str]]:
        first = list(itertools.islice(self._read(), MIN_DOCUMENTS))
        return iter(_cut(first)) if len(first) < MIN_DOCUMENTS else self._read()

    def _read(self) -> Iterator[tuple[str, str]]:
        for name, path in self.files:
            try:
                if path.name.endswith((".jsonl", ".jsonl.gz")):
                    yield from _read_jsonl(name, path, self.text_field)
                elif path.suffix == ".parquet":
                    yield from _read_parquet(name, path, self.text_field)
                else:
                    yield from _read_text(name, path, self.strict)
            except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged .gz
                raise UsageError(
                    f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
                ) from error


def stdlib_source() -> Source:
    """The Python standard library's own source files, without tests and installed packages.

    Raises:
        UsageError: the interpreter carries no readable source files (a zipped or frozen library).
    """
    root = Path(sysconfig.get_path("stdlib"))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if not (root / "os.py").is_file():
        raise UsageError(
            f"this Python {version} carries no standard library source files ({root} has no os.py); "
            "name a corpus of your own: a text file, JSONL, Parquet, a glob or a folder"
        )
    files = [
        (name, path)
        for name, path in _walk(root, STDLIB_LEFT_OUT)
        if name.endswith(".py") and not any(p.startswith(STDLIB_LEFT_OUT_PREFIXES) for p in name.split("/"))
    ]
    return Source(f"stdlib-{version}", tuple(files), strict=False)


def file_source(pattern: str, text_field: str = "text") -> Source:
    """The files behind a path, a folder (searched recursively for `SUFFIXES`) or a glob (`**` allowed).

    Raises:
        UsageError: nothing is there, or it cannot be reached.
    """
    path = Path(os.path.expanduser(pattern))  # which leaves the name of an unknown user as it is
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = 0
    except (OSError, ValueError) as error:  # a name too long, a folder that may not be read, a NUL
        raise UsageError(f"{path} cannot be reached: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(mode):
        files = [(name, file) for name, file in _walk(path, set()) if name.endswith(SUFFIXES)]
        if not files:
            raise UsageError(f"the folder {path} holds no file that ends in {', '.join(SUFFIXES)}")
        return Source(path.resolve().name, tuple(files), text_field)
    if stat.S_ISREG(mode):
        return Source(path.name, ((path.name, path),), text_field)
    if not glob.has_magic(pattern):
        raise UsageError(
            f'there is no file or folder {path}; a corpus is "stdlib", "tfds:name", a file, folder or glob'
        )
    found = [Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p)]
    if not found:
        raise UsageError(f"no file matches {pattern}")
    root = Path(os.path.commonpath([p.parent for p in found]))
    files = sorted((_relative(p, root), p) for p in found)
    return Source(root.resolve().name, tuple(files), text_field)


def _walk(root: Path, left_out: set[str]) -> list[tuple[str, Path]]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in left_out and not f.startswith(".")]
        paths = [Path(folder, n) for n in names if not n.startswith(".")]
        found += [(_relative(p, root), p) for p in paths if p.is_file()]  # not so: a link that leads nowhere
    return sorted(found)


def _relative(path: Path, root: Path) -> str:
    # A file name need not be UTF-8; an id has to be.
    return os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "replace")


def _read_text(name: str, path: Path, strict: bool) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if strict:
            raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error
        return
    if text:
        yield name, text


def _read_jsonl(name: str, path: Path, field: str) -> Iterator[tuple[str, str]]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{path} line {number} is not JSON: {error}") from error
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                has = f"fields {', '.join(record)}" if isinstance(record, dict) else type(record).__name__
                raise UsageError(
                    f"{path} line {number} has no text field {field!r} (it has {has}); set text_field"
                )
            # JSON can spell half of a surrogate pair, which no UTF-8 text can hold.
            if text := record[field].encode("utf-8", "replace").decode():
                yield f"{name}:{number}", text


def _read_parquet(name: str, path: Path, column: str) -> Iterator[tuple[str, str]]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UsageError(f"{path} is not a Parquet file: {error}") from error
    schema = file.schema_arrow
    if column not in schema.names:
        raise UsageError(
            f"{path} has no column {column!r} (it has {', '.join(schema.names)}); set text_field"
        )
    kind = schema.field(column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UsageError(f"{path} column {column!r} holds {kind}, not text; set text_field")
    rows = itertools.chain.from_iterable(
        b[column].to_pylist() for b in file.iter_batches(1024, columns=[column])
    )
    for number, text in enumerate(rows):
        if text:
            yield f"{name}:{number}", text


def _cut(documents: list[tuple[str, str]]) -> list[tuple[str, str]]:
    size = max(1, min(MAX_PIECE, sum(len(text) for _, text in documents) // 20))
    pieces = []
    for name, text in documents:
        begin = number = 0
        while begin < len(text):
            end = begin + size
            if end < len(text):
                end = text.rfind("\n", begin, end) + 1 or end
            pieces.append((f"{name}#{number}", text[begin:end]))
            begin, number = end, number + 1
    return pieces
