"""The token index: every document of a split, tokenised once and memory-mapped."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blockjax.data.corpus import Corpus, Documents
from blockjax.data.files import locked, progress, replacing, slug
from blockjax.data.tokenizers import Tokenizer, id_dtype
from blockjax.errors import UsageError

FORMAT = 1  # raise it when what is stored changes, and old indexes are built anew
BATCH = 64  # documents given to the tokenizer at a time


@dataclass(frozen=True)
class TokenIndex:
    """Tokens of `D` documents, end to end. A document of n tokens has n + 1 targets (see `orders`).

    Attributes:
        name: corpus, tokenizer and split, for people.
        tokens: [sum of n] uint16 or uint32, memory-mapped.
        offsets: [D + 1] int64; document d is `tokens[offsets[d] : offsets[d + 1]]`.
        num_bytes: [D] int64, UTF-8 bytes of each document's text.
        boundary: the tokenizer's boundary id.
    """

    name: str
    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: np.ndarray
    boundary: int

    def __len__(self) -> int:
        return len(self.num_bytes)

    @property
    def num_targets(self) -> np.ndarray:
        """[D] int64, targets of each document."""
        return np.diff(self.offsets) + 1


def token_index(
    corpus: Corpus, tokenizer: Tokenizer, split: str, data_dir: str | Path, *, quiet: bool = False
) -> TokenIndex:
    """The index of one split, built under `data_dir` the first time or when it is damaged.

    Documents that hold no tokens are left out.

    Raises:
        UsageError: there is no such split, it holds no tokens, or `data_dir` cannot be written.
    """
    documents = corpus.documents(split)
    name = f"{corpus.name} {tokenizer.name} {split}"
    meta = {"format": FORMAT, "corpus": corpus.digest, "split": split, "tokenizer": tokenizer.fingerprint}
    key = f"{slug(corpus.name)}-{corpus.digest[:16]}-{tokenizer.fingerprint[:16]}-{split}"
    path = Path(data_dir).expanduser() / "token_index" / key
    index = _read(path, name, meta, tokenizer)
    if index is None:
        with locked(path):
            if _read(path, name, meta, tokenizer) is None:  # another process may have been first
                with replacing(path) as folder, progress(f"tokens {name}", len(documents), quiet) as advance:
                    _write(folder, documents, tokenizer, advance)
                    (folder / "meta.json").write_text(json.dumps(meta))
        index = _read(path, name, meta, tokenizer)
    if index is None:
        raise UsageError(
            f"split {split!r} of corpus {corpus.name} holds no tokens ({len(documents)} documents)"
        )
    return index


def _write(folder: Path, documents: Documents, tokenizer: Tokenizer, advance: Callable[[], None]) -> None:
    dtype = id_dtype(tokenizer.vocab_size)
    lengths, num_bytes = [], []
    with (folder / "tokens.bin").open("wb") as file:
        for batch in itertools.batched(documents, BATCH):
            texts = [text for _, text in batch]
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                advance()
                if len(ids):
                    ids.astype(dtype).tofile(file)
                    lengths.append(len(ids))
                    num_bytes.append(len(text.encode()))
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
    np.save(folder / "num_bytes.npy", np.array(num_bytes, np.int64))


def _read(path: Path, name: str, meta: dict, tokenizer: Tokenizer) -> TokenIndex | None:
    """The index at `path`, or None where it is missing, damaged, of another `meta`, or holds nothing."""
    try:
        found = json.loads((path / "meta.json").read_text())
        offsets = np.load(path / "offsets.npy")
        num_bytes = np.load(path / "num_bytes.npy")
        tokens = np.memmap(path / "tokens.bin", id_dtype(tokenizer.vocab_size), mode="r")
    except (OSError, ValueError, EOFError):
        return None
    if found != meta or len(offsets) != len(num_bytes) + 1 or offsets[-1] != len(tokens):
        return None
    # A plain view of the map: indexing np.memmap itself costs several microseconds a call.
    return TokenIndex(name, np.asarray(tokens), offsets, num_bytes, tokenizer.boundary)
