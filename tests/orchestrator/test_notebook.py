"""docs/results.ipynb: it runs from top to bottom, and is stored without outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "results.ipynb"


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.reads(NOTEBOOK.read_text(encoding="utf-8"), as_version=4)  # type: ignore[no-untyped-call]


def test_it_is_stored_without_outputs(notebook: Any) -> None:
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [(cell.outputs, cell.execution_count) for cell in code] == [([], None)] * len(code)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client", "ignore::ResourceWarning")
def test_it_runs(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "TMPDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = notebook.copy()
    NotebookClient(done, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = [
        str(output.get("text") or output.get("data", {}).get("text/plain", ""))
        for cell in done.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    assert any("planned=12" in text and "finished=12" in text for text in said)
    assert any("12 rows" in text or "gradient_norm" in text for text in said)
    assert any("Did you mean 'width'?" in text and "^^^^^" in text for text in said)
    assert any(text.startswith("l2_norm") and "n = 6 configurations" in text for text in said)
    assert said[-1] == "True"
