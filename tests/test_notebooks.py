"""Every notebook runs from its first cell to its last, and is committed without outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("**/*.ipynb"))


def test_the_notebook_exists():
    assert "finetune.ipynb" in {f.name for f in NOTEBOOKS}


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda f: f.stem)
def test_committed_without_outputs(file):
    for cell in nbformat.read(file, as_version=4).cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


def run(notebook, folder, monkeypatch):
    """Run a notebook in ``folder``; return how many pictures it shows."""
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.setenv("TMPDIR", str(folder))
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    warnings = [output["text"] for output in outputs if output.get("name") == "stderr"]
    assert warnings == []
    return sum("image/png" in output.get("data", {}) for output in outputs)


# Jupyter closes a kernel's sockets and event loop after pytest has checked for open ones.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning:jupyter_client")
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda f: f.stem)
def test_notebook_runs(file, tmp_path, monkeypatch):
    pictures = run(nbformat.read(file, as_version=4), tmp_path, monkeypatch)
    assert pictures >= {"finetune": 6, "research": 1}[file.stem]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning:jupyter_client")
def test_its_own_instruction_is_enough_for_another_folder(tmp_path, monkeypatch, make_shapes):
    """Class folders with long names, not split, at another size."""
    names = [f"{shape} with a name that is too long for a title" for shape in ("circle", "cross", "square")]
    make_shapes(tmp_path / "mine", train=20, val=0, test=0, classes=names, flat=True)
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    settings = next(cell for cell in notebook.cells if "ROOT = None" in cell.source)
    settings.source = settings.source.replace("ROOT = None", f"ROOT = {str(tmp_path / 'mine')!r}")
    # Without the published weights, which are not here.
    settings.source = settings.source.replace("224", "64").replace(
        "PRETRAINED = ROOT is not None", "PRETRAINED = False"
    )
    assert run(notebook, tmp_path, monkeypatch) >= 6
