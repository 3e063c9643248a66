"""What sample and complete write: all of it or nothing, and nothing over something that is there."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from igpt_fast.cli.checks import UsageError
from igpt_fast.cli.draw import exports
from igpt_fast.cli.draw.exports import Exports
from igpt_fast.cli.draw.options import Files
from igpt_fast.pipeline import Pipeline
from igpt_fast.sampling import results
from igpt_fast.sampling.results import Generation


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_pretrained(device="cpu")


@pytest.fixture
def generation(pipeline: Pipeline) -> Generation:
    tokens = torch.randint(128, (3, 256))
    return Generation(tokens, -torch.rand(3, 256), pipeline.processor, (1 << 64) - 1, labels=torch.tensor([2, 0, 1]))


NAMES = [f"{i:05}.png" for i in range(5)]


def all_files(folder: Path, **more: Any) -> Exports:
    paths = {"gif": folder / "a.gif", "singles": folder / "s", "tokens": folder / "a.npz", "sidecar": folder / "a.json"}
    return Exports(folder / "a.png", Files(**(paths | more)), NAMES)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_everything_is_written(generation: Generation, tmp_path: Path) -> None:
    """Images 0, 1 and 4 of five: the others were not finished."""
    target = all_files(tmp_path, upscale=3)
    target.check()
    told = target.write(generation, [0, 1, 4], {"seed": generation.seed})
    assert listing(tmp_path) == ["a.gif", "a.json", "a.npz", "a.png", "s", "s/00000.png", "s/00001.png", "s/00004.png"]
    for number, image in zip([0, 1, 4], generation.images, strict=True):
        with Image.open(tmp_path / "s" / f"{number:05}.png") as single:
            assert np.array_equal(np.asarray(single), np.asarray(image).repeat(3, axis=0).repeat(3, axis=1))
    with Image.open(tmp_path / "a.png") as grid, Image.open(tmp_path / "a.gif") as animation:
        assert grid.size == animation.size == (2 * 48 + 3, 2 * 48 + 3)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert (arrays["tokens"].shape, arrays["tokens"].dtype) == ((3, 16, 16), np.uint16)
        assert np.array_equal(arrays["tokens"].reshape(3, -1), generation.tokens.numpy())
        assert np.array_equal(arrays["logprobs"].reshape(3, -1), generation.logprobs.numpy())
        assert int(arrays["seed"]) == generation.seed
        assert arrays["labels"].tolist() == [2, 0, 1]
        assert np.array_equal(arrays["clusters"], generation.processor.clusters)
    sidecar = json.loads((tmp_path / "a.json").read_text())
    assert sidecar["seed"] == generation.seed
    assert sidecar["files"]["singles"] == [str(tmp_path / "s" / NAMES[i]) for i in (0, 1, 4)]
    assert told["singles"] == str(tmp_path / "s")
    assert told["tokens"] == sidecar["files"]["tokens"] == str(tmp_path / "a.npz")


def test_without_upscale_single_images_are_as_the_model_has_them(generation: Generation, tmp_path: Path) -> None:
    all_files(tmp_path).write(generation, [0, 1, 2], {})
    with Image.open(tmp_path / "s" / "00002.png") as single, Image.open(tmp_path / "a.png") as grid:
        assert single.size == (16, 16)
        assert grid.size == (2 * 128 + 8, 2 * 128 + 8)


@pytest.mark.parametrize("name", ["a.png", "a.gif", "a.npz", "a.json", "s/00003.png"])
def test_nothing_is_replaced_unless_asked_for(generation: Generation, tmp_path: Path, name: str) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / name).write_text("mine")
    (tmp_path / "s" / "other.png").write_text("mine too")
    with pytest.raises(FileExistsError, match="--force"):
        all_files(tmp_path).check()
    with pytest.raises(FileExistsError, match=name):  # it came while the images were drawn
        all_files(tmp_path).write(generation, [0, 1, 3], {})
    assert listing(tmp_path) == sorted(["s", "s/other.png", name])
    assert (tmp_path / name).read_text() == "mine"
    forced = all_files(tmp_path, force=True)
    forced.check()
    forced.write(generation, [0, 1, 3], {})
    assert (tmp_path / name).read_bytes() != b"mine"
    assert (tmp_path / "s" / "other.png").read_text() == "mine too"


@pytest.mark.parametrize("broken", ["save_tokens", "_save_single"])
def test_a_failure_leaves_nothing(
    generation: Generation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results if broken == "save_tokens" else Exports, broken, fail)
    with pytest.raises(OSError, match="No space left"):
        all_files(tmp_path).write(generation, [0, 1, 2], {})
    assert listing(tmp_path) == []


def test_names_that_cannot_be(tmp_path: Path) -> None:
    wrong = {"gif": "a.png", "tokens": "a.npy", "sidecar": "a.txt"}
    for option, name in wrong.items():
        with pytest.raises(UsageError, match="must end in"):
            Exports(tmp_path / "a.png", Files(**{option: tmp_path / name}), NAMES).check()
        suffix = {"gif": ".gif", "tokens": ".npz", "sidecar": ".json"}[option]
        with pytest.raises(FileNotFoundError, match="no such directory"):
            Exports(tmp_path / "a.png", Files(**{option: tmp_path / "none" / f"a{suffix}"}), NAMES).check()
    with pytest.raises(FileNotFoundError, match="no such directory"):
        Exports(tmp_path / "a.png", Files(singles=tmp_path / "none" / "s"), NAMES).check()
    with pytest.raises(UsageError, match="single image"):
        Exports(tmp_path / NAMES[1], Files(singles=tmp_path), NAMES).check()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="not a directory"):
        Exports(tmp_path / "a.png", Files(singles=tmp_path / "file"), NAMES).check()
    with pytest.raises(OSError, match="cannot be written"):
        Exports(tmp_path / "a.png", Files(singles=Path("/proc/singles")), NAMES).check()


def test_a_directory_stands_in_the_way(generation: Generation, tmp_path: Path) -> None:
    (tmp_path / "s" / "00002.png").mkdir(parents=True)
    for force in (False, True):
        with pytest.raises(IsADirectoryError, match=r"00002\.png: is a directory"):
            all_files(tmp_path, force=force).check()


def test_singles_and_a_file_of_one_name(tmp_path: Path) -> None:
    for option, name in {"out": "a.png", "gif": "a.gif", "tokens": "a.npz", "sidecar": "a.json"}.items():
        target = all_files(tmp_path, singles=tmp_path / "." / name)
        with pytest.raises(UsageError, match=rf"{name}: is also the directory of --singles"):
            target.check()
        assert listing(tmp_path) == [], option


def test_images_of_another_run(generation: Generation, tmp_path: Path) -> None:
    """They would be taken for this one's: refused; nothing is removed."""
    others = ["00005.png", "00077.png", "123456.png"]
    stay = ["00000-00.png", "0005.png", "000005.png", "00006.PNG", "00007.png.bak", "x00008.png", "٠٠٠٠٩.png"]
    (tmp_path / "s" / "00009.png").mkdir(parents=True)
    for name in others + stay:
        (tmp_path / "s" / name).write_text("old")
    for force in (False, True):
        with pytest.raises(FileExistsError, match=r"00005\.png: is not among this run's images, one of 3; choose an"):
            all_files(tmp_path, force=force).check()
    for name in others:
        (tmp_path / "s" / name).unlink()
    target = all_files(tmp_path)
    target.check()
    target.write(generation, [0, 1, 4], {})
    names = sorted(path.name for path in (tmp_path / "s").iterdir())
    assert names == sorted([*stay, "00009.png", "00000.png", "00001.png", "00004.png"])
    again = all_files(tmp_path, force=True)
    with pytest.raises(FileExistsError, match="exists already; pass --force"):
        Exports(tmp_path / "b.png", Files(singles=tmp_path / "s"), NAMES).check()
    again.check()


