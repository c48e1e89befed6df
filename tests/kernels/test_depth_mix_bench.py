"""The benchmark of `depth_mix`: its bytes, and that it runs."""

import json

from blockjax.kernels.depth_mix import bench


def test_bytes_of_a_stack():
    """32 sublayers in 4 depth blocks, counted by hand in arrays [T, M]."""
    stack = bench.Stack(T=100, M=64, L=32, size=8, dtype="bfloat16")
    reads = 1 + (2 + 8) + (3 + 8) + (4 + 8)  # what is read of one source is not written
    block = 2 + 3 + 6 * 5 + 3  # a norm, the joins without and with an update, the sum
    head = 5 + 1
    back = sum(8 + 2 * n for n in (1, 2, 3, 4)) + 4 * (3 + 7 * 6) + (1 + 2 * 5)
    again = 4 + 3 + 2 + 1  # sources have readers in later blocks, and the head
    forward, both = stack.bytes()
    assert forward == (reads + 4 * block + head) * 2 * 100 * 64
    assert both - forward == (back + again) * 2 * 100 * 64


def test_runs(monkeypatch, tmp_path):
    tiny = {
        "mix": bench.Mix(T=6, M=16, n=3, dtype="float32", peers=("xla",)),
        "stack": bench.Stack(T=6, M=16, L=5, size=2, dtype="float32"),
    }
    monkeypatch.setattr(bench, "CASES", {"cpu": tiny})
    monkeypatch.setattr(bench, "copy_bandwidth", lambda *_: 1e9)
    bench.main(["--rounds", "1", "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert found["mix"]["floor"]["fwd_ms"] == 1e3 * 4 * 6 * 16 * 4 / 1e9
    assert {"ours", "xla"} == found["mix"]["runs"].keys() and found["stack"]["runs"]["ours"]["fwd_bwd_ms"] > 0
