"""The notebooks of docs/: they run from top to bottom, and what is stored of them is in order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.name for path in (ROOT / "docs").glob("*.ipynb"))
MOST_BYTES = 600 * 1024

EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient

source, target, folder = sys.argv[1:]
notebook = nbformat.read(source, as_version=4)
client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}})
client.execute()
nbformat.write(notebook, target)
"""


def read(path: Path) -> Any:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def executed(notebook: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """A run in a process of its own, with this interpreter as the kernel and no settings of the user's."""
    (folder / "work").mkdir()
    own = {
        name: str(folder / name.lower())
        for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    }
    environment = {**os.environ, **own, "PYTHONPATH": str(ROOT)}
    arguments = [str(notebook), str(folder / "executed.ipynb"), str(folder / "work")]
    return subprocess.run(
        [sys.executable, "-c", EXECUTE, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )


def test_there_are_notebooks() -> None:
    assert NAMES == ["retrieval_circuit.ipynb", "your_data.ipynb"]


@pytest.mark.slow
@pytest.mark.minutes
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_without_an_error_or_a_warning(name: str, tmp_path: Path) -> None:
    run = executed(ROOT / "docs" / name, tmp_path)
    assert run.returncode == 0, run.stderr[-4000:]
    fresh, stored = (code_cells(read(path)) for path in (tmp_path / "executed.ipynb", ROOT / "docs" / name))
    for cell, before in zip(fresh, stored, strict=True):
        assert [o.text for o in cell.outputs if o.get("name") == "stderr"] == [], cell.source
        # What is shown in the repository has the same parts as what runs today.
        kinds = [[(o.output_type, sorted(o.get("data", ()))) for o in own.outputs] for own in (cell, before)]
        assert kinds[0] == kinds[1], cell.source


def test_a_failing_cell_fails_the_run(tmp_path: Path) -> None:
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import mmlens\nassert 1 == 2, 'no'")])
    nbformat.write(broken, tmp_path / "broken.ipynb")
    run = executed(tmp_path / "broken.ipynb", tmp_path)
    assert run.returncode != 0
    assert "AssertionError" in run.stderr


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_one_clean_run(name: str) -> None:
    path = ROOT / "docs" / name
    notebook = read(path)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert sum("image/png" in output.get("data", ()) for cell in cells for output in cell.outputs) >= 4
    assert path.stat().st_size < MOST_BYTES
    assert notebook.metadata.kernelspec.name == "python3"
    # Of the machine on which it was run, nothing.
    assert not re.findall(r"/(?:work|home|root|tmp|Users)/|site-packages", path.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    texts = [cell.source for cell in read(ROOT / "docs" / name).cells if cell.cell_type == "markdown"]
    targets = [target for text in texts for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text)]
    assert targets
    for target in targets:
        assert target.startswith("http") or (ROOT / "docs" / target).exists(), target
