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

from igpt_fast import Pipeline, Scores, backend
from igpt_fast.cli import main as cli
from igpt_fast.cli.commands import score as command
from igpt_fast.learning.data import TokenData, save_tokens
from igpt_fast.learning.tokenizers import CodeTokenizer, ColourTokenizer
from igpt_fast.likelihood import scoring
from igpt_fast.world import World

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
    assert found["nats_per_pixel"] == pytest.approx(1.0568, abs=1e-3)
    assert found["palette"] == "128 colours ffe8eb29"


def test_the_same_as_the_pipeline_in_order(capsys: pytest.CaptureFixture[str], model: Path, pictures: Path) -> None:
    paths = sorted(pictures.rglob("*.png"), key=lambda path: path.relative_to(pictures).as_posix())
    want = Pipeline.from_pretrained(model, device="cpu").score(paths)
    found = report(capsys, pictures, "--model", model, "--device", "cpu", "--batch-size", 2)
    order = want.order()
    assert [row["image"] for row in found["scores"]] == [str(paths[i]) for i in order]
    for name in ("nats_per_pixel", "bits_per_pixel", "bits", "complexity", "ood"):
        values = getattr(want, name)
        assert [row[name] for row in found["scores"]] == pytest.approx(values[order].tolist(), rel=1e-6, abs=1e-6)
        assert found[name] == pytest.approx(float(values.mean()), rel=1e-6, abs=1e-6)
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
        assert picture.size == (2 * 256 + 6 + 6 + 12 + 42, 256)
    loaded = Scores.load(tmp_path / "a.npz")
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["ood"]) for row in rows] == loaded.ood.tolist()
    numbers = {row["image"]: row["number"] for row in found["scores"]}
    assert [row["number"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert [numbers[row["image"]] for row in rows] == [0, 1, 2, 3, 4]
    for name, file in files.items():
        shown = fails(capsys, 1, pictures, "--model", model, f"--{name}", tmp_path / file)
        assert "--force" in shown
    (tmp_path / "maps" / "notes.png").write_text("kept")
    assert run(capsys, pictures / "e.png", *command[1:], "--force")[0] == 0
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["00000-e.png", "notes.png"]
    shown = fails(capsys, 2, pictures, "--model", model, "--maps", pictures / "sub", "--force")
    assert "--maps is a directory of images that are scored" in shown


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
    given = report(capsys, *one, *shared, "--label", 1, "--reference", pictures)
    with_class = pipeline.score(one, labels=1).compare(pipeline.score(sorted(pictures.rglob("*.png")), labels=1))
    assert given["auroc"]["ood"] == with_class
    several = fails(capsys, 2, *one, *shared, "--label", "0,1", "--reference", pictures)
    assert "--label with several numbers says nothing of the images of --reference" in several
    unlike = fails(capsys, 1, *one, *shared, "--label", 1, "--reference", tmp_path / "a.npz")
    assert "the reference was scored without classes given, these are with" in unlike
    other = "the reference is of 9 colours"
    assert other in fails(capsys, 1, *one, "--device", "cpu", "--reference", tmp_path / "a.npz")


def test_a_reference_of_which_nothing_can_be_read(
    capsys: pytest.CaptureFixture[str], model: Path, pictures: Path, tmp_path: Path
) -> None:
    """What was asked for is written, and there is no AUROC: which is an error."""
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "a.png").write_text("hello")
    (folder / "b.png").write_text("hello")
    command = (pictures, "--model", model, "--device", "cpu", "--reference", folder, "--csv", tmp_path / "a.csv")
    assert "2 of 7 images cannot be read (--skip-unreadable)" in fails(capsys, 1, *command)
    code, out, err = run(capsys, *command, "--skip-unreadable")
    assert code == 1
    assert "5 images" in out
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 6
    assert err.splitlines()[-1] == f"igpt score: {folder}: none of its 2 images can be read"
    Image.new("RGB", (4, 4)).save(folder / "c.png")
    found = report(capsys, *command, "--skip-unreadable", "--force")
    assert (found["skipped"], found["images"]) == (2, 5)
    assert found["auroc"].keys() == {"nats_per_pixel", "ood"}


@pytest.mark.parametrize("as_reference", [False, True])
def test_token_files_that_are_not_the_models(
    capsys: pytest.CaptureFixture[str], model: Path, pictures: Path, tmp_path: Path, as_reference: bool
) -> None:
    clusters = np.asarray(Pipeline.from_pretrained(model, device="cpu").processor.clusters)
    tokens, heldout = torch.arange(48).view(3, 16).to(torch.uint8) % 9, torch.tensor([True, False, False])
    for tokenizer, reason in (
        (CodeTokenizer(9, 4, 4), "its tokens are codes of a vocabulary, the model's are colours"),
        (ColourTokenizer(clusters, 2, 8), "its images are of 2x8 pixels, the model's of 4x4"),
        (ColourTokenizer(clusters[::-1], 4, 4), "its tokens are of another palette (9 colours) than the model's (9)"),
    ):
        data = TokenData(tokens, tokenizer.clusters, heldout, tokenizer=tokenizer)
        save_tokens(data, tmp_path / "t.npz")
        files = (pictures, "--reference", tmp_path / "t.npz") if as_reference else (tmp_path / "t.npz",)
        assert f"t.npz, heldout: {reason}" in fails(capsys, 1, *files, "--model", model, "--device", "cpu")


def test_names_are_taken_together_once(model: Path, pictures: Path) -> None:
    """Not for each image: of many that would take the square of their number."""
    paths = sorted(pictures.glob("*.png"))
    images, others = (command._Set("a", [path.name for path in some], some) for some in (paths[:3], paths[3:]))
    how = command.ScoreOptions(str(model), label="0,1")
    job = command._Job(images, others, Pipeline.from_pretrained(model), World(), how, False)
    assert job.names is job.names
    assert job.labels is job.labels
    assert [job.items(range(i, j)) for i, j in ((0, 2), (2, 4), (3, 4))] == [paths[:2], paths[2:], paths[3:]]


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
    shown = fails(capsys, 1, tmp_path / "t.npz", *shared, "--reference", tmp_path / "n.npz")
    assert "n.npz: has no held-out image, which a reference is made of" in shown
    assert "alone" in fails(capsys, 2, tmp_path / "t.npz", tmp_path / "t.npz", *shared)


def test_labels(capsys: pytest.CaptureFixture[str], model: Path, pictures: Path) -> None:
    shared = (pictures, "--model", model, "--device", "cpu")
    plain, given = report(capsys, *shared), report(capsys, *shared, "--label", "0,1")
    assert plain["nats_per_pixel"] != given["nats_per_pixel"]
    assert [row["label"] for row in sorted(given["scores"], key=lambda row: row["image"])] == [0, 1, 0, 1, 0]
    assert "--label 2 is not in 0..1" in fails(capsys, 2, *shared, "--label", 2)
    assert "--label 9 is not in 0..8" in fails(capsys, 2, pictures, "--label", 9)


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
    for option, value in (("--by", "bits"), ("--split", "some"), ("--show", "-1"), ("--dtype", "int4")):
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


def test_what_was_scored_before_a_failure_is_saved(
    capsys: pytest.CaptureFixture[str], model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, calls = scoring.image_nats, []

    def breaks(*args: Any) -> torch.Tensor:
        calls.append(1)
        return before(*args) * (torch.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(scoring, "image_nats", breaks)
    shared = ("--model", model, "--device", "cpu", "--batch-size", 2, "--reference", pictures / "sub")
    code, out, err = run(capsys, pictures, *shared, "--csv", tmp_path / "a.csv", "--json")
    found = json.loads(out)
    assert (code, found["images"], found["auroc"]) == (1, 4, None)
    assert "the logits are not finite" in found["error"]
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 5
    assert err.startswith("igpt score: the logits are not finite (")


def test_a_disk_that_is_full_leaves_nothing_half_written(
    capsys: pytest.CaptureFixture[str], model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Scores, path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Scores, "_write_csv", full)
    options = ("--csv", tmp_path / "a.csv", "--maps", tmp_path / "maps")
    code, out, err = run(capsys, pictures, "--model", model, "--device", "cpu", *options)
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


@pytest.mark.skipif(backend._C is None, reason=str(backend.native_reason))
def test_int8(capsys: pytest.CaptureFixture[str], model: Path, pictures: Path) -> None:
    shared = (pictures, "--model", model, "--device", "cpu")
    plain, rounded = (report(capsys, *shared, "--dtype", dtype)["nats_per_pixel"] for dtype in ("float32", "int8"))
    assert 0 < abs(plain - rounded) < 0.01
    before = backend.get_backend()
    try:
        code, out, err = run(capsys, *shared, "--dtype", "int8", "--backend", "reference")
    finally:
        backend.set_backend(before)
    assert (code, out) == (3, "")
    assert "dtype 'int8' is not available: the backend 'reference' is chosen" in err


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


FAILING = """
import os, sys
from igpt_fast.cli import main
from igpt_fast.likelihood import scoring
rank, kind = os.environ["RANK"], sys.argv.pop(1)
before, calls = scoring.image_nats, []
def breaks(*args):
    calls.append(1)
    if kind == "breaks" and rank == "1" and len(calls) == 2:
        raise RuntimeError("broken")
    return before(*args)
scoring.image_nats = breaks
if kind == "differs" and rank == "1":
    sys.argv[1:] = [word.replace("pictures", "pictures/sub") for word in sys.argv[1:]]
sys.exit(main.main(["score", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("kind", ["breaks", "differs"])
def test_one_of_two_processes_fails(model: Path, pictures: Path, tmp_path: Path, kind: str) -> None:
    """In the middle: what the other has scored is saved; where it finds other images: nothing is."""
    (tmp_path / "program.py").write_text(FAILING)
    for i in range(3):
        (pictures / f"sub/{i}.png").write_bytes((pictures / "a.png").read_bytes())
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "program.py"))
    shared = (str(pictures), "--model", str(model), "--device", "cpu", "--batch-size", "1", "--json")
    done = subprocess.run(
        [*torchrun, kind, *shared, "--csv", str(tmp_path / "a.csv")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 1
    if kind == "breaks":
        found = json.loads(done.stdout)
        assert (found["images"], found["processes"], found["error"]) == (4, 2, "rank 1: broken")
        assert len((tmp_path / "a.csv").read_text().splitlines()) == 5
        assert "igpt score: rank 1: broken" in done.stderr
    else:
        assert not done.stdout
        assert not (tmp_path / "a.csv").exists()
        assert "igpt score: rank 1: finds other images than the first process: 4, from " in done.stderr


def test_the_bar_shows_what_all_processes_have_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    together = World()
    monkeypatch.setattr(together, "progress", lambda done: done + 3.0)  # of the others
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = command._Bar(together, 10)
    bar.begin("reading", 4)
    bar.read(4)
    assert (bar._bar.n, bar._bar.total) == (4, 4)
    bar.begin("scoring", 10)
    bar.scored(2)
    assert (bar._bar.n, bar._bar.total) == (5, 10)
    bar.show(10.0)
    assert bar._bar.n == 10
    bar.close()
