"""The benchmark of `linear_attention`: its bytes, and that it runs."""

import json

from blockjax.kernels.linear_attention import bench


def test_runs(monkeypatch, tmp_path):
    sizes = dict(B=1, T=40, N=2, H=8, dtype="float32", peers=("xla",))
    tiny = {decay: bench.Case(**sizes, decay=decay) for decay in ("head", "token")}
    monkeypatch.setattr(bench, "CASES", {"cpu": tiny})
    monkeypatch.setattr(bench, "copy_bandwidth", lambda *_: 1e9)
    # The reference is beside plain XLA, so that the check of one against the other can fail.
    path = tmp_path / "out.json"
    bench.main(["--rounds", "1", "--implementation", "reference", "--json", str(path)])
    found = json.loads(path.read_text())["cases"]
    # Forward q, k, v, o; backward the same with do, and three gradients. Decays are read twice, written once.
    assert found["head"]["floor"] == dict(
        fwd_ms=1e3 * 4 * 40 * 2 * 8 * 4 / 1e9, fwd_bwd_ms=1e3 * 11 * 40 * 2 * 8 * 4 / 1e9
    )
    assert found["token"]["floor"]["fwd_bwd_ms"] == 1e3 * (11 * 8 + 3) * 40 * 2 * 4 / 1e9
    for case in found.values():
        assert case["runs"].keys() == {"ours", "xla"} and case["runs"]["ours"]["fwd_bwd_ms"] > 0
