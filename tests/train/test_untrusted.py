"""What others wrote is read as data: none of it runs, nothing is fetched, no path leaves its folder."""

import ast
import pathlib
import pickle
import shutil
import socket

import pytest

import blockjax
from blockjax.data import open_corpus, open_tokenizer
from blockjax.data.files import slug
from blockjax.errors import UsageError
from blockjax.sweep.plan import collect
from blockjax.train import loop
from blockjax.train.config import load_config
from blockjax.train.run import open_run

ROOT = pathlib.Path(blockjax.__file__).parents[1]
# `runpy` runs a config file that its user names; nothing else runs what it reads.
RUNS_CODE = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "runpy", "joblib"}
MAY = {key: {"runpy"} for key in ("blockjax/train/config.py", "blockjax/sweep/plan.py")}
MAY["kernels/depth_mix/triton/call.py"] = {"exec"}  # of a kernel's signature that it wrote itself
FETCHES = {"urllib", "requests", "http", "ftplib", "huggingface_hub"}
UNPACKS = {"tarfile", "zipfile"}
CALLS = {"eval", "exec", "__import__", "from_pretrained", "unpack_archive"}


def sources() -> list[pathlib.Path]:
    found = [p for folder in ("blockjax", "kernels") for p in sorted((ROOT / folder).rglob("*.py"))]
    assert len(found) > 100
    return found


def imports_and_calls(path: pathlib.Path) -> tuple[set[str], set[str]]:
    imports, calls = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imports |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imports.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            # `re.compile`, `model.eval` and the like are others' methods.
            if isinstance(node.func, ast.Name) or name in ("from_pretrained", "unpack_archive"):
                calls.add(name)
            calls |= {f"{k.arg}=True" for k in node.keywords if k.arg == "allow_pickle"}
    return imports, calls


def test_the_library_has_nothing_that_runs_fetches_or_unpacks():
    for path in sources():
        imports, calls = imports_and_calls(path)
        name = path.relative_to(ROOT).as_posix()
        assert imports & (RUNS_CODE | FETCHES | UNPACKS) <= MAY.get(name, set()), name
        calls -= MAY.get(name, set())
        assert not calls & (CALLS | {"allow_pickle=True"}), name


@pytest.fixture
def forbidden(monkeypatch):
    """Unpickling and connections fail; what tried is listed."""
    tried = []

    def refuse(what):
        def call(*args, **kwargs):
            tried.append((what, args[1:]))
            raise AssertionError(what)

        return call

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse(f"pickle.{name}"))
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse(f"socket.{name}"))
    return tried


@pytest.mark.usefixtures("dense_attention")
def test_a_run_folder_of_another_is_opened_without_pickle_or_network(tiny, one_device, tmp_path, forbidden):
    config = tiny(run__steps=3, run__eval_sequences=8)
    config.run.data_dir = str(tmp_path / "data")  # prepared now
    with one_device():
        loop.train(config, str(tmp_path / "mine"), quiet=True)
        theirs = shutil.copytree(tmp_path / "mine", tmp_path / "theirs")
        assert open_run(str(theirs)).step == 3
        config.run.steps = 4
        assert loop.train(config, str(theirs), quiet=True).step == 4
    assert forbidden == []


def test_pickles_that_pass_for_other_files_are_refused(tmp_path, forbidden):
    class Evil:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "ran",))

    content = pickle.dumps(Evil())
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError):
            open_tokenizer(str(tmp_path / name))
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError):
            open_corpus(str(tmp_path / name), tmp_path / "data", quiet=True)
    assert not (tmp_path / "ran").exists() and forbidden == []


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc", "..", ".", "a\0b", "~/x", "", "x" * 500])
def test_names_stay_in_their_folder(name, tmp_path):
    assert "/" not in slug(name) and slug(name) not in ("", ".", "..") and len(slug(name)) <= 40
    (tmp_path / "x" / "1.0.0").mkdir(parents=True)
    (tmp_path / "x" / "1.0.0" / "dataset_info.json").write_text("{}")
    with pytest.raises(UsageError):
        open_corpus(f"tfds:{name}", tmp_path / "data" / "deeper", quiet=True)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("setting", ["../x", "/x", "a/b", "..", "."])
def test_runs_of_a_sweep_stay_in_its_folder(setting, tmp_path):
    file = tmp_path / "config.py"
    file.write_text(
        "from blockjax.train.config import base_config\n"
        "def get_config(): return base_config()\n"
        f"def sweep(add, config): add({setting!r}, {{}})\n"
    )
    with pytest.raises(UsageError):
        collect(str(file), str(tmp_path / "sweep"), load_config(str(file)))


def test_a_config_of_data_runs_nothing(tmp_path):
    """Only a Python file that is named runs; its text from elsewhere is data."""
    (tmp_path / "config.json").write_text("__import__('os').system('touch ran')")
    with pytest.raises(UsageError, match=r"must end in \.py"):
        load_config(str(tmp_path / "config.json"))
