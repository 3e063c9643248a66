"""Shards and large folders as data of a run: mapped or read as it goes, compared with the manifest, refused by name."""

import json
import pickle
import threading
import warnings
import zipfile
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from igpt_fast.cli import main as cli
from igpt_fast.learning import shards as shards_module
from igpt_fast.learning import taking
from igpt_fast.learning.folders import tokens_from_images
from igpt_fast.learning.lazy import FolderData
from igpt_fast.learning.run import run
from igpt_fast.learning.settings import TrainConfig
from igpt_fast.learning.shards import ShardData, has_labels, is_shards, sha256_of
from igpt_fast.learning.sources.folder import Folder
from igpt_fast.learning.taking import Taking
from igpt_fast.learning.tokenize import tokenize

N = 24
TINY = TrainConfig(n_layer=1, n_embd=16, n_head=2, steps=2, batch_size=4, eval_every=2)
HOW = Taking(4, 4, n_clusters=5, classes=True, holdout=0.3, shard_size=10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(N):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    tokenize(folder, tmp_path / "shards", HOW)
    return tmp_path / "shards"


def lazy(folder: Path, *, skip: bool = False) -> FolderData:
    return FolderData(Folder.open(folder), HOW, skip_unreadable=skip)


def test_all_kinds_of_data_are_the_same_run(folder: Path, shards: Path, tmp_path: Path) -> None:
    memory = tokens_from_images(folder, 4, 5, 0.3, classes=True)
    kinds = {"memory": memory, "shards": ShardData(shards, classes=True), "folder": lazy(folder)}
    figures = []
    for name, data in kinds.items():
        assert torch.equal(data.train_batch([3, 0, 3])[0], memory.train_batch([3, 0, 3])[0])
        summary = run(data, tmp_path / name, TINY)
        figures.append({key: value for key, value in summary.items() if key.endswith(("nats", "images", "skipped"))})
    assert figures[0] == figures[1] == figures[2]
    assert len({data.fingerprint() for data in kinds.values()}) == 3
    assert kinds["shards"].fingerprint() == ShardData(shards, classes=True).fingerprint()
    assert kinds["shards"].fingerprint() != ShardData(shards).fingerprint()
    assert lazy(folder).fingerprint() == kinds["folder"].fingerprint()


def test_a_run_begins_before_all_is_read(folder: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = lazy(folder)
    data.train_batch([0, 5])
    assert data.n_read == 2
    released, hashed = threading.Event(), []

    def hash_later(path: Path) -> str:
        assert released.wait(60)
        hashed.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(shards_module, "sha256_of", hash_later)
    mapped = ShardData(shards)
    mapped.train_batch([0])
    assert not hashed
    released.set()
    mapped.verify()
    assert hashed == ["shard-00000.npy", "shard-00001.npy", "shard-00002.npy"]


def test_a_damaged_shard_ends_the_run_at_the_next_batch(shards: Path) -> None:
    _flip(shards / "shard-00002.npy")
    data = ShardData(shards)
    with pytest.raises(ValueError, match=r"shard-00002\.npy: is damaged"):
        data.verify()
    with pytest.raises(ValueError, match=r"shard-00002\.npy: is damaged"):
        data.train_batch([0])


def test_a_token_out_of_range_is_never_trained_on(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardData, "_hashing", Future())  # has not come so far
    data = ShardData(shards)
    content = bytearray((shards / "shard-00001.npy").read_bytes())
    content[-16:] = b"\xff" * 16
    (shards / "shard-00001.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00001\.npy: token 255 is not in 0\.\.4"):
        data.at(torch.tensor([0, 19]))


def test_they_go_to_other_processes_without_their_tokens(folder: Path, shards: Path) -> None:
    for data in (lazy(folder), ShardData(shards, classes=True)):
        wanted = data.train_batch([1, 2])
        again = pickle.loads(pickle.dumps(data))
        assert torch.equal(again.train_batch([1, 2])[0], wanted[0])
        assert torch.equal(again.train_batch([1, 2])[1], wanted[1])
        assert again.fingerprint() == data.fingerprint()


def test_an_unreadable_picture_of_a_large_folder(folder: Path) -> None:
    data = lazy(folder)
    place = int(data._places[0][2])
    broken = folder / data._source.names[place]
    broken.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=broken.name):
        data.train_batch([2])
    skipping = lazy(folder, skip=True)
    with pytest.warns(UserWarning, match=f"skipped .*{broken.name}"):
        tokens, labels = skipping.train_batch([2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        following = skipping.train_batch([3])
    assert torch.equal(tokens, following[0])
    assert torch.equal(labels, following[1])  # type: ignore[arg-type]
    assert skipping.skipped == 1


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("shard-00001.npy", r"shard-00001\.npy: is damaged or of another data set"),
        ("clusters.npy", r"clusters\.npy: is another palette than the manifest's"),
        ("heldout.npy", r"heldout\.npy: is damaged"),
        ("labels.npy", r"labels\.npy: is damaged"),
    ],
)
def test_a_damaged_file_is_named(shards: Path, name: str, reason: str) -> None:
    _flip(shards / name)

    def read() -> None:
        data = ShardData(shards, classes=True)
        data.verify()

    with pytest.raises(ValueError, match=reason):
        read()
    (shards / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        ShardData(shards, classes=True)


def test_a_shard_that_is_cut_or_of_another_size(shards: Path) -> None:
    (shards / "shard-00000.npy").write_bytes((shards / "shard-00000.npy").read_bytes()[:-16])
    with pytest.raises(ValueError, match=r"shard-00000\.npy: is damaged"):
        ShardData(shards)
    with zipfile.ZipFile(shards / "shard-00000.npy", "w") as archive:
        archive.writestr("a.npy", b"")
    with pytest.raises(ValueError, match=r"shard-00000\.npy: is damaged"):
        ShardData(shards)
    np.save(shards / "shard-00000.npy", np.zeros((10, 9), np.uint8))
    with pytest.raises(ValueError, match=r"shard-00000\.npy: holds \(10, 9\) uint8; the manifest says \(10, 16\)"):
        ShardData(shards)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 2}, "version 2"),
        ({"shards": []}, "names no shards"),
        (
            {"shards": [{"file": "../shard-00000.npy", "images": 1, "sha256": ""}]},
            r"its shard 0 is not shard-00000\.npy",
        ),
        ({"shards": [{"file": "shard-00000.npy", "images": -1, "sha256": ""}]}, "images is -1"),
        ({"classes": "ab"}, "its classes is 'ab'"),
        ({"heldout": None}, "heldout is None"),
        ({"tokenizer": {"kind": "colours", "vocabulary": 1e9}}, "vocabulary"),
        ({"tokenizer": {"kind": "codes", "vocabulary": 5, "height": 4, "width": 4}}, "another tokenizer"),
        ({"tokenizer": {}}, "neither of colours nor of codes"),
    ],
)
def test_bad_manifests(shards: Path, change: dict, reason: str) -> None:
    path = shards / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=rf"manifest\.json: .*{reason}"):
        ShardData(shards)


