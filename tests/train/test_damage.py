"""Ways to damage a run folder, and what becomes of each: nothing that was complete is lost."""

import errno
import json
import os
import pathlib
import random
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from blockjax.errors import UsageError
from blockjax.parallel.mesh import make_mesh
from blockjax.train import checkpoint, manifest
from blockjax.train.checkpoint import Checkpoints, expired
from blockjax.train.config import base_config
from blockjax.train.folder import RunFolder
from blockjax.train.health import healthy
from blockjax.train.metrics import MetricsLog, read_metrics
from blockjax.train.run import claim
from blockjax.train.state import TrainState

# Threads of orbax call an event loop that an error has closed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning"
)

KEEP = ConfigDict(dict(keep_checkpoints=3, keep_every=0, keep_hours=0.0))
STEPS = (4, 8, 12)


def make_state(step: int, rows: int = 16) -> TrainState:
    mesh = make_mesh(dict(fsdp=2), jax.devices()[:2])
    draw = np.random.default_rng(step)
    cut, everywhere = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    put = lambda x, where=everywhere: jax.device_put(x, where)  # noqa: E731
    params = {
        "embedding": put(draw.normal(size=(rows, 8)).astype(np.float32), cut),
        "gain": put(jnp.asarray(draw.normal(size=5), jnp.bfloat16)),
    }
    moments = jax.tree.map(lambda x: x * 2, params)
    return TrainState(
        put(np.int32(step)), params, (moments, {"count": put(np.int32(step))}), jax.tree.map(put, healthy())
    )


