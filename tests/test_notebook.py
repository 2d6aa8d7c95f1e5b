"""The notebook of the documentation runs from its first cell to its last, here on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.tiny_hub import save_llama

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorials" / "tour.ipynb"
SETTINGS = {"MODEL": '"HuggingFaceTB/SmolLM2-135M-Instruct"', "STEPS": "40"}


def text_of(cell: dict[str, object]) -> str:
    outputs: list[dict[str, str]] = cell.get("outputs", [])  # type: ignore[assignment]
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.matrix
@pytest.mark.process
def test_every_cell_runs_and_llama_cpp_answers_as_trained(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("llama_cpp_py_sync", reason="llama.cpp is not installed")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for name, value in {"MODEL": repr(str(save_llama(tmp_path / "model"))), "STEPS": "2"}.items():
        line = f"{name} = {SETTINGS[name]}"
        assert line in notebook.cells[1].source
        notebook.cells[1].source = notebook.cells[1].source.replace(line, f"{name} = {value}")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = [text_of(cell) for cell in notebook.cells if cell.cell_type == "code"]
    assert "passed - " in said[3]
    assert any(output.output_type == "display_data" for output in notebook.cells[8].outputs), "the figure"
    assert "llamacpp: as trained." in said[6]
    assert "torch: as trained." in said[6]


def test_it_is_stored_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert [cell["outputs"] for cell in cells if cell["cell_type"] == "code"] == [[]] * 7
