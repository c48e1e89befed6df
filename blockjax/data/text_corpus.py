"""The TFDS builder that turns a `Source` into array_record files. TensorFlow is never imported."""

import contextlib
import hashlib
import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from blockjax.data.files import locked, progress, slug
from blockjax.data.sources import Source
from blockjax.data.splits import assign_splits, hash_fraction
from blockjax.errors import UsageError

FRACTIONS = {"train": 0.90, "validation": 0.05, "test": 0.05}


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Keeps TFDS from logging, printing, and drawing progress bars of its own."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)


@dataclass(frozen=True)
class Plan:
    """What one pass over a source finds out before anything is written.

    Attributes:
        digest: hex SHA-256 over ids and texts, in order.
        assignment: [D] uint8, the split of each document, as a position in `FRACTIONS`.
    """

    digest: str
    assignment: np.ndarray

    @classmethod
    def of(cls, source: Source) -> "Plan":
        digest, hashes = hashlib.sha256(), []
        for name, text in source:
            data = text.encode()
            # The lengths mark where an id ends and a text ends.
            digest.update(f"{len(name)} {len(data)} {name}".encode())
            digest.update(data)
            hashes.append(hash_fraction(name))
        if not hashes:
            raise UsageError(
                f"the corpus {source.name} is empty: {len(source.files)} files and no text in them"
            )
        return cls(digest.hexdigest(), assign_splits(np.array(hashes), FRACTIONS))


@dataclass(kw_only=True)
class TextCorpusConfig(tfds.core.BuilderConfig):
    """One source; `advance` is called once a document written."""

    source: Source
    plan: Plan
    advance: Callable[[], None]


class TextCorpus(tfds.core.GeneratorBasedBuilder):
    """Documents as `{"id", "text"}`, in the order of the source, in the splits of the plan."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"id": tfds.features.Text(), "text": tfds.features.Text()}),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        plan = self.builder_config.plan
        self.info.metadata["digest"] = plan.digest
        present = set(plan.assignment.tolist())  # TFDS cannot write an empty split
        return {name: self._generate_examples(i) for i, name in enumerate(FRACTIONS) if i in present}

    def _generate_examples(self, split: int) -> Iterator[tuple[int, dict[str, str]]]:
        config = self.builder_config
        for key, (name, text) in enumerate(config.source):
            if config.plan.assignment[key] == split:
                config.advance()
                yield key, {"id": name, "text": text}


def prepared(source: Source, data_dir: Path, quiet: bool) -> tfds.core.DatasetBuilder:
    """The builder of `source`, whose files are written under `data_dir` unless they are there.

    The folder's name holds the source's signature, so changed files are prepared anew.

    Raises:
        UsageError: the source cannot be read or holds no text, or `data_dir` cannot be written.
    """
    name = f"{slug(source.name)}-{source.signature()[:16]}"
    path = data_dir / "text_corpus" / name / str(TextCorpus.VERSION)
    with quiet_tfds():
        if not _complete(path):
            with locked(path.parent):
                if not _complete(path):  # another process may have been first
                    shutil.rmtree(path.parent, ignore_errors=True)  # also what a crash left half written
                    _prepare(source, name, data_dir, quiet)
        return tfds.builder_from_directory(path)


def _prepare(source: Source, name: str, data_dir: Path, quiet: bool) -> None:
    plan = Plan.of(source)
    with progress(f"corpus {source.name}", len(plan.assignment), quiet) as advance:
        config = TextCorpusConfig(name=name, source=source, plan=plan, advance=advance)
        TextCorpus(data_dir=data_dir, config=config, file_format="array_record").download_and_prepare()


def _complete(path: Path) -> bool:
    if not (path / "dataset_info.json").is_file():
        return False
    splits = tfds.builder_from_directory(path).info.splits.values()
    return all(file.exists() for split in splits for file in split.filepaths)
