"""The notebooks of examples/ run from the first cell to the last, and are kept small, whole and with their outputs."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
QUICK = "embed_an_op"  # the others draw and train; make soak runs them


def texts(cells: list[Any]) -> list[str]:
    """What the cells give in words."""
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    return ["".join(output.get("data", {}).get("text/plain", "")) for output in outputs]


def test_kept_as_they_ran() -> None:
    """Every code cell ran, in order and without a mistake; nothing of the machine that they ran on; no large file."""
    assert len(NOTEBOOKS) == 5
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        assert len(text) < 300_000, path
        assert str(EXAMPLES.parent) not in text, path
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), path
        outputs = [output for cell in cells for output in cell["outputs"]]
        assert {output["output_type"] for output in outputs} <= {"execute_result", "display_data", "stream"}, path
        assert not any(output.get("name") == "stderr" for output in outputs), path


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=() if path.stem == QUICK else pytest.mark.soak) for path in NOTEBOOKS],
)
def test_runs(path: Path) -> None:
    """Each cell without a mistake; what compares as equal here did when it was kept, and the other way round."""
    kept = texts(json.loads(path.read_text(encoding="utf-8"))["cells"])
    found = texts(runpy.run_path(str(EXAMPLES / "run.py"))["executed"](path).cells)
    assert len(found) == len(kept)
    assert [text for text in found if "True" in text] == [text for text in kept if "True" in text]
    assert not any("False" in text for text in found)
