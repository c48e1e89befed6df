"""`block_sparse_attention`: the suite for each backend, and what does not depend on one."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blockjax.kernels.block_sparse_attention import DistanceBias, api, bench, block_sparse_attention

from blockjax.errors import UsageError
from blockjax.masks import BlockMask
from tests.kernels.block_sparse_attention_suite import AttentionSuite


class TestXla(AttentionSuite):
    implementation = "xla"


MASK = BlockMask.causal(32, 48, bq=16, bk=16)
Q, K, V = np.ones((2, 32, 4, 8), "f"), np.ones((2, 48, 2, 8), "f"), np.ones((2, 48, 2, 6), "f")
LISTS = BlockMask.from_block_bool(np.ones((3, 2, 3), bool), bq=16, bk=16)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((Q[0], K, V, MASK), {}, r"4 axes.*\(32, 4, 8\)"),
        ((Q, K, V[:, 1:], MASK), {}, r"\(2, 48, 2, 8\) and v \(2, 47, 2, 6\)"),
        ((Q[:1], K, V, MASK), {}, r"\(1, 32, 4, 8\) and k \(2, 48, 2, 8\).*batch"),
        ((Q[:, :, :3], K, V, MASK), {}, "3 query heads.*no multiple of 2"),
        ((Q.astype("int32"), K, V, MASK), {}, "one floating dtype.*int32"),
        ((Q, K, V, np.ones((32, 48), bool)), {}, "must be a BlockMask, got ndarray"),
        ((Q[:, 1:], K, V, MASK), {}, r"T=32, S=48.*T=31, S=48"),
        ((Q, K, V, LISTS), {}, "1 batch entries and 3 heads.*1, 2 or 4"),
        ((Q, K, V, MASK), dict(scale=jnp.ones(())), "scale must be a Python number"),
        ((Q, K, V, MASK), dict(soft_cap=0.0), "soft_cap must be positive, got 0.0"),
        ((Q, K, V, MASK), dict(q_segment_ids=np.ones((2, 32), int)), "together.*T=32, S=48"),
        ((Q, K, V, MASK), dict(q_positions=np.ones((2, 31), int)), r"\[2, 32\].*\(2, 31\)"),
        ((Q, K, V, MASK), dict(q_positions=np.ones((2, 32))), "q_positions must be integers"),
        ((Q, K, V, MASK), dict(sinks=np.ones(2, "f")), r"sinks.*\[4\].*\(2,\)"),
        ((Q, K, V, MASK), dict(bias=DistanceBias(np.ones((2, 4), "f"))), r"bias.slope.*\(2, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(args, options, message):
    with pytest.raises(UsageError, match=message):
        block_sparse_attention(*args, **options)


def test_dispatch_takes_the_first_that_supports_the_call_and_says_why(monkeypatch, caplog):
    fast = types.SimpleNamespace(supports=lambda spec: f"head size {spec.H} is not 64")
    monkeypatch.setattr(api, "BACKENDS", {"fast": fast, **api.BACKENDS})
    with caplog.at_level("INFO"):
        block_sparse_attention(Q, K, V, MASK)
        block_sparse_attention(Q, K, V, MASK)
    assert [r.getMessage() for r in caplog.records if "fast" in r.getMessage()] == [
        "block_sparse_attention: not fast: head size 8 is not 64"
    ]
    with pytest.raises(UsageError, match="'fast' cannot serve this call: head size 8 is not 64"):
        block_sparse_attention(Q, K, V, MASK, implementation="fast")


def test_bench_checks_and_measures(monkeypatch, tmp_path, capsys):
    tiny = dict(B=1, T=64, N=2, K=1, H=8, block=16)
    cases = {
        "window": bench.Case(**tiny, mask="window:20"),
        "top_k": bench.Case(**tiny, mask="top_k:0.5", peers=()),
    }
    monkeypatch.setattr(bench, "CASES", {"cpu": cases})
    out = tmp_path / "bench.json"
    bench.main(["--rounds", "1", "--json", str(out)])
    runs = {name: case["runs"] for name, case in json.loads(out.read_text())["cases"].items()}
    assert runs["window"].keys() == {"ours", "xla"} and runs["window"]["xla"]["fwd_bwd_ms"] > 0
    assert runs["top_k"]["ours"]["fwd_tflops"] > 0
    assert "xla" in capsys.readouterr().out


def test_bench_refuses_to_time_what_is_wrong(monkeypatch):
    wrong = lambda *args: bench.PEERS["xla"](BlockMask.window(64, left=19, bq=16, bk=16), *args[1:])  # noqa: E731
    monkeypatch.setitem(bench.PEERS, "wrong", wrong)
    case = bench.Case(B=1, T=64, N=2, K=1, H=8, block=16, mask="window:20", peers=("wrong",))
    with pytest.raises(AssertionError, match="o differs from that of wrong by"):
        bench.measure(case, rounds=1, calls=1)


def test_top_k_lists_the_best_blocks_and_the_diagonal():
    scores = np.random.default_rng(0).random((2, 8, 8), "f")
    tags = np.asarray(jax.jit(lambda s: bench.top_k_mask(s, 0.4, 16).tags())(scores))[0] > 0
    for head, i in np.ndindex(2, 8):
        chosen = np.flatnonzero(tags[head, i])
        count = int(np.ceil(0.4 * (i + 1)))
        best = np.argsort(-scores[head, i, :i])[: count - 1]
        assert set(chosen) == {i, *best}
