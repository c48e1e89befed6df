"""Tiles come from the call, a tuned file or the table, in this order; `tune` writes the file."""

import json
import types

import numpy as np
import pytest
from blockjax.kernels.block_sparse_attention import (
    Tiles,
    api,
    block_sparse_attention,
    reference,
    tune,
    tuning,
)

from blockjax.errors import UsageError
from blockjax.masks import BlockMask

TABLE = Tiles(forward=(128, 2), dq=(128, 2), dkv=(64, 3))
OTHER = Tiles(forward=(64, 4), dq=(64, 2), dkv=(64, 2))
MASK = BlockMask.causal(64, bq=16, bk=16)
Q = np.ones((1, 64, 2, 8), "f")


@pytest.fixture
def used(monkeypatch):
    """Tiles of the calls to a backend that has a choice; steps of more than 4 do not fit."""
    used = []

    def forward_pass(inputs, options):
        used.append(options.tiles)
        return reference.forward_pass(inputs, options)

    backend = types.SimpleNamespace(
        supports=lambda spec: None,
        default_tiles=lambda spec: TABLE,
        tiles_fit=lambda spec, tiles: "too many steps" if max(x[1] for x in tiles) > 4 else None,
        forward_pass=forward_pass,
        CHOICES=dict(forward=[(64, 4), (64, 9)], dq=[(64, 2)], dkv=[(64, 2)]),
    )
    monkeypatch.setattr(api, "BACKENDS", {"fast": backend})
    monkeypatch.setenv("BLOCKJAX_TUNING", "")
    return used


def test_a_call_uses_its_config_or_the_table_and_says_so_once(used, caplog):
    tuning._log_choice.cache_clear()
    with caplog.at_level("INFO"):
        for config in (None, OTHER, OTHER):
            block_sparse_attention(Q, Q, Q, MASK, config=config)
    assert used == [TABLE, OTHER, OTHER]
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 2 and "forward 128x2, dq 128x2, dkv 64x3, from the table" in said[0]
    assert "from config" in said[1]


def test_a_config_that_does_not_fit_is_refused(used):
    with pytest.raises(UsageError, match=r"fast.*too many steps"):
        block_sparse_attention(Q, Q, Q, MASK, config=OTHER._replace(dq=(64, 5)))
    with pytest.raises(UsageError, match="'xla' has nothing to configure"):
        tuning.choose_tiles("xla", reference, api.describe(Q, Q, Q, MASK), MASK, OTHER)


def test_tuning_writes_what_later_calls_use(used, tmp_path, monkeypatch, capsys):
    out = tmp_path / "tuned.json"
    monkeypatch.setattr(tune.benching, "interleaved", lambda runs, *_: [-i for i in range(len(runs))])
    tune.main(f"--T 64 --N 2 --K 2 --H 8 --block 16 --dtype float32 --out {out}".split())
    (entry,) = json.loads(out.read_text()).values()
    # The later it was tried, the faster it pretended to be.
    assert Tiles(*(tuple(entry[kernel]) for kernel in Tiles._fields)) == OTHER
    assert "64x9" not in capsys.readouterr().out

    monkeypatch.setenv("BLOCKJAX_TUNING", str(out))
    used.clear()
    block_sparse_attention(Q, Q, Q, MASK)
    block_sparse_attention(Q, Q, Q, BlockMask.full(64, bq=16, bk=16))
    assert used == [OTHER, TABLE], "another density is another entry"
    monkeypatch.setenv("BLOCKJAX_TUNING", str(tmp_path / "nowhere.json"))
    with pytest.raises(UsageError, match=r"nowhere\.json does not exist"):
        block_sparse_attention(Q, Q, Q, MASK)


def test_a_wrong_kernel_is_never_the_fastest(used, tmp_path, monkeypatch, capsys):
    right = api.BACKENDS["fast"].forward_pass

    def forward_pass(inputs, options):
        o, lse = right(inputs, options)
        return o * (1.1 if options.tiles.forward == (64, 4) else 1), lse

    monkeypatch.setattr(api.BACKENDS["fast"], "forward_pass", forward_pass)
    tune.main(f"--T 64 --N 2 --K 2 --H 8 --block 16 --dtype float32 --out {tmp_path / 'out.json'}".split())
    assert "wrong" in capsys.readouterr().out
    (entry,) = json.loads((tmp_path / "out.json").read_text()).values()
    assert entry["forward"] == [128, 2]