def test_a_failed_export_leaves_the_tokens(generation: Generation, tmp_path: Path) -> None:
    target = all_files(tmp_path)
    words = target.rescue(generation)
    (name,) = listing(tmp_path)
    assert re.fullmatch(r"a\.[0-9a-f]{8}\.npz", name)
    assert words == f"the tokens alone are saved in {tmp_path / name}"
    with np.load(tmp_path / name) as arrays:
        assert np.array_equal(arrays["tokens"].reshape(3, -1), generation.tokens.numpy())
    nowhere = Exports(tmp_path / "none" / "a.png", Files(), ())
    assert nowhere.rescue(generation).startswith("the tokens alone cannot be saved either: ")


def test_too_large_a_grid_is_said_with_a_way_out(pipeline: Pipeline, tmp_path: Path) -> None:
    """Of numbers alone."""
    all_files(tmp_path).check_size(pipeline.processor, 3)
    Exports(tmp_path / "a.png", Files(upscale=1), ()).check_size(pipeline.processor, 4, inputs=2)
    for grid, columns, size, words in (
        ("a.webp", 1, (5000,), "a WEBP has 16383 at most"),
        ("a.jpg", 1, (5000,), "a JPEG has 65500 at most"),
        ("a.png", 70_000, (5000,), "a GIF has 65535 at most"),
        ("a.png", None, (1 << 24,), r"image_grid: \d+x\d+ is more than \d+ pixels"),
        ("a.png", None, (6 << 20, 3), r"image_grid: 35651634x50 is more than \d+ pixels"),
    ):
        animation = tmp_path / "a.gif" if "GIF" in words else None
        target = Exports(tmp_path / grid, Files(upscale=1, gif=animation), (), columns)
        with pytest.raises(UsageError, match=words) as error:
            target.check_size(pipeline.processor, *size)
        assert str(error.value).endswith("; make the grid's images smaller with --upscale 1, or draw fewer")
    assert listing(tmp_path) == []