def test_a_manifest_of_something_else(folder: Path, tmp_path: Path, shards: Path) -> None:
    for name in ("manifest.json", "plan.json"):
        (folder / name).write_text('{"name": "my album"}')
    assert not is_shards(folder)
    assert has_labels(folder)
    assert is_shards(shards)
    (shards / "manifest.json").write_bytes((shards / "manifest.json").read_bytes()[:200])
    assert is_shards(shards)  # damaged, which is said then
    settings = ["--steps", "1", "--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--batch-size", "2"]
    how = ["--side", "4", "-k", "5", "--out", str(tmp_path / "run")]
    assert cli.main(["train", str(folder), *how, *settings]) == 0


def test_a_token_file_that_cannot_be_looked_into(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("tokens.npy", b"")
    content = (tmp_path / "a.npz").read_bytes()
    place = content.index(b"PK\x01\x02")
    (tmp_path / "a.npz").write_bytes(content[: place + 6] + b"\x63\x00" + content[place + 8 :])  # wants version 9.9
    assert has_labels(tmp_path / "a.npz")


def test_a_large_folder_on_the_command_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(taking, "SAMPLE", N - 1)
    (folder / "a" / "00.png").write_bytes(b"no picture")
    how = ["--side", "4", "-k", "5", "--steps", "2", "--n-layer", "1", "--n-embd", "16", "--n-head", "2"]
    how += ["--batch-size", str(N), "--out", str(tmp_path / "run"), "--json", "--skip-unreadable"]
    assert cli.main(["train", str(folder), "--classes", *how]) == 0
    printed, err = capsys.readouterr()
    assert err.count("igpt: skipped a/00.png: ") == 1
    summary = json.loads(printed)
    assert (summary["images"], summary["skipped"]) == (N, 1)


def test_command_line(folder: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def igpt(*args: object) -> tuple[int, str, str]:
        settings = ["--steps", "1", "--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--batch-size", "2"]
        code = cli.main(["train", *map(str, args), "--out", str(tmp_path / "run"), *settings])
        return code, *capsys.readouterr()

    tokenize(folder, tmp_path / "plain", Taking(4, 4, n_clusters=5))
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "plan.json").write_text('{"format": "igpt_fast token shards"}')
    for code, arguments, reason in (
        (2, [tmp_path / "plain", "--classes"], "plain has no labels"),
        (2, [shards, "--side", "8"], "--side: only for a directory of images"),
        (1, [tmp_path / "unfinished"], "igpt tokenize --resume"),
    ):
        got, printed, err = igpt(*arguments)
        assert (got, printed, err.count("\n")) == (code, "", 1), err
        assert reason in err
    code, printed, _ = igpt(shards, "--classes", "--json")
    assert code == 0
    assert json.loads(printed)["images"] == N
    code, _, err = igpt(tmp_path / "plain", "--resume")
    assert code == 1
    assert "the data differ" in err
