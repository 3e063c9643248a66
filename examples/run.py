"""Runs the notebooks beside it anew, and keeps what they give: ``make notebooks``, or with names of some."""

import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient


def executed(path: Path) -> Any:
    """The notebook with what its cells give now: without what is said on stderr, times, and pictures' second format.

    Raises:
        CellExecutionError: A cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, record_timing=False, resources={"metadata": {"path": path.parent}}).execute()
    notebook.metadata.pop("language_info", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)
    return notebook


if __name__ == "__main__":
    for given in sys.argv[1:] or sorted(Path(__file__).parent.glob("*.ipynb")):
        nbformat.write(executed(Path(given).resolve()), given)
