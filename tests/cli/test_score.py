"""igpt score: figures, order, files, references, hostile inputs, Ctrl-C."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_pipeline

from igpt_fast import Pipeline, Scores
from igpt_fast.cli import main as cli
from igpt_fast.learning.data import TokenData, save_tokens

Run = tuple[int, str, str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights with two classes; images are 4 by 4."""
    folder = tmp_path_factory.mktemp("model")
    pipeline = small_pipeline(4, 4, 9, classes=2, dtype=torch.float32)
    pipeline.model.save_pretrained(folder)
    pipeline.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("a.png", "b.png", "sub/c.png", "d.png", "e.png"):
        Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(folder / name)
    return folder


def run(capsys: pytest.CaptureFixture[str], *args: object) -> Run:
    try:
        code = cli.main(["score", *map(str, args)])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def report(capsys: pytest.CaptureFixture[str], *args: object) -> Any:
    code, out, err = run(capsys, *args, "--json")
    assert code == 0, err
    return json.loads(out)


def fails(capsys: pytest.CaptureFixture[str], code: int, *args: object) -> str:
    got, out, err = run(capsys, *args)
    assert (got, out) == (code, ""), err
    assert err.count("\n") == 1, err
    assert err.startswith("igpt score: ")
    return err


def test_the_bundled_model_on_its_held_out_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    """The command without an argument."""
    found = report(capsys, "--device", "cpu")
    assert found["images"] == 380
    assert found["nats_per_pixel"] == pytest.approx(1.152, abs=1e-3)
    assert found["palette"] == "128 colours ffe8eb29"


def test_the_same_as_the_pipeline_in_order(capsys: pytest.CaptureFixture[str], model: Path, pictures: Path) -> None:
    paths = sorted(pictures.rglob("*.png"), key=lambda path: path.relative_to(pictures).as_posix())
    want = Pipeline.from_pretrained(model, device="cpu").score(paths)
    found = report(capsys, pictures, "--model", model, "--device", "cpu", "--batch-size", 2)
    order = want.order()
    assert [row["image"] for row in found["scores"]] == [str(paths[i]) for i in order]
    for name in ("nats_per_pixel", "bits_per_pixel", "bits", "complexity", "ood"):
        values = getattr(want, name)
        assert [row[name] for row in found["scores"]] == pytest.approx(values[order].tolist(), abs=1e-6)
        assert found[name] == pytest.approx(float(values.mean()), abs=1e-6)
    assert (found["images"], found["size"], found["palette"]) == (5, [4, 4], want.palette)
    by_ood = report(capsys, pictures, "--model", model, "--device", "cpu", "--by", "ood")
    assert [row["image"] for row in by_ood["scores"]] == [str(paths[i]) for i in want.order("ood")]


def test_the_table(capsys: pytest.CaptureFixture[str], model: Path, pictures: Path) -> None:
    code, out, err = run(capsys, pictures, "--model", model, "--device", "cpu", "--show", 2)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["nats/pixel", "bits/pixel", "complexity", "ood", "image"]
    assert len(lines) == 4
    assert float(lines[1].split()[0]) >= float(lines[2].split()[0])
    assert "over 9 colours" in lines[3]
    assert "(3 more are not listed)" in lines[3]


def test_every_file(capsys: pytest.CaptureFixture[str], model: Path, pictures: Path, tmp_path: Path) -> None:
    files = {"csv": "a.csv", "npz": "a.npz", "maps": "maps", "grid": "a.png"}
    options = [word for name, file in files.items() for word in (f"--{name}", tmp_path / file)]
    command = (pictures, "--model", model, "--device", "cpu", *options)
    found = report(capsys, *command)
    assert {path.name for path in tmp_path.iterdir()} == {"pictures", *files.values()}
    assert {name: found[name] for name in files} == {name: str(tmp_path / file) for name, file in files.items()}
    names = ["00000-a.png", "00001-b.png", "00002-d.png", "00003-e.png", "00004-c.png"]
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == names
    with Image.open(tmp_path / "maps" / names[0]) as picture:
        assert picture.size == (2 * 256 + 6 + 6 + 12 + 34, 256)
    loaded = Scores.load(tmp_path / "a.npz")
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["ood"]) for row in rows] == loaded.ood.tolist()
    for name, file in files.items():
        shown = fails(capsys, 1, pictures, "--model", model, f"--{name}", tmp_path / file)
        assert "--force" in shown
    assert run(capsys, *command, "--force")[0] == 0


