"""Random input: accepted, or refused in a readable sentence before anything is compiled.

What a search found stays as a case of its own.
"""

import datetime
import gzip
import json
import math
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from blockjax.data import open_corpus, open_tokenizer, token_index
from blockjax.data.tokenizers import Bytes
from blockjax.errors import UsageError
from blockjax.masks import BlockMask
from blockjax.train import config as configs
from blockjax.train import loop
from blockjax.train.config import base_config, check, check_mesh, flatten
from blockjax.train.folder import RunFolder, check_identity
from blockjax.train.optimizer import make_schedule

MOST_IN_A_SAMPLE = 150
LONGEST = 30  # seconds for one case: else it hangs


def search(count: int, *strategies, longest: float = LONGEST):
    """Runs a property on so many random cases, each within `longest` seconds."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    options = settings(
        max_examples=count,
        derandomize=count <= MOST_IN_A_SAMPLE,  # `make test` is the same every time
        deadline=datetime.timedelta(seconds=longest),
        database=None,
        suppress_health_check=quiet,
    )
    return lambda function: options(given(*strategies)(function))()


def sizes(sample: int, long: int):
    """Parametrises a test with the number of cases: few in `make test`, many in `make test-reliability`."""
    marked = pytest.param(long, marks=pytest.mark.reliability)
    return pytest.mark.parametrize("count", [sample, marked])


def attempt(call, *args, **kwargs):
    """What a call returns; None if it refuses, in a sentence that a person can read. Else it fails."""
    try:
        return call(*args, **kwargs)
    except UsageError as error:
        text = str(error)
        assert 10 < len(text) < 5000 and any(word.isalpha() for word in text.split()), text
        return None


@pytest.fixture(autouse=True)
def nothing_compiled(request, monkeypatch):
    if "really_run" not in request.node.name:
        monkeypatch.setattr(loop, "compile_step", lambda *_: pytest.fail("the training step was compiled"))


# Configs.

SMALL = st.integers(-2, 70)
NUMBERS = st.one_of(SMALL, st.sampled_from([2**20, 2**31 - 1, 2**31, 2**63, -(2**63), 10**30]))
FLOATS = st.one_of(st.floats(-1, 2), st.sampled_from([math.nan, math.inf, -math.inf, 1e-300, 1e300, -0.0]))
PIECES = [
    "beta",
    "constant",
    "full",
    "8",
    "512*3",
    ",",
    ":",
    "size=2",
    "heads=4",
    "mode=segment",
    "=",
    "*",
    "-1",
]
PIECES += ["block_attn_res", "attn_res", "delta", "delta_block", "prenorm", "muon", "adamw", "cosine", "none"]
PIECES += [
    "packed",
    "stream",
    "float32",
    "bfloat16",
    "scan",
    "unroll",
    "zigzag",
    "ring",
    "auto",
    "é",
    " ",
    "\n",
    "\0",
]
WORDS = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=5),
    st.just({}),
    st.just([1]),
    st.binary(max_size=2),
    st.just(1j),
)
KINDS = {
    bool: st.booleans(),
    int: NUMBERS,
    float: st.one_of(FLOATS, SMALL),
    str: st.one_of(WORDS, st.text(max_size=12)),
}
DEFAULTS = flatten(base_config())


@st.composite
def random_configs(draw) -> ConfigDict:
    """The base config with some keys set, most of them to values of their type."""
    config = base_config().to_dict()
    if draw(st.booleans()):
        config["model"] |= dict(depth=2, width=16, heads=2, kv_heads=2, head_dim=8, ffn=32)
    for key in draw(st.lists(st.sampled_from(sorted(DEFAULTS)), min_size=1, max_size=4, unique=True)):
        value = draw(st.one_of(*(3 * [KINDS[type(DEFAULTS[key])]]), ODD))
        *sections, name = key.split(".")
        (config[sections[0]] if sections else config)[name] = value
    if draw(st.integers(0, 9)) == 0:
        config[draw(st.text(max_size=4)).replace(".", "_")] = draw(ODD)
    return ConfigDict(config)


def examine_config(config: ConfigDict) -> bool:
    model = attempt(check, config)
    if model is None:
        return False
    for devices in (dict(data=1), dict(fsdp=2, tensor=2), dict(seq=4)):
        attempt(
            check_mesh, config, types.SimpleNamespace(shape=dict(data=1, fsdp=1, seq=1, tensor=1) | devices)
        )
    assert 0 <= float(make_schedule(config.optimizer, config.run.steps)(0)) <= 1
    assert model.num_params() > 0 and len(model.layers()) == model.depth
    return True


@sizes(80, 4000)
def test_configs(count):
    accepted = []
    search(count, random_configs())(lambda config: accepted.append(examine_config(config)))
    assert 0.05 < np.mean(accepted) < 0.95


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, FLOATS, st.text(max_size=6)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@st.composite
def random_records(draw) -> bytes:
    """What may lie in a run.json: other JSON, a record in which something is different, or no JSON at all."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.binary(max_size=40))
    record = dict(config=base_config().to_dict(), tokenizer=dict(name="bytes"), corpus=dict(name="x"))
    for _ in range(draw(st.integers(1, 3))):
        place = record
        while isinstance(place, dict) and place:
            key = draw(st.sampled_from(sorted(place)))
            if draw(st.integers(0, 2)) == 0 or not isinstance(place[key], dict):
                place[key] = draw(JSON)
                break
            place = place[key]
    return json.dumps(draw(JSON) if draw(st.integers(0, 5)) == 0 else record).encode()