@pytest.mark.parametrize(("columns", "scale", "count"), [(None, None, 5), (2, 3, 5), (9, 1, 5), (None, 2, 1)])
def test_the_size_of_a_grid_is_known_before(
    pipeline: Pipeline, columns: int | None, scale: int | None, count: int
) -> None:
    tokens = torch.zeros(count, 256, dtype=torch.int64)
    grid = Generation(tokens, tokens, pipeline.processor, 0).grid(columns=columns, scale=scale)
    assert results.grid_pixels(pipeline.processor, count, 0, columns, scale) == grid.size
    picture = Image.new("RGB", (16, 16))
    several = Generation(tokens, tokens, pipeline.processor, 0, inputs=[picture], originals=tokens[:1])
    assert results.grid_pixels(pipeline.processor, count, 1, None, scale) == several.grid(scale=scale).size


def test_the_hash_is_of_names_types_shapes_and_values() -> None:
    model = torch.nn.Linear(2, 3)
    digest = hashlib.sha256()
    for name, tensor in (("bias", model.bias), ("weight", model.weight)):
        digest.update(f"{name} float32 {tuple(tensor.shape)}\n".encode() + tensor.detach().numpy().tobytes())
    before = exports.weights_hash(model)
    assert before == digest.hexdigest()
    with torch.no_grad():
        model.weight[1, 1] += 1e-6
    assert exports.weights_hash(model) != before
    assert exports.weights_hash(model.bfloat16()) != before


def test_a_grid_that_nobody_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    many = exports.MOST_IN_GRID + 1
    tokens = Files(tokens=Path("t.npz"))
    assert Exports.of(None, "a.png", tokens, many - 1, names=()).grid == Path("a.png")
    assert Exports.of(None, "a.png", tokens, many, names=()).grid is None
    assert Exports.of(Path("b.png"), "a.png", tokens, many, names=()).grid == Path("b.png")
    assert Exports.of(None, "a.png", Files(grid=False, singles=Path("s")), 2, names=()).grid is None
    for out, files, count, reason in (
        (None, Files(sidecar=Path("a.json")), many, f"of {many} images no grid is made unless --out names it: give"),
        (None, Files(grid=False), 2, "--no-grid: give --tokens"),
        (Path("b.png"), Files(grid=False, tokens=Path("t.npz")), 2, "give one of them"),
    ):
        with pytest.raises(UsageError, match=reason):
            Exports.of(out, "a.png", files, count, names=())


def test_without_a_grid(generation: Generation, tmp_path: Path) -> None:
    target = Exports.of(None, "a.png", Files(grid=False, tokens=tmp_path / "t.npz"), 3, names=())
    target.check()
    target.check_size(generation.processor, 1 << 24)
    assert target.write(generation, range(3), {})["out"] is None
    assert listing(tmp_path) == ["t.npz"]
    assert re.search(r"saved in \S+t\.\w{8}\.npz", target.rescue(generation))


def test_numbered(generation: Generation, tmp_path: Path) -> None:
    """All files of a run have its number, the first that is free for all of them."""
    files = Files(tokens=tmp_path / "t.npz", singles=tmp_path / "s", number=True)
    for number in ("", "-2", "-4"):
        target = Exports.of(tmp_path / "a.png", "", files, 3, names=NAMES)
        target.check()
        target.write(generation, range(3), {})
        assert (tmp_path / f"a{number}.png").exists()
        assert (tmp_path / f"t{number}.npz").exists()
        assert (tmp_path / f"s{number}" / NAMES[2]).exists()
        (tmp_path / "t-3.npz").touch()
    with pytest.raises(UsageError, match="--number"):
        Exports.of(tmp_path / "a.png", "", Files(number=True, force=True), 3, names=())


def test_labels_of_columns(generation: Generation, tmp_path: Path, pipeline: Pipeline) -> None:
    completed = pipeline.complete(generation.images[:1], keep=15, n=1, seed=1)
    sizes = []
    for labels in (True, False):
        Exports(tmp_path / "a.png", Files(force=True), (), labels=labels).write(completed, [0], {})
        with Image.open(tmp_path / "a.png") as grid:
            sizes.append(grid.size)
        assert results.grid_pixels(pipeline.processor, 1, 1, None, None, labels) == sizes[-1]
    (width, labelled), (same, plain) = sizes
    assert width == same
    assert 15 < labelled - plain < 40
