"""experiments/compile_pod.py as it is used, with libtpu."""

import json
import re

import pytest

from blockjax.errors import UsageError
from blockjax.pods.run import compile_pod

SCRIPT = "experiments/compile_pod.py"
SMALL = (
    "--config=configs/lm.py:runlocal",
    "--config.model.depth=2",
    "--config.model.attention_block=128",
    "--config.data.seq_len=256",
    "--config.run.remat=full",
)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_v5p(python, tmp_path):
    out = tmp_path / "step"
    done = python(SCRIPT, *SMALL, "--topology=v5p:2x2x1", "--mesh=data:2,fsdp:2", f"--out={out}")
    assert done.returncode == 0, done.stderr[-2000:]
    for words in (
        "v5p:2x2x1: 4 x TPU v5, mesh data:2,fsdp:2",
        "It fits: ",
        "of 95.73 GiB",
        "459 TFLOP/s",
        "Useful: ",
        f"Written to {out}.",
    ):
        assert words in done.stdout, done.stdout
    # One gather of weights a layer and pass at least, gradients scattered and summed over data.
    kinds = dict(re.findall(r"│ ([\w-]+) +│ (?:fsdp|data) +│ +2 │ +(\d+) │", done.stdout))
    assert {"all-gather", "reduce-scatter", "all-reduce"} <= kinds.keys() and int(kinds["all-gather"]) >= 12
    header = json.loads((out / "program.json").read_text())
    assert header["device_kind"] == "TPU v5" and (out / "program.bin").stat().st_size == header["bytes"]
    # It is the TPU kernels that were compiled, not what runs anywhere.
    assert b"block_sparse_attention_dkv" in (out / "program.bin").read_bytes()
    loop_free = re.search(r"(\d+) loops whose length", done.stdout)
    assert loop_free is None


@pytest.mark.slow
def test_a_search_for_a_v5e(python):
    done = python(SCRIPT, *SMALL, "--topology=v5e:2x2", "--search", "--best_of=1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Meshes, by the time of a step" in done.stdout and "of 15.75 GiB" in done.stdout


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_v6e(python):
    done = python(SCRIPT, *SMALL, "--topology=v6e:2x2", "--mesh=fsdp:2,tensor:2", "--vocab_size=512")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "512 rows of vocabulary" in done.stdout and "of 31.24 GiB" in done.stdout


@pytest.mark.slow
def test_what_does_not_fit(python):
    large = "--config.model.width=16384", "--config.model.ffn=65536", "--config.optimizer.clip_norm=0"
    done = python(SCRIPT, *SMALL, *large, "--topology=v5e:2x2", "--mesh=data:4")
    assert done.returncode == 1, done.stderr[-2000:]
    found = re.search(r"It does not fit: ([\d.]+) of 15.75 GiB, ([\d.]+) GiB too much\.", done.stdout)
    assert found, done.stdout
    assert float(found[1]) - 15.75 == pytest.approx(float(found[2]), abs=0.02)
    assert "What helps: " in done.stdout and "fsdp" in done.stdout and "Useful" not in done.stdout


@pytest.mark.slow
def test_a_mistake_ends_in_one_sentence(python):
    done = python(SCRIPT, SMALL[0], "--topology=v5p:2x2x1", "--mesh=data:4", "--config.data.batch_size=6")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: A microbatch of 6 sequences")


def test_a_pod_is_needed_and_one_way_to_a_mesh(tiny):
    with pytest.raises(UsageError, match="--topology=v5p:8x8x8"):
        compile_pod(tiny, None)
    with pytest.raises(UsageError, match=r"--out=Makefile cannot be made"):
        compile_pod(tiny, "v5p:8x8x8", out="Makefile")
    with pytest.raises(UsageError, match=r"--mesh=data:8 and --search exclude"):
        compile_pod(tiny, "v5p:8x8x8", "data:8", best_of=2)
