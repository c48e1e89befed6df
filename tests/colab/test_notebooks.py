"""Notebooks are what their scripts generate, and run from the first cell to the last."""

import pathlib
import runpy

import nbformat
import pytest
from nbclient import NotebookClient

COLAB = pathlib.Path(__file__).parents[2] / "colab"
build = runpy.run_path(str(COLAB / "build.py"))
SCRIPTS = build["SCRIPTS"]
PICTURES = {"quickstart": 6}


def test_every_notebook_has_a_script():
    assert SCRIPTS
    assert {path.stem for path in COLAB.glob("*.ipynb")} == {path.stem for path in SCRIPTS} == set(PICTURES)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_is_what_its_script_generates(script):
    made = build["build"](script)
    assert made == build["build"](script), "ids or metadata change from one build to the next"
    nbformat.validate(nbformat.reads(made, 4))
    assert script.with_suffix(".ipynb").read_text() == made, "run: python colab/build.py"


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.exhaustive
def test_a_notebook_runs(script, tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKJAX_STEPS", "2")
    monkeypatch.delenv("XLA_FLAGS")  # one device, as where it is read
    notebook = nbformat.read(script.with_suffix(".ipynb"), 4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    text = "".join(output.get("text", "") for output in outputs)
    assert len(pictures) == PICTURES[script.stem]
    assert "Installing" not in text and "Warning" not in text
    assert text.count("compiling") <= 1  # one function serves every setting of the dial
