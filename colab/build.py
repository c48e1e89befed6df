"""Makes each notebook of this folder from the script beside it: `python colab/build.py`."""

import pathlib

import jupytext

SCRIPTS = sorted(set(pathlib.Path(__file__).parent.glob("*.py")) - {pathlib.Path(__file__)})


def build(script: pathlib.Path) -> str:
    """The notebook, without outputs; the same text for the same script."""
    notebook = jupytext.read(script)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"  # jupytext draws them
    return jupytext.writes(notebook, fmt="ipynb")


if __name__ == "__main__":
    for script in SCRIPTS:
        script.with_suffix(".ipynb").write_text(build(script))