def bits_of(state: TrainState) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def open_checkpoints(run: pathlib.Path, config=KEEP, **options) -> Checkpoints:
    return Checkpoints(epath.Path(run / "checkpoints"), config, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run folder with three complete checkpoints."""
    run = tmp_path_factory.mktemp("whole")
    checkpoints = open_checkpoints(run)
    for step in STEPS:
        checkpoints.save(step, make_state(step))
    checkpoints.close()
    return run


@pytest.fixture(scope="module")
def like():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(0))


@pytest.fixture
def run(whole, tmp_path):
    """A copy to damage."""
    return pathlib.Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))


def restored(run, like) -> tuple[int | None, list]:
    """The step that is restored, whose state is right, and what was passed over."""
    checkpoints = open_checkpoints(run)
    checkpoints.prepare(0)
    found = checkpoints.restore(like)
    checkpoints.close()
    if found is None:
        return None, checkpoints.skipped
    state, step = found
    assert bits_of(state) == bits_of(make_state(step))
    assert all(a.sharding == b.sharding for a, b in zip(*map(jax.tree.leaves, (state, like)), strict=True))
    return step, checkpoints.skipped


def complete(run) -> list[int]:
    return checkpoint.complete_steps(epath.Path(run / "checkpoints"))


def steps(run) -> list[int]:
    return checkpoint.steps_in(epath.Path(run / "checkpoints"))


def edit(file: pathlib.Path, change) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(change(content) or content))


def flip(file: pathlib.Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def files_of(step: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in step.rglob("*") if p.is_file())


def shards(step: pathlib.Path) -> list[pathlib.Path]:
    return [file for file in files_of(step) if file.parent.name == "d"]


def largest(step: pathlib.Path) -> pathlib.Path:
    return max(shards(step), key=lambda p: p.stat().st_size)


def flip_middle(step: pathlib.Path) -> None:
    for file in shards(step):
        flip(file, 4 * file.stat().st_size)


def cut(file: pathlib.Path, size: int) -> None:
    with file.open("r+b") as opened:
        opened.truncate(size)


def manifest_of(run, step=12) -> pathlib.Path:
    return run / "checkpoints" / str(step) / manifest.NAME


def other_digest(content):
    leaf = content["leaves"]["params/gain"]
    leaf["digest"] = leaf["digest"][:-1] + ("0" if leaf["digest"][-1] != "0" else "1")


def other_shape(content):
    content["leaves"]["params/gain"]["shape"] = [6]


def each(run, change) -> None:
    for step in STEPS:
        change(run / "checkpoints" / str(step))


def others_files(run) -> None:
    """Step 12 with the arrays of step 8, in files of the same names and sizes as far as that goes."""
    new, old = run / "checkpoints" / "12", run / "checkpoints" / "8"
    kept = manifest_of(run).read_text()
    shutil.rmtree(new)
    shutil.copytree(old, new)
    content = json.loads(kept)
    content["files"] = json.loads(manifest_of(run, 8).read_text())["files"]
    (new / manifest.NAME).write_text(json.dumps(content))


def dead_save(run, step=16) -> None:
    """What a kill between the commit and the manifest leaves."""
    shutil.copytree(run / "checkpoints" / "12", run / "checkpoints" / str(step))
    manifest_of(run, step).unlink()
    (run / checkpoint.JOURNAL).write_text(json.dumps({"complete": 12, "writing": step}))


def only_a_dead_save(run) -> None:
    dead_save(run, 4 + 12)
    for step in STEPS:
        shutil.rmtree(run / "checkpoints" / str(step))
    (run / checkpoint.JOURNAL).write_text(json.dumps({"complete": None, "writing": 16}))


def names(run, *words):
    return run / "checkpoints" / pathlib.Path(*words)


# What is done to the folder, and the step that is restored with words of why others are not, or the words
# with which the run is refused.
DAMAGES = {
    "flipped bits": (lambda r: flip_middle(names(r, "12")), 8, ["12"]),
    "flipped bits in two of them": (
        lambda r: [flip_middle(names(r, s)) for s in ("12", "8")],
        4,
        ["12", "8"],
    ),
    "a shard cut short": (lambda r: cut(largest(names(r, "12")), 20), 8, ["20 bytes instead of"]),
    "an empty shard": (lambda r: cut(largest(names(r, "12")), 0), 8, ["0 bytes instead of"]),
    "a longer shard": (lambda r: largest(names(r, "12")).open("ab").write(b"x"), 8, ["bytes instead of"]),
    "no shard": (lambda r: largest(names(r, "12")).unlink(), 8, ["is missing"]),
    "no folder of shards": (lambda r: shutil.rmtree(names(r, "12", "d")), 8, ["d/", "is missing"]),
    "no commit file": (
        lambda r: names(r, "12", "_CHECKPOINT_METADATA").unlink(),
        8,
        ["_CHECKPOINT_METADATA"],
    ),
    "no tree": (lambda r: names(r, "12", "_METADATA").unlink(), 8, ["_METADATA is missing"]),
    "no index": (lambda r: names(r, "12", "manifest.ocdbt").unlink(), 8, ["manifest.ocdbt is missing"]),
    "no manifest": (lambda r: manifest_of(r).unlink(), 8, ["no manifest"]),
    "an empty manifest": (lambda r: cut(manifest_of(r), 0), 8, ["manifest cannot be read"]),
    "half a manifest": (lambda r: cut(manifest_of(r), 300), 8, ["manifest cannot be read"]),
    "a manifest of zeros": (lambda r: manifest_of(r).write_bytes(b"\0" * 900), 8, ["cannot be read"]),
    "a manifest of brackets": (lambda r: manifest_of(r).write_text("[" * 10**5), 8, ["cannot be read"]),
    "a list for a manifest": (lambda r: manifest_of(r).write_text("[]"), 8, ["not one that"]),
    "a later manifest": (lambda r: edit(manifest_of(r), lambda c: c | {"format": 2}), 8, ["not one that"]),
    "leaves of text": (lambda r: edit(manifest_of(r), lambda c: c | {"leaves": {"a": "b"}}), 8, ["not one"]),
    "another's manifest": (lambda r: shutil.copy(manifest_of(r, 8), manifest_of(r)), 8, ["of step 8"]),
    "another digest": (lambda r: edit(manifest_of(r), other_digest), 8, ["params/gain holds other bits"]),
    "a leaf less": (
        lambda r: edit(manifest_of(r), lambda c: c["leaves"].pop("step") and None),
        8,
        ["step is nothing there"],
    ),
    "another shape": (
        lambda r: edit(manifest_of(r), other_shape),
        8,
        ["params/gain is bfloat16[6] there, bfloat16[5] here"],
    ),
    "another's arrays": (others_files, 8, ["hold"]),
    "another number": (lambda r: names(r, "12").rename(names(r, "13")), 8, ["13", "of step 12"]),
    "a file in its place": (
        lambda r: (shutil.rmtree(names(r, "12")), names(r, "12").write_text("x")),
        8,
        ["cannot be read"],
    ),
    "a link to nowhere": (
        lambda r: (shutil.rmtree(names(r, "12")), names(r, "12").symlink_to("gone")),
        8,
        ["no manifest"],
    ),
    "a dead save": (dead_save, 12, ["16", "no manifest"]),
    "nothing but a first dead save": (only_a_dead_save, None, ["16", "no manifest"]),
    "an uncommitted save": (
        lambda r: shutil.copytree(names(r, "12"), names(r, "16.orbax-checkpoint-tmp-1")),
        12,
        [],
    ),
    "foreign files": (lambda r: (names(r, "12", ".DS_Store").touch(), names(r, "old").mkdir()), 12, []),
    "no journal": (lambda r: (r / checkpoint.JOURNAL).unlink(), 12, []),
    "a damaged journal": (lambda r: (r / checkpoint.JOURNAL).write_text('{"complete'), 12, []),
    "all damaged": (lambda r: each(r, flip_middle), ["12:", "8:", "4:", "--run="], []),
    "no manifests": (lambda r: each(r, lambda s: (s / manifest.NAME).unlink()), ["no manifest", "once"], []),
    "no manifests and no journal": (
        lambda r: (each(r, lambda s: (s / manifest.NAME).unlink()), (r / checkpoint.JOURNAL).unlink()),
        ["12: it has no manifest", "4: it has no manifest"],
        [],
    ),
    "no checkpoints": (
        lambda r: shutil.rmtree(r / "checkpoints"),
        ["there are none", "step 12 was once"],
        [],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage(name, run, like):
    damage, outcome, words = DAMAGES[name]
    damage(run)
    kept = {file: file.read_bytes() for step in complete(run) for file in files_of(names(run, str(step)))}
    if isinstance(outcome, list):
        with pytest.raises(UsageError) as error:
            restored(run, like)
        assert all(word in str(error.value) for word in outcome), error.value
    else:
        step, skipped = restored(run, like)
        said = "; ".join(f"{at}: {reason}" for at, reason in skipped)
        assert step == outcome, said
        assert all(word in said for word in words), said
        assert bool(words) == bool(skipped), said
    assert {file: file.read_bytes() for file in kept} == kept, "a complete checkpoint was touched"
    assert not list(names(run).glob("*orbax-checkpoint-tmp*"))


@pytest.mark.parametrize("name", ["flipped bits", "no manifest", "a dead save", "another number"])
def test_what_was_passed_over_is_saved_anew(name, run, like):
    DAMAGES[name][0](run)
    checkpoints = open_checkpoints(run)
    _, step = checkpoints.restore(like)
    for later in range(step + 4, 21, 4):
        checkpoints.save(later, make_state(later))
    checkpoints.close()
    assert restored(run, like) == (20, [])
    assert complete(run)[:3] == [20, 16, 12]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_flipped_bit_anywhere_restores_a_wrong_state(whole, like, tmp_path_factory, seed):
    draw = random.Random(seed)
    run = tmp_path_factory.mktemp("flipped") / "run"
    shutil.copytree(whole, run)
    file = draw.choice(files_of(names(run, "12")))
    flip(file, draw.randrange(8 * file.stat().st_size))
    step, skipped = restored(run, like)  # which compares every bit
    assert (step, len(skipped)) in ((12, 0), (8, 1)), (file, skipped)
    shutil.rmtree(run)


def test_a_bit_that_orbax_does_not_miss(tmp_path):
    """It restores another number without a word; here the leaf is named."""
    checkpoints = open_checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, make_state(step, rows=4096))
    checkpoints.wait()
    file = largest(names(tmp_path, "2"))

    def by_orbax() -> list[bytes]:
        return [
            np.asarray(x).tobytes()
            for x in jax.tree.leaves(ocp.PyTreeCheckpointer().restore(names(tmp_path, "2")))
        ]

    right = by_orbax()

    def silent(bit) -> bool:
        flip(file, bit)
        try:
            return by_orbax() != right
        except Exception:  # it noticed
            return False

    size = file.stat().st_size
    for byte in range(size // 20, size, size // 20):
        if silent(8 * byte):
            break
        flip(file, 8 * byte)
    else:
        pytest.fail("orbax noticed every flipped bit")
    state, step = checkpoints.restore(make_state(0, rows=4096))
    assert step == 1 and bits_of(state) == bits_of(make_state(1, rows=4096))
    ((at, reason),) = checkpoints.skipped
    assert at == 2 and "embedding holds other bits than were saved" in reason
    checkpoints.close()


def test_a_wrong_tree_names_every_leaf(run, like):
    other = jax.eval_shape(lambda: make_state(0, rows=24))
    del other.params["gain"]
    checkpoints = open_checkpoints(run)
    with pytest.raises(UsageError) as error:
        checkpoints.restore(other)
    for words in (
        "params/embedding is float32[16,8] there, float32[24,8] here",
        "params/gain is bfloat16[5] there, nothing here",
        "opt_state/0/embedding is float32[16,8] there, float32[24,8] here",
    ):
        assert words in str(error.value)
    assert complete(run) == [12, 8, 4]


def test_parameters_alone_are_verified_too(run, like):
    def read():
        found = open_checkpoints(run).restore_params(like.params)
        assert bits_of(found[0]) == bits_of(make_state(found[1]).params)
        return found[1]

    assert read() == 12
    edit(manifest_of(run), other_digest)
    assert read() == 8


# Saves that fail.


def limit_files(size):
    """The kernel refuses files that grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_while_arrays_are_written(run, like):
    checkpoints = open_checkpoints(run)
    big = make_state(16, rows=4096)
    manifest.digests(checkpoint._tree(big))  # compiled now: the cache of programs is on the same disk
    release = limit_files(1024)
    try:
        with pytest.raises(UsageError) as error:
            checkpoints.save(16, big)
            checkpoints.wait()
    finally:
        release()
    assert "Checkpoint 16 cannot be written" in str(error.value) and "step 12 is complete" in str(error.value)
    checkpoints.save(16, make_state(16))  # room was made
    checkpoints.close()
    assert restored(run, like) == (16, [])


@pytest.mark.parametrize("which", [manifest.NAME, checkpoint.JOURNAL])
def test_a_full_disk_while_small_files_are_written(run, like, monkeypatch, which):
    whole_text = checkpoint.replace_text

    def full(file, text):
        if file.name == which and '"writing": 16' not in text:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole_text(file, text)

    monkeypatch.setattr(checkpoint, "replace_text", full)
    monkeypatch.setattr(manifest, "replace_text", full)
    checkpoints = open_checkpoints(run)
    checkpoints.save(16, make_state(16))
    with pytest.raises(UsageError, match=r"No space left on device.*step 12 is complete"):
        checkpoints.close()
    monkeypatch.undo()
    assert restored(run, like)[0] in (12, 16)
    assert {4, 8, 12} <= set(complete(run))


def test_no_room_for_a_checkpoint_is_said_before(run):
    with pytest.raises(UsageError, match=r"takes 1e\+12 GB.*has room for"):
        open_checkpoints(run).prepare(10**21)


@pytest.mark.parametrize("blocked", ["a file", "read-only"])
def test_a_folder_that_cannot_be_written_is_said_before(tmp_path, monkeypatch, blocked):
    if blocked == "a file":
        (tmp_path / "checkpoints").write_text("")
    else:
        if os.geteuid() == 0:  # who may write anywhere
            monkeypatch.setattr(
                type(epath.Path(tmp_path)),
                "touch",
                lambda *_, **__: os.open("/proc/version", os.O_WRONLY | os.O_CREAT),
            )
        (tmp_path / "checkpoints").mkdir(mode=0o500)
    with pytest.raises(UsageError, match="cannot be written"):
        open_checkpoints(tmp_path).prepare(0)


# The rest of the folder.


@pytest.fixture
def named():
    return type("Named", (), dict(name="x", digest="d", vocab_size=1, fingerprint="f"))


def test_checkpoints_without_a_record_are_refused(run, named):
    with pytest.raises(UsageError, match=r"no run\.json.*bring it back"):
        claim(RunFolder(str(run)), base_config(), named, named)
    assert not (run / "run.json").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"a"', "[" * 10**5, '{"config": 3}', "\0" * 64])
def test_a_damaged_record_is_refused(tmp_path, named, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UsageError, match="damaged"):
        claim(RunFolder(str(tmp_path)), base_config(), named, named)
    assert (tmp_path / "run.json").read_text() == text


@pytest.mark.parametrize(
    "junk", [b'{"step": 3, "a', b"\xff\xfe\n", b"3\n[]\nnull\n", b'{"loss": 1}\n', b"\0" * 99]
)
def test_damaged_metrics_lose_no_other_line(tmp_path, junk):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "a": 2}\n' + junk + b'\n{"step": 2, "a": 3}\n')
    MetricsLog(tmp_path, start=5, tensorboard=False).close()
    assert read_metrics(file) == [{"step": 1, "a": 2}, {"step": 2, "a": 3}]


