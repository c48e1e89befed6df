import jax
import pytest

from blockjax.errors import UsageError
from blockjax.parallel.mesh import make_mesh
from blockjax.train import config as configs
from blockjax.train.folder import RunFolder
from blockjax.train.run import open_run
from blockjax.train.state import plan_state


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_moments_live_where_their_parameters_live(tiny, optimizer):
    """Else each device of an fsdp mesh would hold all moments."""
    config = tiny(optimizer__name=optimizer)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        plan = plan_state(configs.check(config, vocab_size=264), config, mesh)
    params = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(plan.abstract.params)[0]
    }
    moments = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(plan.abstract.opt_state)[0]:
        name = jax.tree_util.keystr(path)
        owner = next((params[p] for p in params if name.endswith(p)), None)
        if owner is None:
            assert leaf.ndim == 0 or leaf.sharding.is_fully_replicated
        else:
            moments += 1
            assert (leaf.shape, leaf.sharding) == (owner.shape, owner.sharding), name
    assert moments >= len(params)
    matrices = [leaf for name, leaf in params.items() if "gain" not in name]
    assert all(not leaf.sharding.is_fully_replicated for leaf in matrices)


@pytest.mark.parametrize("missing", ["data", "model"])
def test_a_record_of_another_version_is_refused(tiny, tmp_path, missing):
    config = tiny().to_dict()
    del config[missing]
    folder = RunFolder(str(tmp_path))
    folder.write_record({"config": config, "tokenizer": {}, "corpus": {}})
    with pytest.raises(UsageError, match=f"lacks '{missing}"):
        open_run(str(tmp_path))
