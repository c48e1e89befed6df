"""TFDS datasets that are already prepared as array_record, read where they lie."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from blockjax.data.splits import assign_splits, hash_fraction
from blockjax.data.text_corpus import quiet_tfds
from blockjax.errors import UsageError, nearest

HELD_OUT = 0.05  # part of train for each of validation and test that the dataset lacks

Where = tuple[Sequence[dict], str, str, np.ndarray | None]
"""Records, feature that holds the text, name of the split they come from, rows (None for all)."""


def open_tfds(spec: str, data_dir: Path, text_field: str) -> tuple[str, str, dict[str, Where]]:
    """Finds `name[/config][:feature]` under `data_dir` or TFDS's own folder.

    The digest covers the dataset's description and the sizes of its files, not their contents.

    Returns:
        name, digest, and where the documents of each split are.

    Raises:
        UsageError: not prepared, not as array_record, without a train split, or without that text.
    """
    name, _, feature = spec.partition(":")
    with quiet_tfds():
        path = _find(name, [data_dir, Path(tfds.core.constants.DATA_DIR).expanduser()])
        builder = tfds.builder_from_directory(path)
        info = builder.info
        if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise UsageError(
                f"the TFDS dataset {info.full_name} is prepared as {info.file_format.value}, which needs "
                "TensorFlow to read; prepare it with file_format=array_record"
            )
        feature = _text_feature(info, feature, text_field)
        splits = {s: (builder.as_data_source(s), feature, s, None) for s in info.splits}

    if "train" not in splits:
        raise UsageError(f"the TFDS dataset {info.full_name} has no train split; it has {', '.join(splits)}")
    digest = hashlib.sha256(f"{info.full_name}:{feature}".encode())
    for file in sorted(path.iterdir()):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return info.full_name, digest.hexdigest(), _carve(splits)


def _carve(splits: dict[str, Where]) -> dict[str, Where]:
    """Takes validation and test, where missing, out of train."""
    missing = [s for s in ("validation", "test") if s not in splits]
    if not missing:
        return splits
    fractions = {"train": 1 - HELD_OUT * len(missing)} | dict.fromkeys(missing, HELD_OUT)
    records, feature, name, _ = splits["train"]
    hashes = np.array([hash_fraction(f"{name}:{row}") for row in range(len(records))])
    assignment = assign_splits(hashes, fractions)
    carved = {s: np.flatnonzero(assignment == i) for i, s in enumerate(fractions)}
    return splits | {s: (records, feature, name, rows) for s, rows in carved.items() if len(rows)}


def _find(name: str, roots: list[Path]) -> Path:
    """The folder of the newest version of the dataset."""
    prepared = {}
    for root in roots:
        for file in sorted(root.glob("*/*/dataset_info.json")) + sorted(root.glob("*/*/*/dataset_info.json")):
            version = file.parent
            if tfds.core.Version.is_valid(version.name):
                found = version.parent.relative_to(root).as_posix()
                prepared.setdefault(found, []).append((tfds.core.Version(version.name), version))
    if name in prepared:
        return max(prepared[name])[1]
    configs = [p for p in prepared if p.startswith(f"{name}/")]
    if len(configs) == 1:
        return max(prepared[configs[0]])[1]
    places = " or ".join(str(root) for root in roots)
    if configs:
        raise UsageError(
            f"the TFDS dataset {name} has several configurations: {', '.join(configs)}; name one"
        )
    raise UsageError(
        f"the TFDS dataset {name!r} is not prepared under {places}; prepare it with file_format=array_record."
        + (nearest(name, prepared) if prepared else "")
    )


def _text_feature(info: tfds.core.DatasetInfo, named: str, text_field: str) -> str:
    texts = [name for name, kind in info.features.items() if isinstance(kind, tfds.features.Text)]
    # "text" is only the default's name: a dataset with one text feature needs no other.
    alone = not named and text_field == "text" and len(texts) == 1
    wanted = texts[0] if alone else named or text_field
    if wanted not in texts:
        raise UsageError(
            f"the TFDS dataset {info.full_name} has no text feature {wanted!r}; "
            f"its text features are {', '.join(texts) or 'none'}; name one as tfds:name:feature"
        )
    return wanted
