import inspect
import math
import types

import pytest
from ml_collections import ConfigDict

from blockjax.errors import UsageError
from blockjax.models import PRESETS, TransformerConfig
from blockjax.train import config as configs
from blockjax.train.config import base_config, check, check_mesh, check_profile, flatten, runlocal
from blockjax.train.folder import check_identity


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(UsageError) as error:
        function(*args, **kwargs)
    return str(error.value)


def changed(**values) -> ConfigDict:
    """The base config with dotted keys, written `run__steps=3`, set without regard to types."""
    config = base_config().to_dict()
    for name, value in values.items():
        *sections, key = name.split("__")
        place = config
        for section in sections:
            place = place[section]
        place[key] = value
    return ConfigDict(config)


@pytest.mark.parametrize("size", PRESETS)
def test_every_preset_passes_as_it_is_and_as_runlocal(size):
    config = base_config(size)
    check(config)
    config.run.accumulate = 32
    config.mesh.tensor = 16
    small = runlocal(config)
    model = check(small)
    check_mesh(small, types.SimpleNamespace(shape=dict(data=1, fsdp=1, seq=1, tensor=1)))
    assert model.num_params() < 1e6
    assert small.mesh.to_dict() == base_config().mesh.to_dict()
    assert config.mesh.tensor == 16, "runlocal changes a copy"
    assert flatten(small).keys() == flatten(config).keys()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(model__dept=3), ["'model.dept'", "'model.depth'"]),
        (dict(modle=3), ["'modle'"]),
        (dict(model__depth="4"), ["model.depth='4'", "int"]),
        (dict(model__depth=True), ["model.depth=True", "int"]),
        (dict(run__steps=1e3), ["run.steps=1000.0", "int", "1000"]),
        (dict(run__steps=None), ["run.steps=None", "int"]),
        (dict(run__steps=0), ["run.steps=0", "at least 1"]),
        (dict(run__log_every=-1), ["run.log_every=-1", "at least 1"]),
        (dict(run__eval_every=-1), ["run.eval_every=-1", "0 or more"]),
        (dict(run__keep_checkpoints=0), ["run.keep_checkpoints=0"]),
        (dict(run__accumulate=5), ["batch_size=32", "accumulate=5"]),
        (dict(run__remat="som"), ["run.remat", "'som'", "none"]),
        (dict(data__order="pakced"), ["data.order", "'packed'"]),
        (dict(data__seq_len=0), ["data.seq_len=0"]),
        (dict(optimizer__name="adam"), ["'adam'", "'adamw'"]),
        (dict(optimizer__schedule="cosin"), ["'cosin'", "'cosine'"]),
        (dict(optimizer__learning_rate=0.0), ["learning_rate=0.0", "above 0"]),
        (dict(optimizer__learning_rate=-1), ["learning_rate=-1", "above 0"]),
        (dict(optimizer__learning_rate=math.nan), ["learning_rate=nan"]),
        (dict(optimizer__clip_norm=math.inf), ["clip_norm=inf"]),
        (dict(optimizer__beta2=1.0), ["beta2=1.0", "[0, 1)"]),
        (dict(optimizer__decay_fraction=1.5), ["decay_fraction=1.5", "[0, 1]"]),
        (dict(optimizer__warmup_steps=1000), ["warmup_steps=1000", "run.steps=1000"]),
        (dict(optimizer__warmup_steps=-1), ["warmup_steps=-1"]),
        (dict(seed=-1), ["seed=-1"]),
        (dict(model__heads=6, model__kv_heads=4), ["heads=6", "kv_heads=4"]),
        (dict(model__depth=0), ["model.depth=0", "at least 1"]),
        (dict(model__depth=10_001), ["model.depth=10001", "at most 10000"]),
        (dict(model__pattern="8*9999,full*2"), ["8*9999", "more than 10000 layers"]),
        (dict(model__pattern="512,ful"), ["'ful'", "'512*3,full'"]),
    ],
    ids=str,
)
def test_configs_refused(values, words):
    message = refusal(check, changed(**values))
    assert all(word in message for word in words), message


def test_a_missing_key_is_named():
    config = base_config().to_dict()
    del config["run"]["prefetch"]
    assert "'run.prefetch'" in refusal(check, ConfigDict(config))


