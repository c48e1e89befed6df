import json

import numpy as np
import pytest
import sentencepiece
import tokenizers

from blockjax.data import open_tokenizer
from blockjax.errors import UsageError

TEXT = "def f(x):\n    return x + 1  # größer\n"
LINES = [f"def function_{i}(x): return x + {i}" for i in range(200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`own.json` has an end of its own, `plain.json` has none; `plain.model` likewise."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, special in [("own", ["<pad>", "<|endoftext|>"]), ("plain", [])]:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(LINES, trainer)
        tokenizer.enable_truncation(5)
        tokenizer.enable_padding(length=64)
        tokenizer.save(str(folder / f"{name}.json"))
    for name, ends in [("own", {}), ("plain", {"bos_id": -1, "eos_id": -1})]:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES),
            model_prefix=str(folder / name),
            vocab_size=330,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            minloglevel=2,
            **ends,
        )
    return folder


@pytest.mark.parametrize("name", ["bytes", "own.json", "plain.json", "own.model", "plain.model"])
def test_text_comes_back(folder, name):
    tokenizer = open_tokenizer(name if name == "bytes" else str(folder / name))
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.uint16 and ids.ndim == 1 and len(ids) > 5
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode([tokenizer.boundary, *ids.tolist(), tokenizer.boundary]) == TEXT
    assert ids.max() < tokenizer.vocab_size and 0 <= tokenizer.boundary < tokenizer.vocab_size
    assert tokenizer.boundary not in ids
    batch = tokenizer.encode_batch([TEXT, "", "x"])
    assert np.array_equal(batch[0], ids) and len(batch[1]) == 0
    assert tokenizer.name == name


def test_bytes():
    tokenizer = open_tokenizer("bytes")
    assert tokenizer.encode("aß").tolist() == [97, 0xC3, 0x9F]
    assert (tokenizer.vocab_size, tokenizer.boundary) == (257, 256)
    assert tokenizer.decode([0xC3, 97]) == "\ufffda"


def test_the_boundary_is_the_tokenizers_own_end_or_a_new_id(folder):
    own, plain = open_tokenizer(str(folder / "own.json")), open_tokenizer(str(folder / "plain.json"))
    assert (own.boundary, own.vocab_size) == (1, 300)
    assert (plain.boundary, plain.vocab_size) == (300, 301)
    own, plain = open_tokenizer(str(folder / "own.model")), open_tokenizer(str(folder / "plain.model"))
    assert (own.boundary, own.vocab_size) == (2, 330)
    assert (plain.boundary, plain.vocab_size) == (330, 331)


def test_the_end_that_the_configuration_names(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "own.json").read_bytes())
    for token in ("<pad>", {"content": "<pad>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        assert open_tokenizer(str(tmp_path / "tokenizer.json")).boundary == 0


@pytest.mark.parametrize("name, end", [("own.json", "<|endoftext|>"), ("own.model", "</s>")])
def test_text_that_spells_the_boundary_is_only_text(folder, name, end):
    tokenizer = open_tokenizer(str(folder / name))
    ids = tokenizer.encode(f"a{end}b")
    assert tokenizer.boundary not in ids and tokenizer.decode(ids) == f"a{end}b"


def test_fingerprints_tell_tokenizers_apart(folder):
    names = ["bytes", *(str(folder / n) for n in ("own.json", "plain.json", "own.model", "plain.model"))]
    prints = [open_tokenizer(n).fingerprint for n in names]
    assert len(set(prints)) == 5
    assert prints == [open_tokenizer(n).fingerprint for n in names]


def test_mistakes_get_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="no tokenizer 'byte'; it is \"bytes\", a Hugging Face file"):
        open_tokenizer("byte")
    with pytest.raises(UsageError, match=r"no tokenizer file .*x\.json"):
        open_tokenizer(str(tmp_path / "x.json"))
    for name, message in [("x.json", "not a Hugging Face"), ("x.model", "not a SentencePiece")]:
        (tmp_path / name).write_text("nonsense")
        with pytest.raises(UsageError, match=message) as error:
            open_tokenizer(str(tmp_path / name))
        assert "\n" not in str(error.value)