# Retention.


def test_what_is_kept():
    hour = 3600.0
    times = {step: step * hour / 10 for step in range(10, 101, 10)}  # one an hour
    assert expired(times, 10 * hour, newest=2) == list(range(10, 81, 10))
    assert expired(times, 10 * hour, newest=20) == []
    assert expired(times, 10 * hour, newest=1, every=40) == [10, 20, 30, 50, 60, 70, 90]
    assert expired(times, 10 * hour, newest=1, hours=3.5) == [10, 20, 30, 40, 50, 60]


def test_old_ones_go_when_a_new_one_is_complete(tmp_path, monkeypatch):
    time = [0.0]
    config = ConfigDict(dict(keep_checkpoints=1, keep_every=6, keep_hours=1.0))
    checkpoints = open_checkpoints(tmp_path, config, clock=lambda: time[0])
    for step in (2, 4, 6, 8):
        time[0] += 1800
        checkpoints.save(step, make_state(step))
        checkpoints.wait()
    assert steps(tmp_path) == [8, 6]  # 6 was written half an hour ago
    time[0] += 10**6
    checkpoints = open_checkpoints(tmp_path, config, clock=lambda: time[0])
    checkpoints.save(10, make_state(10))
    checkpoints.wait()
    assert steps(tmp_path) == [10, 6]

    # As long as the new one is not complete, the old one stays.
    monkeypatch.setattr(manifest, "write", lambda *_: 1 / 0)
    checkpoints.save(12, make_state(12))
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        checkpoints.close()
    assert complete(tmp_path) == [10, 6]
