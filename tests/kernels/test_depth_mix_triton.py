"""`depth_mix` in Triton: interpreted and compiled on a CPU, and run on a GPU by `make test-gpu`."""

import os
import re
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blockjax.kernels.depth_mix import Spec, depth_mix, passes
from blockjax.kernels.depth_mix import triton as backend
from blockjax.kernels.depth_mix.spec import JoinInputs, JoinOptions, ReadInputs, ReadOptions
from blockjax.kernels.depth_mix.triton import plan
from blockjax.kernels.platforms import Target

from blockjax.errors import UsageError
from tests.kernels.depth_mix_suite import DepthMixSuite, exhaustive, rand, sources_of
from tests.kernels.targets import H100

SPEC = Spec(H100, jnp.dtype("bfloat16"), "read", n=8, R=1, tokens=16384, M=4096, heads=1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(), None),
        (dict(target=Target("gpu", "NVIDIA A100-SXM4-80GB")), None),
        (dict(target=Target("gpu", "NVIDIA GeForce RTX 3090"), dtype=jnp.dtype("float32")), None),
        (dict(target=Target("gpu", "NVIDIA L4"), M=7168, n=29, heads=16), None),
        (dict(target=Target("gpu", "NVIDIA RTX 2000 Ada Generation")), None),
        (dict(target=Target("cpu", "cpu")), "compute capability 8.0 or newer, not on cpu"),
        (dict(target=Target("gpu", "AMD Instinct MI300X")), "not on AMD Instinct"),
        (dict(target=Target("gpu", "Tesla V100-SXM2-16GB")), "not on Tesla V100"),
        (dict(target=Target("gpu", "NVIDIA T4")), "not on NVIDIA T4"),
        (dict(target=Target("gpu", "NVIDIA GeForce RTX 2080 Ti")), "not on NVIDIA GeForce RTX 2080"),
        (dict(dtype=jnp.dtype("float64")), "needs bfloat16 or float32, not float64"),
        (dict(heads=32), "up to 16 heads.* got 32, 4096 and 16384"),
        (dict(M=20000), "a width of 16384.* got 1, 20000"),
        (dict(tokens=0), "at least one token.* and 0"),
    ],
)
def test_refuses_before_compilation_with_the_numbers(monkeypatch, changes, reason):
    monkeypatch.setattr(backend, "PACKAGES", ())
    said = backend.supports(replace(SPEC, **changes))
    assert said is None if reason is None else re.search(reason, said)


def test_without_its_packages_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(backend, "PACKAGES", ("no_such_package", "json"))
    assert backend.supports(SPEC) == "no_such_package cannot be imported: pip install 'blockjax[cuda]'"


def test_leaves_the_cache_of_other_triton_kernels(monkeypatch, tmp_path):
    call = pytest.importorskip("blockjax.kernels.depth_mix.triton.call")
    (tmp_path / "jax_triton.py").write_text("import os\nos.environ['TRITON_CACHE_DIR'] = ''\n")
    monkeypatch.syspath_prepend(tmp_path)
    for folder in ("theirs", None):
        monkeypatch.delitem(sys.modules, "jax_triton", raising=False)
        monkeypatch.setenv("TRITON_CACHE_DIR", "theirs")
        if folder is None:
            monkeypatch.delenv("TRITON_CACHE_DIR")
        call.jax_triton.__wrapped__()
        assert os.environ.get("TRITON_CACHE_DIR") == folder
    monkeypatch.delitem(sys.modules, "jax_triton")


class Refuses64:
    """Of the suite, what is computed in float64."""

    def test_float64(self):
        with jax.enable_x64(True), pytest.raises(UsageError, match="bfloat16 or float32, not float64"):
            depth_mix(sources_of(0, 2, (3, 16), "float64"), rand(1, 16), implementation="triton")

    test_finite_differences = None


