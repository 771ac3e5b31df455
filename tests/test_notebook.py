"""docs/first_steps.ipynb: a clean notebook, whose cells run one after the other."""

import json
import subprocess
import sys

import pytest

from .documents import DOCS

NOTEBOOK = json.loads((DOCS / "first_steps.ipynb").read_text())
CODE = ["".join(c["source"]) for c in NOTEBOOK["cells"] if c["cell_type"] == "code"]


def test_the_notebook_is_one_and_holds_no_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] in ("code", "markdown")
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    for text in CODE:
        compile(text, "cell", "exec")


@pytest.mark.slow  # draws the demo's images and trains
def test_the_cells_run(tmp_path):
    """In the folder docs of a project, as Jupyter would; few iterations."""
    (tmp_path / "docs").mkdir()
    few = "\n".join(CODE).replace("ITERATIONS = 150", "ITERATIONS = 12")
    assert few != "\n".join(CODE)
    (tmp_path / "cells.py").write_text(few)
    command = [sys.executable, tmp_path / "cells.py"]
    done = subprocess.run(command, cwd=tmp_path / "docs", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Perfect ranking would win" in done.stdout
    for name in ("curves.png", "model_final.pth", "alignment/index.html"):
        assert (tmp_path / "output/first_steps" / name).is_file()