def examine_record(content: bytes, folder: pathlib.Path) -> None:
    (folder / "run.json").write_bytes(content)

    def read():
        record = RunFolder(str(folder), create=False).read_record()
        config = configs.complete(record["config"])
        check(config)
        check_identity(record, record | {"config": base_config().to_dict()}, "runs/a")
        return config

    attempt(read)
    assert [p.name for p in folder.iterdir()] == ["run.json"]


@sizes(60, 2000)
def test_records_of_others(count, tmp_path):
    search(count, random_records())(lambda content: examine_record(content, tmp_path))


# Masks.

LENGTHS = st.one_of(*3 * [st.integers(1, 40)], st.sampled_from([-1, 0, True, 3.0, None, "8", 2**40]))
BLOCKS = st.one_of(*7 * [st.integers(1, 9)], st.sampled_from([-1, 0, 2.5, None, "4"]))


@st.composite
def random_masks(draw):
    """A call that makes a mask."""
    geometry = dict(bq=draw(BLOCKS), bk=draw(BLOCKS))
    kind = draw(st.sampled_from(("causal", "full", "window", "chunked", "bool", "indices", "both")))
    T, S = draw(LENGTHS), draw(st.one_of(st.none(), LENGTHS))
    reach = st.one_of(*3 * [st.integers(0, 50)], st.sampled_from([-1, None, 1.5, "3", math.nan]))
    if kind == "window":
        left, right = draw(reach), draw(reach)
        return lambda: BlockMask.window(T, S, left=left, right=right, **geometry)
    if kind == "chunked":
        size = draw(reach)
        return lambda: BlockMask.chunked(T, S, size=size, **geometry)
    if kind in ("bool", "indices"):
        shape = draw(st.lists(st.integers(0, 4), min_size=0, max_size=5))
        numbers = np.random.default_rng(draw(st.integers(0, 2**20))).integers(-1, 5, shape)
        if kind == "bool":
            return lambda: BlockMask.from_block_bool(numbers > 1, T, S, **geometry)
        numbers = np.sort(numbers, -1) if shape and draw(st.booleans()) else numbers
        return lambda: BlockMask.from_indices(numbers, T=T, S=S, **geometry)
    if kind == "both":
        other = dict(bq=draw(BLOCKS), bk=draw(BLOCKS)) if draw(st.booleans()) else geometry
        return lambda: BlockMask.causal(T, S, **geometry) & BlockMask.full(T, S, **other)
    return lambda: getattr(BlockMask, kind)(T, S, **geometry)