@pytest.mark.gpu
class TestTriton(Refuses64, DepthMixSuite):
    implementation = "triton"


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # NumPy says it
class TestInterpreted(Refuses64, DepthMixSuite):
    """One program after the other, in Python: equal runs show nothing, and devices would be in each other's
    way."""

    implementation = "triton"
    test_runs_are_equal_bit_for_bit = test_on_a_mesh = None
    test_any_number_of_tokens = exhaustive(DepthMixSuite.test_any_number_of_tokens)

    @pytest.fixture(autouse=True)
    def interpreted(self, monkeypatch):
        pytest.importorskip("triton")
        from tests.kernels import triton_on_cpu

        triton_on_cpu.install(monkeypatch)
        supports = backend.supports
        here = lambda spec: supports(replace(spec, target=H100))  # noqa: E731
        monkeypatch.setattr(backend, "PACKAGES", ())
        monkeypatch.setattr(backend, "supports", here)
        monkeypatch.setattr(plan, "multiprocessors", lambda: 1)

    @pytest.mark.parametrize("unstacked", [True, False])
    def test_queries_in_pieces(self, monkeypatch, unstacked):
        """Of more queries than a program can hold: pieces of two, and one alone."""
        monkeypatch.setattr(plan, "forward_queries", lambda *_: 2)
        monkeypatch.setattr(plan, "backward_queries", lambda n: 2)
        self.compare_read(sources_of(0, 3, (5, 24)), rand(1, 3, 24), heads=2, unstacked=unstacked)


EPS = 1e-6


@pytest.mark.parametrize(
    ("n", "R", "M", "forward", "backward"),
    [(16, 1, 7168, 1, 1), (8, 8, 2048, 8, 8), (9, 6, 7168, 2, 6), (16, 8, 2048, 8, 4), (29, 8, 4096, 4, 2)],
)
def test_queries_of_one_launch(n, R, M, forward, backward):
    rows, options = (jax.ShapeDtypeStruct((64, M), "bfloat16"),) * n, ReadOptions(1, EPS, True)
    found = min(R, plan.forward_queries(rows, R, options)), min(R, plan.backward_queries(n))
    assert found == (forward, backward)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_a_gpu(monkeypatch, capability):
    """Each kernel, for the oldest GPUs that are served and for an H100; both ways to cut a backward pass."""
    triton = pytest.importorskip("triton")
    from blockjax.kernels.depth_mix.triton import call as calls
    from triton.backends.compiler import GPUTarget

    shared = {}

    def compile_only(kernel, inputs, outputs, sizes):
        arrays = (*inputs, *outputs)
        lengths = tuple(len(x) if isinstance(x, tuple) else None for x in arrays)
        function, leaves = calls.flattened(kernel, lengths), jax.tree.leaves(arrays)
        kinds = {"bfloat16": "*bf16", "float32": "*fp32"}
        types = ["fp32" if isinstance(x, np.float32) else kinds[x.dtype.name] for x in leaves]
        source = triton.compiler.ASTSource(
            function,
            signature=dict(zip(function.arg_names, [*types, "constexpr"], strict=True)),
            constexprs={"S": sizes},
            attrs={(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types) if kind[0] == "*"},
        )
        options = dict(num_warps=sizes.warps)
        program = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        shared[kernel.fn.__name__] = program.metadata.shared
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)

    def both(sources, queries, gain):
        def run(sources, queries, gain):
            read = passes.read(backend, ReadInputs(sources, queries), ReadOptions(2, EPS, True))
            given = JoinInputs(sources[0], sources[1], read.o[0], read.lse[0], queries[0], gain)
            return passes.join(backend, given, JoinOptions(2, EPS, EPS))[:2]

        out, pullback = jax.vjp(run, sources, queries, gain)
        return pullback(out)

    monkeypatch.setattr(calls, "call", compile_only)
    array = jax.ShapeDtypeStruct
    for n, R, M in ((3, 1, 1024), (2, 2, 1000)):
        sources = (array((64, M), "bfloat16"),) * n
        jax.eval_shape(both, sources, array((R, M), "float32"), array((M,), "float32"))
    assert len(shared) == 6
    assert max(shared.values()) <= plan.SHARED_MEMORY["8.6"] << 10
