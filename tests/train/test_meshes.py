"""A checkpoint is restored on other meshes: the same batches, the same losses, every leaf in its place."""

import hashlib
import pathlib
import shutil

import jax
import numpy as np
import pytest

from blockjax.data import Evaluation, Loader
from blockjax.parallel.mesh import make_mesh
from blockjax.train import loop
from blockjax.train.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("dense_attention")

MESHES = {"4x1": dict(data=4), "2x2": dict(data=2, fsdp=2), "1x4": dict(fsdp=4), "1": {}}
PAIRS = [("4x1", to) for to in ("2x2", "1x4", "1")] + [("1x4", "4x1"), ("1", "2x2")]


@pytest.fixture(scope="module")
def train():
    """`train(config, folder, mesh)`: digests of its batches, and the state it began with."""

    def run(config, folder, mesh):
        seen = {"batches": {}}
        iterate, opened = Loader.__iter__, loop.open_state

        def recorded(self):
            for k, batch in enumerate(iterate(self), self._start):
                if not isinstance(self._order, Evaluation):
                    seen["batches"][k] = hashlib.sha256(np.asarray(batch["tokens"]).tobytes()).hexdigest()
                yield batch

        def open_state(plan, *args):
            state, start = opened(plan, *args)
            seen.update(plan=plan, shardings=[leaf.sharding for leaf in jax.tree.leaves(state)])
            return state, start

        with pytest.MonkeyPatch.context() as patch:
            devices = jax.devices()[: int(np.prod(list(MESHES[mesh].values()) or [1]))]
            patch.setattr(loop, "make_mesh", lambda _: make_mesh(MESHES[mesh], devices))
            patch.setattr(Loader, "__iter__", recorded)
            patch.setattr(loop, "open_state", open_state)
            loop.train(config, str(folder), quiet=True)
        return seen

    return run


@pytest.fixture(scope="module")
def base(train, tiny, tmp_path_factory):
    """`base(mesh)`: folder and batches of a run of six steps, with a checkpoint of step 3."""
    made = {}

    def make(mesh):
        if mesh not in made:
            folder = tmp_path_factory.mktemp("base") / "run"
            config = tiny(run__steps=6, run__checkpoint_every=3, run__eval_sequences=8)
            made[mesh] = config, folder, train(config, folder, mesh)["batches"]
        return made[mesh]

    return make


def losses(folder: pathlib.Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(folder / "metrics.jsonl") if "train/loss" in line]


@pytest.mark.parametrize(
    ("saved", "now"),
    [pytest.param(*p, marks=() if p == ("4x1", "2x2") else pytest.mark.reliability) for p in PAIRS],
)
def test_restored_on_another_mesh(base, train, tmp_path, saved, now):
    config, whole, batches = base(saved)
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "6")
    (folder / "checkpoints.json").unlink()
    seen = train(config, folder, now)
    assert seen["batches"] == {k: batches[k] for k in (3, 4, 5)}
    assert seen["shardings"] == [leaf.sharding for leaf in jax.tree.leaves(seen["plan"].abstract)]
    np.testing.assert_allclose(losses(folder), losses(whole), rtol=1e-5)
    assert losses(folder)[:3] == losses(whole)[:3]