def examine_mask(make) -> bool:
    mask = attempt(make)
    if mask is None:
        return False
    assert 0 <= mask.density() <= 1
    assert 0 <= mask.visible_pairs() <= mask.executed_pairs() + 1e-6
    assert "density" in repr(mask)
    return True


@sizes(150, 2500)
def test_masks(count):
    accepted = []
    search(count, random_masks())(lambda make: accepted.append(examine_mask(make)))
    assert 0.05 < np.mean(accepted) < 0.95


# Corpora.

TEXT = st.text(max_size=30)


def as_jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


LINE = st.one_of(
    TEXT.map(lambda t: json.dumps({"text": t})), JSON.map(json.dumps), TEXT, st.just('{"text": "\\ud800"}')
)
LINES = st.lists(LINE, max_size=6).map("\n".join)
TEXTS = (".txt", ".md", "e")
JSONL = st.one_of(
    *2 * [st.lists(TEXT, max_size=6).map(as_jsonl)], LINES.map(str.encode), st.binary(max_size=40)
)
CONTENT = st.one_of(LINES.map(lambda t: t.encode("utf-8", "surrogatepass")), st.binary(max_size=40))
NAME = st.sampled_from(
    ["a.txt", "b.jsonl", "c.jsonl.gz", "d.parquet", "e", ".hidden.txt", "f g.md", "sub/h.txt"]
)
SOURCES = [
    "",
    ".",
    "*",
    "**/*",
    "*.jsonl",
    "a.txt",
    "b.jsonl",
    "c.jsonl.gz",
    "d.parquet",
    "[",
    "\0",
    "~nobody/x",
]
SOURCES += ["../../etc/passwd-of-nobody", "tfds:", "tfds:../x", "tfds:a/b/c:d", "tfds:\0", "x" * 300]


@st.composite
def random_corpora(draw):
    files = {
        name: draw(CONTENT if name.endswith(TEXTS) else JSONL) for name in draw(st.sets(NAME, max_size=3))
    }
    packed = draw(st.booleans())
    files = {n: gzip.compress(c) if n.endswith(".gz") and packed else c for n, c in files.items()}
    there = st.sampled_from([".", "*", "**/*", *files])
    field = st.sampled_from(["text", "text", "text", "id", "", "é"])
    return files, draw(st.one_of(there, there, st.sampled_from(SOURCES))), draw(field)


def examine_corpus(case, folder: pathlib.Path) -> bool:
    files, source, field = case
    root, data = folder / "root", folder / "data"
    for path in (root, data):
        shutil.rmtree(path, ignore_errors=True)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    source = source if source.startswith("tfds:") else f"{root}/{source}"
    corpus = attempt(open_corpus, source, data, text_field=field, quiet=True)
    index = corpus and attempt(token_index, corpus, Bytes(), "train", data, quiet=True)
    for path in data.rglob("*"):  # whole folders with their record, and locks
        if path.is_dir() and path.parent.name in ("text_corpus", "token_index"):
            assert list(path.rglob("dataset_info.json" if corpus else "meta.json")) or index, path
    if corpus is None:
        assert not [p for p in data.rglob("*") if p.is_file() and not p.name.endswith(".lock")]
    assert not [p for p in folder.iterdir() if p not in (root, data)]
    return corpus is not None


@sizes(40, 700)
def test_corpora(count, tmp_path):
    accepted = []
    search(count, random_corpora())(lambda case: accepted.append(examine_corpus(case, tmp_path)))
    assert any(accepted) and not all(accepted)


# Tokenizer files.


def tokenizer_json() -> dict:
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", "block", "time", "a"])}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            dict(
                id=1,
                content="</s>",
                single_word=False,
                lstrip=False,
                rstrip=False,
                normalized=False,
                special=True,
            )
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }


