"""venv.sh with interpreters that are missing, old or broken, and with an installation that fails."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "venv.sh"

# Each passes the probe of venv.sh through this Python, told what it is.
GOOD = f'exec {sys.executable} "$@"'
OLD = f"""exec {sys.executable} -c 'import sys; sys.version_info = (3, 11, 9); exec(sys.argv[2])' "$@" """
BARE = f"""exec {sys.executable} -c 'import sys; sys.modules["ensurepip"] = None; exec(sys.argv[2])' "$@" """
SHIM = "echo 'pyenv: python3.12: command not found' >&2; exit 127"

# Makes environments whose pip writes down how it was called, and fails on request.
MAKER = f"""
if [ "$1 $2" != "-m venv" ]; then exec {sys.executable} "$@"; fi
mkdir -p "$4/bin"
echo made >>log
cat >"$4/bin/python" <<'END'
#!/bin/sh
if [ "$1 $2" != "-m pip" ]; then exec {sys.executable} "$@"; fi
echo "$@" >>log
if [ -f broken ]; then echo 'ERROR: no network' >&2; exit 1; fi
END
chmod +x "$4/bin/python"
"""


@pytest.fixture
def machine(tmp_path):
    """A function that installs interpreters, by path below a bare machine, and runs venv.sh on it."""
    for name in ("bin", "home", "project"):
        (tmp_path / name).mkdir()
    for tool in ("sh", "find", "cat", "grep", "rm", "mkdir", "chmod"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    project = tmp_path / "project"
    (project / "setup.py").touch()

    def run(*arguments, pythons=(), **environment):
        for name, text in dict(pythons).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)
        environment = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path / "home"), **environment}
        return subprocess.run(
            ["sh", SCRIPT, *arguments], cwd=project, env=environment, capture_output=True, text=True
        )

    run.root, run.project = tmp_path, project
    run.log = lambda: (project / "log").read_text().splitlines()
    return run


@pytest.mark.parametrize(
    ("pythons", "found"),
    [
        ({"bin/python3": GOOD, "bin/python3.13": GOOD}, "bin/python3"),
        ({"bin/python3": OLD, "bin/python3.12": GOOD}, "bin/python3.12"),
        ({"bin/python3": OLD, "bin/python3.13": SHIM, "bin/python3.12": GOOD}, "bin/python3.12"),
        ({"bin/python3": BARE, "bin/python3.14": GOOD}, "bin/python3.14"),
        (
            {"bin/python3": OLD, "bin/python3.12": SHIM, "home/.pyenv/versions/3.12.1/bin/python3": GOOD},
            "home/.pyenv/versions/3.12.1/bin/python3",
        ),
        ({"bin/python3": SHIM, "bin/uv": 'echo "$HOME/uv python"', "home/uv python": GOOD}, "home/uv python"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, dict) else x,
)
def test_finds_a_python_that_works(machine, pythons, found):
    done = machine("--find", pythons=pythons)
    assert done.stdout == f"{machine.root / found}\n", done
    assert (done.returncode, done.stderr) == (0, "")


def test_finds_pyenv_by_its_root(machine):
    elsewhere = machine.root / "pyenv root"
    pythons = {"bin/python3": OLD, "pyenv root/versions/3.13.0/bin/python3": GOOD}
    done = machine("--find", pythons=pythons, PYENV_ROOT=str(elsewhere))
    assert done.stdout == f"{elsewhere}/versions/3.13.0/bin/python3\n"


@pytest.mark.parametrize(
    "pythons",
    [
        {},
        {"bin/python3": OLD, "bin/python3.12": SHIM, "bin/uv": "exit 2"},
        {"bin/python3": BARE, "home/.pyenv/versions/3.11.7/bin/python3": GOOD},
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("arguments", [["--find"], [".venv", "-e", "."]], ids=" ".join)
def test_says_what_to_install(machine, pythons, arguments):
    done = machine(*arguments, pythons=pythons)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: Python 3.12 or newer") and done.stderr.count("\n") == 1
    assert not (machine.project / ".venv").exists()


def test_installs_once(machine):
    first = machine(".venv", "-e", ".[dev]", pythons={"bin/python3": MAKER})
    assert first.returncode == 0 and first.stdout.count("\n") == 1 and "two minutes" in first.stdout, first
    made, pip = machine.log()
    assert made == "made" and pip.endswith("-e .[dev]")
    second = machine(".venv", "-e", ".[dev]")
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert len(machine.log()) == 2


def test_other_arguments_are_added(machine):
    machine(".venv", "-e", ".[dev]", pythons={"bin/python3": MAKER})
    machine(".venv", "-e", ".[dev,cuda]")
    machine(".venv", "-e", ".[dev]")
    assert [line.rpartition(" ")[2] for line in machine.log()] == ["made", ".[dev]", ".[dev,cuda]"]


def test_installs_again_after_setup_py_changed(machine):
    machine(".venv", "-e", ".[dev]", pythons={"bin/python3": MAKER})
    stamp = (machine.project / ".venv" / "installed").stat().st_mtime
    os.utime(machine.project / "setup.py", (stamp + 5, stamp + 5))
    machine(".venv", "-e", ".[dev]")
    assert [line.rpartition(" ")[2] for line in machine.log()] == ["made", ".[dev]", ".[dev]"]


def test_a_failed_installation_is_not_taken_for_good(machine):
    (machine.project / "broken").touch()
    failed = machine(".venv", "-e", ".[dev]", pythons={"bin/python3": MAKER})
    assert failed.returncode != 0 and "ERROR: no network" in failed.stderr
    (machine.project / "broken").unlink()
    assert machine(".venv", "-e", ".[dev]").returncode == 0
    assert [line.rpartition(" ")[2] for line in machine.log()] == ["made", ".[dev]", "made", ".[dev]"]


def test_a_failed_update_is_not_taken_for_good(machine):
    machine(".venv", "-e", ".[dev]", pythons={"bin/python3": MAKER})
    (machine.project / "broken").touch()
    assert machine(".venv", "-e", ".[dev,cuda]").returncode != 0
    (machine.project / "broken").unlink()
    assert machine(".venv", "-e", ".[dev]").returncode == 0
    assert machine.log()[-2:] == ["made", machine.log()[1]]
