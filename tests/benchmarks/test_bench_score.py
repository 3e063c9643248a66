"""The benchmarks of likelihoods: nobody is timed before the nats are right, and no file is trusted."""

import gzip
import importlib
import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from igpt_fast import backend

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the tests run outside the repository")


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> Any:
    """The rows of bench_score."""
    command = ["bench_score.py", "--dry-run", "--batch", str(batch), "--threads", "1", "--json", str(folder / "a.json")]
    monkeypatch.setattr("sys.argv", command)
    importlib.import_module("bench_score").main()
    return json.loads((folder / "a.json").read_text("utf-8"))["rows"]


def test_scores_are_compared_before_they_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(tmp_path, monkeypatch, 2)
    both = {(dtype, name) for dtype in ("float32", "bfloat16") for name in ("transformers", "igpt_fast")}
    ours = {("int8", "igpt_fast")} if backend._C is not None else set()
    assert {(row["dtype"], row["name"]) for row in found} == both | ours
    score = importlib.import_module("bench_score")
    monkeypatch.setattr(score, "image_nats", lambda model, tokens, **_: torch.zeros(tokens.shape))
    with pytest.raises(SystemExit, match="igpt_fast, float32: its nats are wrong"):
        run(tmp_path, monkeypatch, 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"hello", "not a gzipped idx file"),
        (b"\0\0\x08\x01" + struct.pack(">3I", 1, 1, 1) + b"a", "not a gzipped idx file"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 1 << 31, 1 << 31, 4) + b"a", "claims"),
    ],
)
def test_idx_files_are_not_trusted(tmp_path: Path, content: bytes, reason: str) -> None:
    ood = importlib.import_module("bench_ood")
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=rf"a\.gz: {reason}"):
        ood.read_idx(path)
    path.write_bytes(gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 2, 1, 3) + bytes(range(6))))
    assert ood.read_idx(path).tolist() == [[[0, 1, 2]], [[3, 4, 5]]]


def test_an_auroc_below_its_bar_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the rows are written."""
    ood = importlib.import_module("bench_ood")
    emoji = ood.load_tokens(ood.BUNDLED.parent / "emoji16.npz").heldout_tokens[:4]
    monkeypatch.setattr(ood, "load_tokens", lambda _: SimpleNamespace(heldout_tokens=emoji))
    monkeypatch.setattr(ood, "sets", lambda some, *_: {"the same": lambda: some})
    monkeypatch.setattr("sys.argv", ["bench_ood.py", "--json", str(tmp_path / "a.json")])
    with pytest.raises(
        SystemExit, match=r"the mean AUROC of ood is 0\.500, of raw nats 0\.500; want 0\.84 at least"
    ) as stop:
        ood.main()
    assert isinstance(stop.value.code, str)  # which Python leaves with 1 after
    assert len(json.loads((tmp_path / "a.json").read_text("utf-8"))["rows"]) == 3
    for raw, value, passes in ((0.677, 0.849, True), (0.75, 0.849, False), (0.5, 0.839, False), (0.74, 0.84, True)):
        assert (ood.below(raw, value) == "") == passes