@st.composite
def random_tokenizers(draw) -> tuple[bytes, bytes | None]:
    """A tokenizer.json and perhaps a tokenizer_config.json, in which something is different."""
    content = tokenizer_json()
    different = draw(st.sets(st.sampled_from(("keys", "bytes", "end", "beside")), min_size=1, max_size=2))
    for _ in range(draw(st.integers(1, 2)) if "keys" in different else 0):
        place = content
        while isinstance(place, dict) and place:
            key = draw(st.sampled_from(sorted(place)))
            if draw(st.booleans()) or not isinstance(place[key], dict):
                place[key] = draw(JSON)
                break
            place = place[key]
    raw = bytearray(json.dumps(content).encode())
    for _ in range(draw(st.integers(1, 2)) if "bytes" in different else 0):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    if "end" in different:
        raw = raw[: draw(st.integers(0, len(raw)))]
    beside = draw(st.one_of(JSON, st.fixed_dictionaries({"eos_token": JSON})))
    return bytes(raw), json.dumps(beside).encode() if "beside" in different else None


def examine_tokenizer(case, folder: pathlib.Path) -> bool:
    raw, beside = case
    (folder / "tokenizer.json").write_bytes(raw)
    if beside is None:
        (folder / "tokenizer_config.json").unlink(missing_ok=True)
    else:
        (folder / "tokenizer_config.json").write_bytes(beside)

    def use():
        tokenizer = open_tokenizer(str(folder / "tokenizer.json"))
        ids = tokenizer.encode("a block of time</s> ü")
        assert len(ids) == 0 or int(ids.max()) < tokenizer.vocab_size
        assert tokenizer.boundary < tokenizer.vocab_size < 2**32
        assert isinstance(tokenizer.decode([*ids, tokenizer.boundary]), str)
        return True

    return attempt(use) is not None


@sizes(80, 1500)
def test_tokenizers(count, tmp_path):
    accepted = []
    search(count, random_tokenizers())(lambda case: accepted.append(examine_tokenizer(case, tmp_path)))
    assert 0.05 < np.mean(accepted) < 0.95


# What the search found.

FOUND_RECORDS = [
    b"3",
    b"[" * 10**5,
    b'{"config": {"a.b": 1}, "tokenizer": {}, "corpus": {}}',
    b'{"config": {"seed": {"x": 1}}, "tokenizer": {}, "corpus": {}}',
    b'{"config": {"model": {"__class__": {}}}, "tokenizer": {}, "corpus": {}}',
    b'{"config": {"items": 1}, "tokenizer": {}, "corpus": {}}',
    b'{"config": {"model": {"": {}}}, "tokenizer": {}, "corpus": {}}',
    json.dumps(dict(config=base_config().to_dict(), tokenizer=math.nan, corpus={})).encode(),
]
FOUND_MASKS = {
    "no right": lambda: BlockMask.window(8, left=4, right=None),
    "a left between": lambda: BlockMask.window(8, left=1.5),
    "a chunk of NaN": lambda: BlockMask.chunked(8, size=math.nan),
    "beyond int32": lambda: BlockMask.causal(2**40),
    "no heads": lambda: BlockMask.from_indices(np.zeros((0, 2, 1), int), T=2, bq=1, bk=1),
    "no places": lambda: BlockMask.from_indices(np.zeros((2, 0), int), T=2, bq=1, bk=1),
    "no heads in booleans": lambda: BlockMask.from_block_bool(np.zeros((0, 2, 2), bool), bq=1, bk=1),
    "blocks of no size": lambda: BlockMask.from_block_bool(np.ones((2, 2), bool), bq=None),
    "indices of blocks of no size": lambda: BlockMask.from_indices(np.zeros((2, 1), int), bq="a"),
}
FOUND_ENDS = [b"[]", b"3", b'{"eos_token": 5}', b'{"eos_token": {"content": []}}', b"[" * 10**5]