def test_references(capsys: pytest.CaptureFixture[str], model: Path, pictures: Path, tmp_path: Path) -> None:
    shared = ("--model", model, "--device", "cpu")
    one = [pictures / "a.png", pictures / "b.png"]
    kept = report(capsys, pictures, *shared, "--npz", tmp_path / "a.npz")
    assert kept["auroc"] is None
    by_file = report(capsys, *one, *shared, "--reference", tmp_path / "a.npz")
    by_folder = report(capsys, *one, *shared, "--reference", pictures)
    assert by_file["images"] == by_folder["images"] == 2
    pipeline = Pipeline.from_pretrained(model, device="cpu")
    want = pipeline.score(one), Scores.load(tmp_path / "a.npz")
    for by in ("nats_per_pixel", "ood"):
        assert by_file["auroc"][by] == by_folder["auroc"][by] == want[0].compare(want[1], by)
    assert "AUROC against 5 images" in run(capsys, *one, *shared, "--reference", tmp_path / "a.npz")[1]
    other = "the reference is of 9 colours"
    assert other in fails(capsys, 1, *one, "--device", "cpu", "--reference", tmp_path / "a.npz")


def test_token_files(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.from_pretrained(model, device="cpu")
    tokens = torch.randint(9, (6, 16), generator=torch.Generator().manual_seed(0))
    heldout = torch.tensor([False, True, False, True, False, False])
    clusters = np.asarray(pipeline.processor.clusters)
    save_tokens(TokenData(tokens.to(torch.uint8), clusters, heldout), tmp_path / "t.npz")
    shared = ("--model", model, "--device", "cpu")
    want = pipeline.score_tokens(tokens)
    for split, which in (("heldout", [1, 3]), ("train", [0, 2, 4, 5]), ("all", list(range(6)))):
        found = report(capsys, tmp_path / "t.npz", *shared, "--split", split)
        rows = sorted(found["scores"], key=lambda row: row["image"])
        assert [row["image"] for row in rows] == [f"t.npz[{i}]" for i in which]
        assert [row["nats_per_pixel"] for row in rows] == pytest.approx(want.nats_per_pixel[which].tolist(), abs=1e-6)
    compared = report(capsys, tmp_path / "t.npz", *shared, "--split", "train", "--reference", tmp_path / "t.npz")
    assert 0.0 <= compared["auroc"]["ood"] <= 1.0
    assert "another palette (9 colours) than the model's (128)" in fails(capsys, 1, tmp_path / "t.npz")
    save_tokens(TokenData(tokens.to(torch.uint8), clusters, torch.zeros(6, dtype=torch.bool)), tmp_path / "n.npz")
    assert "--split all" in fails(capsys, 1, tmp_path / "n.npz", *shared)
    assert "alone" in fails(capsys, 2, tmp_path / "t.npz", tmp_path / "t.npz", *shared)


def test_labels(capsys: pytest.CaptureFixture[str], model: Path, pictures: Path) -> None:
    shared = (pictures, "--model", model, "--device", "cpu")
    plain, given = report(capsys, *shared), report(capsys, *shared, "--label", "0,1")
    assert plain["nats_per_pixel"] != given["nats_per_pixel"]
    assert [row["label"] for row in sorted(given["scores"], key=lambda row: row["image"])] == [0, 1, 0, 1, 0]
    assert "--label 2 is not in 0..1" in fails(capsys, 2, *shared, "--label", 2)
    assert "--label is given, but the model has no classes" in fails(capsys, 2, pictures, "--label", 0)


def test_hostile_inputs(capsys: pytest.CaptureFixture[str], model: Path, pictures: Path, tmp_path: Path) -> None:
    shared = ("--model", model, "--device", "cpu")
    (tmp_path / "empty").mkdir()
    assert "empty: no images in it" in fails(capsys, 1, tmp_path / "empty", *shared)
    assert "no such file" in fails(capsys, 1, tmp_path / "none", *shared)
    (pictures / "text.png").write_text("hello")
    shown = fails(capsys, 1, pictures, *shared)
    assert "1 of 6 images cannot be read" in shown
    assert "text.png: not a readable image" in shown
    code, out, err = run(capsys, pictures, *shared, "--skip-unreadable", "--json")
    assert (code, json.loads(out)["images"], json.loads(out)["skipped"]) == (0, 5, 1)
    assert err.startswith("left out: ")
    code, out, err = run(capsys, pictures / "text.png", *shared, "--skip-unreadable")
    assert (code, out) == (1, "")
    assert "none of its 1 images can be read" in err
    (tmp_path / "a.npz").write_text("no zip")
    assert "a.npz: not a token file" in fails(capsys, 1, tmp_path / "a.npz", *shared)
    assert "a.npz: not a file of scores" in fails(
        capsys, 1, pictures / "a.png", *shared, "--reference", tmp_path / "a.npz"
    )
    for option, value in (("--by", "bits"), ("--split", "some"), ("--show", "-1"), ("--dtype", "int8")):
        assert option in fails(capsys, 2, pictures, *shared, option, value)
    assert "--csv" not in fails(capsys, 2, pictures, *shared, "--csv", tmp_path / "a.txt")


def test_weights_of_nan_or_that_overflow(capsys: pytest.CaptureFixture[str], pictures: Path, tmp_path: Path) -> None:
    for name, value, said in (
        ("nan", torch.nan, "model.safetensors: lm_head.weight: holds NaN"),
        ("huge", 3e38, "a.png, pixel 0): the model's weights, or what it computes in its dtype, hold NaN or infinity"),
    ):
        pipeline = small_pipeline(4, 4, 9, dtype=torch.float32)
        with torch.no_grad():
            pipeline.model.lm_head.weight.fill_(value)
        pipeline.model.save_pretrained(tmp_path / name)
        pipeline.processor.save_pretrained(tmp_path / name)
        command = (pictures, "--model", tmp_path / name, "--device", "cpu", "--csv", tmp_path / "a.csv")
        code, out, err = run(capsys, *command)
        assert (code, out) == (1, "")
        assert said in err
        assert not (tmp_path / "a.csv").exists()


def test_a_disk_that_is_full_leaves_nothing_half_written(
    capsys: pytest.CaptureFixture[str], model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Scores, path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Scores, "_write_csv", full)
    code, out, err = run(capsys, pictures, "--model", model, "--device", "cpu", "--csv", tmp_path / "a.csv")
    assert (code, [path.name for path in tmp_path.iterdir()]) == (1, ["pictures"])
    assert "a.csv: No space left on device" in err
    assert "5 images" in out  # the work is not lost


def test_ctrl_c_saves_what_is_finished(model: Path, tmp_path: Path) -> None:
    """130; the file has the finished images."""
    program = f"""
import os, signal, sys
from igpt_fast.likelihood import scoring
from igpt_fast.cli import main
before, calls = scoring.image_nats, []
def slow(*args):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return before(*args)
scoring.image_nats = slow
options = ["--model", {str(model)!r}, "--device", "cpu", "--batch-size", "1", "--csv", {str(tmp_path / "a.csv")!r}]
sys.exit(main.main(["score", {str(tmp_path / "p")!r}, *options]))
"""
    (tmp_path / "p").mkdir()
    for i in range(5):
        Image.new("RGB", (4, 4), (40 * i, 0, 0)).save(tmp_path / "p" / f"{i}.png")
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 130, done.stderr
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_two_processes_score_what_one_would(
    capsys: pytest.CaptureFixture[str], model: Path, pictures: Path, tmp_path: Path
) -> None:
    shared = (pictures, "--model", model, "--device", "cpu", "--reference", pictures / "sub", "--batch-size", 1)
    one = report(capsys, *shared, "--npz", tmp_path / "one.npz")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "igpt_fast")
    command = [*torchrun, "score", *map(str, shared), "--npz", str(tmp_path / "two.npz"), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    assert (two["processes"], two["images"]) == (2, 5)
    for name in ("scores", "auroc", "nats_per_pixel"):
        assert two[name] == one[name]
    assert torch.equal(Scores.load(tmp_path / "one.npz").nats, Scores.load(tmp_path / "two.npz").nats)