@pytest.mark.parametrize(
    ("axes", "values", "words"),
    [
        (dict(data=8), dict(data__batch_size=4), ["4", "data*fsdp=8"]),
        (
            dict(data=2, fsdp=4),
            dict(run__accumulate=8),
            ["4 sequences", "batch_size=32", "accumulate=8"],
        ),
        (dict(seq=3), {}, ["seq_len=1024", "seq=3"]),
        (dict(tensor=4), dict(model__kv_heads=2, model__heads=4), ["kv_heads=2", "tensor=4"]),
        (dict(tensor=4), dict(model__heads=6), ["heads=6", "tensor=4"]),
        (dict(tensor=3), dict(model__heads=3, model__kv_heads=3, model__ffn=512), ["ffn=512", "tensor=3"]),
        (dict(fsdp=32), dict(model__width=200), ["width=200", "fsdp=32"]),
    ],
    ids=str,
)
def test_what_does_not_divide_over_a_mesh_is_refused(axes, values, words):
    mesh = types.SimpleNamespace(shape=dict(data=1, fsdp=1, seq=1, tensor=1) | axes)
    message = refusal(check_mesh, changed(**values), mesh)
    assert all(word in message for word in words), message


def test_profile():
    assert check_profile(None, 10) is None
    assert check_profile(["2", "10"], 10) == (2, 10)
    for span in (["3"], ["a", "b"], ["1", "2", "3"], [""]):
        assert "two steps" in refusal(check_profile, span, 10)
    for span in (["0", "3"], ["5", "4"], ["5", "11"]):
        assert "run.steps=10" in refusal(check_profile, span, 10)


def record(config: ConfigDict, **parts) -> dict:
    return dict(config=config.to_dict(), tokenizer=dict(name="bytes"), corpus=dict(name="x")) | parts


@pytest.mark.parametrize(
    "values",
    [dict(run__steps=7), dict(mesh__data=2), dict(run__remat="full"), dict(run__accumulate=2)],
    ids=str,
)
def test_a_run_may_go_on_with_other_runtime_keys(values):
    check_identity(record(base_config()), record(changed(**values)), "runs/a")


@pytest.mark.parametrize("key", ["optimizer.query_rate", "model.depth", "data.order"])
def test_a_run_older_than_a_key_goes_on_with_its_default(key):
    old = record(base_config())
    section, name = key.split(".")
    del old["config"][section][name]
    check_identity(old, record(base_config()), "runs/a")
    config = configs.complete(old["config"])
    configs.check(config)
    assert config.to_dict() == base_config().to_dict()
    changed_since = record(changed(model__depth=5, optimizer__query_rate=1.0, data__order="stream"))
    assert key in refusal(check_identity, old, changed_since, "runs/a")


def test_a_run_with_an_unknown_key_is_not_opened():
    newer = base_config().to_dict()
    newer["model"]["colour"] = "red"
    assert "model.colour" in refusal(configs.check, configs.complete(newer))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(model__depth=5), ["model.depth was 4, is 5"]),
        (dict(seed=1, optimizer__name="muon"), ["seed was 0, is 1", "optimizer.name was 'adamw', is 'muon'"]),
        (dict(data__batch_size=8), ["data.batch_size was 32, is 8"]),
    ],
    ids=str,
)
def test_a_run_does_not_go_on_as_another(values, words):
    message = refusal(check_identity, record(base_config()), record(changed(**values)), "runs/a")
    assert all(word in message for word in ["runs/a", "another folder", *words]), message


def test_a_run_does_not_go_on_with_another_tokenizer():
    other = record(base_config(), tokenizer=dict(name="words.json", vocab_size=512))
    message = refusal(check_identity, record(base_config()), other, "runs/a")
    assert all(word in message for word in ["tokenizer", "name bytes", "vocab_size 512"]), message


def test_every_key_is_documented():
    lines = inspect.getsource(base_config).splitlines()
    for key in flatten(base_config()):
        section, _, name = key.rpartition(".")
        if section == "model":
            assert name in TransformerConfig.__doc__, key
        else:
            assert any(line.strip().startswith(f"{name}=") and "  # " in line for line in lines), key


def test_checks_name_keys_that_exist():
    checked = {key for keys, _, _ in configs.RANGES for key in keys} | configs.CHOICES.keys()
    assert checked <= flatten(base_config()).keys()