@pytest.mark.parametrize("content", FOUND_RECORDS, ids=lambda c: c[:40].decode())
def test_found_records(content, tmp_path):
    examine_record(content, tmp_path)


FOUND_CONFIGS = [("data.seq_len", 2**63), ("data.seq_len", 2**40)]
FOUND_CONFIGS += [("model.depth", size) for size in (2**20, 2**31 - 1, 2**63, 10**30)]
FOUND_CONFIGS += [
    ("model.heads", 10**30),
    ("model.pattern", "8*99999999,full"),
    ("model.pattern", "9" * 30),
]


@pytest.mark.parametrize(("key", "value"), FOUND_CONFIGS, ids=lambda x: str(x)[:20])
def test_found_configs(key, value):
    config = base_config()
    with config.unlocked():
        config.update_from_flattened_dict({key: value})
    assert not examine_config(config)


@pytest.mark.parametrize("name", FOUND_MASKS)
def test_found_masks(name):
    assert attempt(FOUND_MASKS[name]) is None


@pytest.mark.parametrize("beside", FOUND_ENDS, ids=lambda c: c[:40].decode())
def test_found_tokenizers(beside, tmp_path):
    assert not examine_tokenizer((json.dumps(tokenizer_json()).encode(), beside), tmp_path)


# Accepted configs that run.

MESHES = [dict(data=-1), dict(data=2, fsdp=2, tensor=2), dict(data=2, seq=4), dict(fsdp=8, data=1)]


@st.composite
def runnable(draw) -> dict:
    """Keys of a config that is small enough to run, right or wrong."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    return dict(
        model__depth=pick(1, 2, 3),
        model__pattern=pick("8,full", "8", "full", "8*2,16", "lightning,8"),
        model__residual=pick("prenorm", "attn_res", "block_attn_res:size=2", "delta", "delta_block:size=2"),
        model__locality=pick("", "", "beta:3", "constant:0.5"),
        model__tied=draw(st.booleans()),
        model__qk_norm=draw(st.booleans()),
        model__kv_heads=pick(1, 2),
        model__soft_cap=pick(0.0, 20.0),
        model__attention_block=pick(8, 16),
        data__order=pick("packed", "stream"),
        data__batch_size=pick(8, 16),
        data__seq_len=pick(32, 48),
        optimizer__name=pick("adamw", "muon"),
        optimizer__schedule=pick("cosine", "stable_decay"),
        optimizer__warmup_steps=pick(0, 0, 1, 1, 5),
        optimizer__clip_norm=pick(0.0, 1.0),
        optimizer__z_loss=pick(0.0, 1e-4),
        run__accumulate=pick(1, 2),
        run__remat=pick("none", "full", "dots"),
        run__checkpoint_every=pick(0, 1),
        run__inspect=draw(st.booleans()),
        mesh=pick(*MESHES),
    )


@sizes(1, 200)
def test_accepted_configs_really_run(count, tiny, tmp_path):
    ran = []

    def run(values: dict) -> None:
        values = dict(values)
        mesh = values.pop("mesh")
        config = tiny(run__steps=2, run__log_every=1, run__eval_sequences=8, **values)
        config.mesh.update(dict(data=1) | mesh)
        folder = tmp_path / f"run-{len(ran)}"
        done = attempt(loop.train, config, str(folder), quiet=True)
        if done is None:
            left = {p.name for p in folder.iterdir()} if folder.exists() else set()
            assert left <= {".lock", "run.json", "checkpoints"} and not list(folder.glob("checkpoints/*"))
        else:
            assert done.step == 2
        ran.append(done is not None)
        shutil.rmtree(folder, ignore_errors=True)
        jax.clear_caches()

    search(count, runnable(), longest=20 * LONGEST)(run)  # which compiles
    assert sum(ran) >= count // 4, sum(ran)  # the others are refused
