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


# Jupyter closes a kernel's sockets and event loop after pytest has checked for open ones.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning:jupyter_client")
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda f: f.stem)
def test_notebook_runs(file, tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(file, as_version=4)
    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    displayed = [output["data"] for output in outputs if output["output_type"] == "display_data"]
    assert sum("image/png" in data for data in displayed) >= 6
    warnings = [output["text"] for output in outputs if output.get("name") == "stderr"]
    assert warnings == []
