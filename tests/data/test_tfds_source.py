import numpy as np
import pytest
import tensorflow_datasets as tfds

from blockjax.data import open_corpus
from blockjax.data.text_corpus import quiet_tfds
from blockjax.errors import UsageError


class Stories(tfds.core.GeneratorBasedBuilder):
    """A dataset of somebody else's, with a test split and no validation."""

    VERSION = tfds.core.Version("2.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("long", "short")]  # noqa: RUF012

    def _info(self):
        text, number = tfds.features.Text(), tfds.features.Scalar(np.int64)
        features = {"title": text, "story": text, "year": number}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(60), "test": self._generate_examples(4)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"title": f"title {i}", "story": f"story {i} é", "year": i}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    with quiet_tfds():
        Stories(data_dir=folder, config="long", file_format="array_record").download_and_prepare()
    return folder


def test_splits_are_kept_and_the_missing_one_is_carved_from_train(data_dir):
    corpus = open_corpus("tfds:stories/long:story", data_dir)
    splits = {split: [text for _, text in documents] for split, documents in corpus.splits.items()}
    assert sorted(splits["test"]) == [f"story {i} é" for i in range(4)]
    assert sorted(splits["train"] + splits["validation"]) == sorted(f"story {i} é" for i in range(60))
    assert 1 <= len(splits["validation"]) <= 12
    assert corpus.name == "stories/long/2.0.0"
    again = open_corpus("tfds:stories:story", data_dir)  # the only configuration need not be named
    assert again.digest == corpus.digest
    assert list(again.documents("train")) == list(corpus.documents("train"))
    assert open_corpus("tfds:stories:title", data_dir).digest != corpus.digest
    assert not (data_dir / "text_corpus").exists()


def test_mistakes_get_one_sentence(data_dir, tmp_path):
    with pytest.raises(UsageError, match=r"Did you mean .stories/long"):
        open_corpus("tfds:storys/long", data_dir)
    with pytest.raises(
        UsageError, match=r"no text feature 'text'; its text features are .*story.* name one as"
    ):
        open_corpus("tfds:stories", data_dir)
    with pytest.raises(UsageError, match="no text feature 'year'"):
        open_corpus("tfds:stories:year", data_dir)
    for name in ("long", "short"):
        with quiet_tfds():
            Stories(data_dir=tmp_path, config=name, file_format="array_record").download_and_prepare()
    with pytest.raises(UsageError, match="several configurations: stories/long, stories/short; name one"):
        open_corpus("tfds:stories:story", tmp_path)


def test_another_file_format_is_refused(data_dir, tmp_path):
    target = tmp_path / "stories" / "long" / "2.0.0"
    target.mkdir(parents=True)
    for file in (data_dir / "stories" / "long" / "2.0.0").iterdir():
        data = file.read_bytes()
        if file.name == "dataset_info.json":
            data = data.replace(b"array_record", b"tfrecord")
        (target / file.name.replace("array_record", "tfrecord")).write_bytes(data)
    with pytest.raises(
        UsageError, match=r"is prepared as tfrecord, .* prepare it with file_format=array_record"
    ):
        open_corpus("tfds:stories:story", tmp_path)
