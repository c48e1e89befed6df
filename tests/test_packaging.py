"""What is installed, under which names, and what an import costs."""

import ast
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SHIPPED = ("blockjax", "kernels", "experiments", "configs")
EXTRAS = ("cuda", "tpu", "gcs", "slurm", "bench")
SOURCES = sorted(file for folder in (*SHIPPED, "tests") for file in (ROOT / folder).rglob("*.py"))

# Where the import has another name than the distribution.
DISTRIBUTIONS = {
    "absl": "absl-py",
    "fla": "fla-core",
    "orbax": "orbax-checkpoint",
    "tensorboardx": "tensorboardX",
}


def imports(file: pathlib.Path) -> set[str]:
    """Top-level names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names


UNDECLARED = {"jla"}
"""Peers of benchmarks that take a single version of JAX: an extra would hold everybody to it."""


def requirements(group: str) -> set[str]:
    """Distributions that setup.py names in `install_requires` or an extra."""
    (call,) = (
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    )
    arguments = {k.arg: k.value for k in call.keywords}
    if group == "install_requires":
        listed = ast.literal_eval(arguments[group])
    else:
        listed = ast.literal_eval(arguments["extras_require"])[group]
    return set(listed)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def python(code: str, cwd: pathlib.Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_every_import_is_declared():
    lines = set.union(*(requirements(group) for group in ("install_requires", *EXTRAS)))
    declared = {normal(re.match(r"[\w.-]+", line)[0]) for line in lines}
    found = {name: file for file in SOURCES if "tests" not in file.parts for name in imports(file)}
    missing = {
        name: str(file.relative_to(ROOT))
        for name, file in found.items()
        if name not in {*sys.stdlib_module_names, *UNDECLARED, "blockjax", "experiments"}
        and normal(DISTRIBUTIONS.get(name.lower(), name)) not in declared
    }
    assert not missing


@pytest.mark.parametrize("group", ["install_requires", *EXTRAS, "dev"])
def test_requirements_are_ranges(group):
    listed = requirements(group)
    assert listed
    versions = [line.partition(";")[0] for line in listed]
    assert all(">=" in version and "==" not in version for version in versions), listed


def test_accelerator_extras_take_the_jax_of_the_base():
    (jax,) = (line for line in requirements("install_requires") if re.match(r"jax\W", line))
    for extra, plugin in (("cuda", "cuda13"), ("tpu", "tpu")):
        assert jax.replace("jax", f"jax[{plugin}]") in requirements(extra)


def test_jax_knows_the_extras_asked_of_it():
    assert {"cuda13", "tpu"} <= set(importlib.metadata.metadata("jax").get_all("Provides-Extra"))


def test_no_file_imports_a_top_level_kernels():
    assert [str(file) for file in SOURCES if "kernels" in imports(file)] == []


def test_kernels_lie_in_blockjax(tmp_path):
    done = python("import blockjax.kernels as k; print(k.__file__)", tmp_path)
    assert pathlib.Path(done.stdout.strip()) == ROOT / "kernels" / "__init__.py", done.stderr
    assert "No module named 'kernels'" in python("import kernels", tmp_path).stderr


def test_a_wheel_holds_everything_once(tmp_path):
    # From a copy: setuptools writes build/ and egg-info beside its sources.
    source = tmp_path / "source"
    files = [ROOT / "setup.py", ROOT / "pyproject.toml", *SOURCES]
    for file in [*files, *(f for f in (ROOT / "README.md", ROOT / "LICENSE") if f.exists())]:
        copy = source / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    package = {str(f.relative_to(ROOT)) for f in SOURCES if f.is_relative_to(ROOT / "blockjax")}
    kernels = {f"blockjax/{f.relative_to(ROOT)}" for f in SOURCES if f.is_relative_to(ROOT / "kernels")}
    assert packed == package | kernels


def test_type_checkers_are_shown_the_kernels():
    link = ROOT / "typings" / "blockjax" / "kernels"
    if not link.is_symlink():
        pytest.skip("checked out without symbolic links")
    assert link.resolve() == ROOT / "kernels"


def test_importing_blockjax_is_light(tmp_path):
    code = """
import sys
import blockjax
heavy = {"matplotlib", "tensorflow", "tensorflow_datasets", "orbax", "grain", "rich", "pyarrow"}
print(sorted(heavy & sys.modules.keys()))
if "jax" in sys.modules:
    from jax._src import xla_bridge
    print(xla_bridge.backends_are_initialized())
"""
    assert python(code, tmp_path).stdout.split("\n")[:-1] in (["[]"], ["[]", "False"])
