"""Tokenizers: bytes, a Hugging Face `tokenizers` file, a SentencePiece model.

Every tokenizer has one *boundary* id: the first input of a document and its last target.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from blockjax.errors import UsageError

END_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<|begin_of_text|>",
    "<s>",
    "<bos>",
)
"""What the end (or else the beginning) of a text is called in tokenizers that do not say which it is."""


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        name: short name, for people.
        vocab_size: number of ids, the boundary included.
        boundary: id that stands between documents; text that spells it does not encode to it.
        fingerprint: hex SHA-256; tokenizers with the same one give the same ids.
    """

    name: str
    vocab_size: int
    boundary: int
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, [n], uint16 where the vocabulary allows it, else uint32; no boundary."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, faster where the tokenizer has threads of its own."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, boundaries left out and malformed UTF-8 replaced."""
        ...


class Bytes:
    """UTF-8 bytes: ids 0 to 255, boundary 256."""

    name = "bytes"
    vocab_size = 257
    boundary = 256
    fingerprint = hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in np.asarray(ids).tolist() if i < 256).decode("utf-8", "replace")


class _FromFile:
    """What the tokenizers kept in a file share: a name, a fingerprint, and where the boundary goes."""

    def __init__(self, path: Path, size: int, boundary: int | None):
        self._size = size
        self.name = path.name
        self.boundary = size if boundary is None else boundary
        self.vocab_size = max(size, self.boundary + 1)
        self.fingerprint = hashlib.sha256(path.read_bytes() + b"%d" % self.boundary).hexdigest()
        self._dtype = id_dtype(self.vocab_size)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def _text_ids(self, ids: Iterable[int]) -> list[int]:
        return [i for i in np.asarray(ids).tolist() if i != self.boundary and i < self._size]


class HuggingFace(_FromFile):
    """A `tokenizer.json` of the `tokenizers` library."""

    def __init__(self, path: Path):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UsageError(f"{path} is not a Hugging Face tokenizers file: {error}") from error
        # A file may carry the lengths of one model, and text may spell a special token.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        special = {t.content: i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        names = (_declared_end(path), *END_TOKENS)
        boundary = next((special[n] for n in names if n in special), None)
        super().__init__(path, max(self._tokenizer.get_vocab().values()) + 1, boundary)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(e.ids, self._dtype) for e in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(self._text_ids(ids), skip_special_tokens=False)


class SentencePiece(_FromFile):
    """A SentencePiece `.model`."""

    def __init__(self, path: Path):
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UsageError(f"{path} is not a SentencePiece model: {error}") from error
        ends = (self._processor.eos_id(), self._processor.bos_id())
        super().__init__(path, len(self._processor), next((i for i in ends if i >= 0), None))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, self._dtype) for ids in self._processor.encode(list(texts), out_type=int)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode(self._text_ids(ids))


def open_tokenizer(name: str) -> Tokenizer:
    """`"bytes"`, a `tokenizer.json`, or a SentencePiece `.model`.

    The boundary of a file is its own end-of-text id (or else its beginning-of-text id), or a new id
    after its last one where it has neither.

    Raises:
        UsageError: there is no such file, or it is not of its kind.
    """
    if name == "bytes":
        return Bytes()
    path = Path(name).expanduser()
    kinds: dict[str, Any] = {".json": HuggingFace, ".model": SentencePiece}
    if path.suffix not in kinds:
        raise UsageError(
            f'there is no tokenizer {name!r}; it is "bytes", a Hugging Face file that ends in .json, '
            "or a SentencePiece file that ends in .model"
        )
    if not path.is_file():
        raise UsageError(f"there is no tokenizer file {path}")
    return kinds[path.suffix](path)


def id_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The narrower of uint16 and uint32 that holds every id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def _declared_end(path: Path) -> str | None:
    config = path.with_name("tokenizer_config.json")
    if not config.is_file():
        return None
    try:
        content = json.loads(config.read_text())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{config} is not JSON: {error}") from error
    token = content.get("eos_token") if isinstance(content, dict) else content
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str | None) or not isinstance(content, dict):
        raise UsageError(f"{config} is not a tokenizer's configuration: its eos_token is no text.")
    return token
