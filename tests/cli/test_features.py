"""``igpt features`` as a user meets it: files, resuming, several processes, mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small

from igpt_fast import ImageGPTImageProcessor, backend
from igpt_fast.cli.main import main
from igpt_fast.learning import feature_files
from igpt_fast.learning.data import TokenData, save_tokens
from igpt_fast.learning.extraction import extract
from igpt_fast.learning.feature_files import parts_folder

COLOURS = 8
CLUSTERS = np.random.default_rng(1).uniform(-1, 1, (COLOURS, 3)).astype(np.float32)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "igpt_fast")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    small(vocab_size=COLOURS + 1, n_positions=16, n_embd=16, n_layer=3).save_pretrained(path)
    ImageGPTImageProcessor(CLUSTERS, size={"height": 4, "width": 4}).save_pretrained(path)
    return path


def dataset(n: int = 600, seed: int = 0) -> TokenData:
    tokens = torch.from_numpy(np.random.default_rng(seed).integers(0, COLOURS, (n, 16)))
    return TokenData(tokens, CLUSTERS, torch.arange(n) % 5 == 0, labels=torch.arange(n) % 2, class_names=["a", "b"])


def run(*args: object) -> int:
    return main(["features", *map(str, args), "--device", "cpu"])


def test_a_token_file(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tokens(dataset(), tmp_path / "d.npz")
    out = tmp_path / "f.npz"
    assert run(tmp_path / "d.npz", "--model", model, "--layers", "0,3", "--out", out, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert {key: report[key] for key in ("images", "skipped", "layers", "features", "sos", "classes", "processes")} == {
        "images": 600, "skipped": 0, "layers": [0, 3], "features": 16, "sos": True, "classes": 2, "processes": 1
    }  # fmt: skip
    from igpt_fast import ImageGPTModel

    wanted = extract(ImageGPTModel.from_pretrained(model), dataset().tokens, [0, 3])
    with np.load(out) as found:
        np.testing.assert_allclose(found["layer_3"], wanted[:, 1], rtol=1e-5, atol=1e-6)
        assert str(model.parent) not in str(found["about"])
    assert run(tmp_path / "d.npz", "--model", model, "--out", out) == 1
    assert "f.npz: exists already; pass --force" in capsys.readouterr().err
    more = ("--layers", "3", "--no-sos", "--bands", "4", "--force", "--json")
    assert run(tmp_path / "d.npz", "--model", model, "--out", out, *more) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["sos"], report["features"], report["bands"]) == (False, 64, 4)
    assert run(tmp_path / "d.npz", "--model", model, "--out", tmp_path / "f.parquet", "--pool", "none") == 0
    assert "f.parquet: 600 images, 3 layers of 256 features" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["d.npz", "f.npz", "f.parquet"]


def test_a_directory(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a/0.png", "b/1.png", "b/2.png"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 6), (200, 30, 60)).save(tmp_path / "d" / name)
    (tmp_path / "d/b/2.png").write_bytes(b"no picture")
    command = (tmp_path / "d", "--model", model, "--classes", "--out", tmp_path / "f.npz")
    assert run(*command) == 1
    assert "2.png: not a readable image" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["d"]
    assert run(*command, "--skip-unreadable", "--json", "--layers", "2") == 0
    captured = capsys.readouterr()
    assert "2.png: not a readable image" in captured.err
    assert json.loads(captured.out)["skipped"] == 1
    with np.load(tmp_path / "f.npz") as found:
        assert found["names"].tolist() == ["a/0.png", "b/1.png"]
        assert found["labels"].tolist() == [0, 1]


def test_interrupted_and_gone_on_with(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tokens(dataset(), tmp_path / "d.npz")
    save_tokens(dataset(seed=1), tmp_path / "other.npz")
    out = tmp_path / "f.npz"
    real, count = feature_files.extract, [0]

    def interrupted(*args: object, **how: object) -> object:
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        return real(*args, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(feature_files, "extract", interrupted)
    assert run(tmp_path / "d.npz", "--model", model, "--out", out) == 130
    assert "f.npz.parts; the same command goes on" in capsys.readouterr().err
    assert not out.exists()
    assert sorted(os.listdir(parts_folder(out))) == ["manifest.json", "part-00000.npy"]
    assert run(tmp_path / "other.npz", "--model", model, "--out", out) == 1
    assert "f.npz.parts: it holds parts of other data; begin anew (--force)" in capsys.readouterr().err
    assert run(tmp_path / "d.npz", "--model", model, "--out", out, "--dtype", "bfloat16") == 1
    assert "it holds parts of another model" in capsys.readouterr().err
    assert run(tmp_path / "d.npz", "--model", model, "--out", out) == 0
    assert "goes on with 512 of 600 images" in capsys.readouterr().err
    assert count[0] == 3
    monkeypatch.undo()
    assert run(tmp_path / "d.npz", "--model", model, "--out", tmp_path / "straight.npz") == 0
    assert out.read_bytes() == (tmp_path / "straight.npz").read_bytes()


def test_two_processes_write_the_file_of_one(tmp_path: Path, model: Path) -> None:
    save_tokens(dataset(), tmp_path / "d.npz")
    assert run(tmp_path / "d.npz", "--model", model, "--out", tmp_path / "one.npz") == 0
    command = ["features", tmp_path / "d.npz", "--model", model, "--device", "cpu", "--json", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    args = [*TORCHRUN, *map(str, command), str(tmp_path / "two.npz")]
    done = subprocess.run(args, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"] == 2
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["d.npz", "one.npz", "two.npz"]


@pytest.mark.skipif(backend._C is None, reason=str(backend.native_reason))
def test_int8(tmp_path: Path, model: Path) -> None:
    save_tokens(dataset(5), tmp_path / "d.npz")
    found = {}
    for dtype in ("float32", "int8"):
        out = tmp_path / f"{dtype}.npz"
        assert run(tmp_path / "d.npz", "--model", model, "--out", out, "--dtype", dtype) == 0
        with np.load(out) as file:
            found[dtype] = file["layer_3"], json.loads(str(file["about"]))["settings"]["dtype"]
    assert [settings for _, settings in found.values()] == [None, "int8"]
    error = np.abs(found["int8"][0] - found["float32"][0]).max() / np.abs(found["float32"][0]).max()
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [
        (("no/such",), 1, "no/such: no such file or directory"),
        (("{data}", "--layers", "4"), 2, "--layers is 4; want an integer in 0..3"),
        (("{data}", "--layers", "x"), 2, "--layers is 'x'"),
        (("{data}", "--pool", "max"), 2, "--pool is 'max'"),
        (("{data}", "--dtype", "int4"), 2, "--dtype is 'int4'"),
        (("{data}", "--bands", "0"), 2, "--bands is 0"),
        (("{data}", "--bands", "3"), 2, "--bands is 3; want a number that divides the 16"),
        (("{data}", "--bands", "2", "--pool", "none"), 2, "--bands is 2, and nothing is pooled"),
        (("{data}", "--classes"), 2, "--classes, --skip-unreadable: only for a directory"),
        (("{data}", "--out", "f.csv"), 2, "must end in .npz, .parquet"),
        (("{data}", "--out", "no/f.npz"), 1, "no: no such directory"),
        (("{tmp}",), 1, "no images in it"),
        (("{tmp}/broken.npz",), 1, "broken.npz: not a token file"),
    ],
)
def test_mistakes(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], code: int, reason: str
) -> None:
    save_tokens(dataset(5), tmp_path / "d.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK")
    given = [word.format(data=tmp_path / "d.npz", tmp=tmp_path) for word in args]
    out = () if "--out" in args else ("--out", tmp_path / "f.npz")
    assert run(*given, "--model", model, *out) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("igpt features: ")
    assert reason in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(os.listdir(tmp_path)) == ["broken.npz", "d.npz"]


def test_a_model_of_another_palette(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = TokenData(dataset(5).tokens, CLUSTERS[::-1].copy(), dataset(5).heldout)
    save_tokens(other, tmp_path / "d.npz")
    assert run(tmp_path / "d.npz", "--model", model, "--out", tmp_path / "f.npz") == 1
    assert "d.npz: its palette has other colours than the model's" in capsys.readouterr().err
