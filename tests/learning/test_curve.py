"""The picture of a run's log."""

import json
from pathlib import Path

import pytest
from PIL import Image

from igpt_fast.learning.curve import _curves, plot


def test_curves_leave_out_what_is_no_record(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    records = [{"step": 50, "nats": 3.0}, {"step": 100, "nats": 2.0, "heldout_nats": 2.5, "lr": 0.1}]
    broken = ["half a li", "[1, 2]", '{"nats": 1.0}', '{"step": 3, "nats": NaN}', '{"step": 4, "nats": "many"}', "1"]
    log.write_text("\n".join([*map(json.dumps, records), *broken]) + "\n")
    assert _curves(log) == {"nats": [(50, 3.0), (100, 2.0)], "heldout_nats": [(100, 2.5)]}


@pytest.mark.parametrize("name", ["a.png", "a.svg", "a.pdf"])
def test_plot(tmp_path: Path, name: str) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": i, "nats": 5 / i, "heldout_nats": 6 / i}) + "\n" for i in range(1, 9)))
    plot(log, tmp_path / name)
    assert (tmp_path / name).stat().st_size > 3000
    if name == "a.png":
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 20
    with pytest.raises(FileExistsError):
        plot(log, tmp_path / name, overwrite=False)


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "lr": 0.1}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl: has no figure in nats"):
        plot(tmp_path / "log.jsonl", tmp_path / "a.png")
    with pytest.raises(ValueError, match="must end in"):
        plot(tmp_path / "log.jsonl", tmp_path / "a.gif")
    with pytest.raises(FileNotFoundError):
        plot(tmp_path / "none.jsonl", tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
