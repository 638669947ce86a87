"""The notebooks run from top to bottom, and those that are kept show what they printed."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def printed(notebook) -> str:
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return "\n".join(out.get("text") or out.get("data", {}).get("text/plain", "") for out in outputs)


def the_idea_in_ten_minutes(notebook, kept, folder):
    found = {
        name.strip(): (int(ads), int(task))
        for name, ads, task in re.findall(r"^(.+?) advertises +(\d+)% +task +(\d+)%$", printed(notebook), re.MULTILINE)
    }
    assert found["before"][0] == 0
    assert found["vectors on"][0] >= 90
    assert found["plain"][0] >= 60 and found["plain"][1] >= 60
    assert found["security vectors"][0] <= 10 and found["security vectors"][1] >= 60
    drawn = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(drawn) == 2


def your_model_your_data_your_pod(notebook, kept, folder):
    promises = ("the same to the bit", "what was saved", "vectors in it", "went on with")
    said = [line for line in printed(notebook).splitlines() if line.startswith(promises)]
    assert len(said) == len(promises)
    assert all(line in kept for line in said), "it prints something else than what is kept"
    assert os.listdir(folder), "the notebook writes into its own folder"


SHOWN = {check.__name__: check for check in (the_idea_in_ten_minutes, your_model_your_data_your_pod)}
"""What each notebook must show when it is run; one that is not listed fails."""


@pytest.mark.release
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert path.stem in SHOWN, "the notebook has no check of what it shows"
    notebook = nbformat.read(path, as_version=4)
    kept = printed(notebook)
    NotebookClient(notebook, timeout=1500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert printed(notebook), "the run printed nothing"
    SHOWN[path.stem](notebook, kept, tmp_path)  # asserts on what this run printed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_outputs_are_kept(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert "Traceback" not in printed(notebook) and len(printed(notebook)) > 500
