"""Scores: figures from the nats, comparison, files that nobody trusts, and pictures of them."""

import csv
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from igpt_fast import ImageGPTImageProcessor, Scores
from igpt_fast.likelihood.scores import auroc, merge, select

HEIGHT, WIDTH, COLOURS = 3, 4, 16


def scores(count: int = 5, seed: int = 0, colours: int = COLOURS, **more: Any) -> Scores:
    random = np.random.default_rng(seed)
    clusters = np.random.default_rng(colours).uniform(-1, 1, (colours, 3)).astype(np.float32)
    nats = torch.from_numpy(random.exponential(1.0, (count, HEIGHT * WIDTH)).astype(np.float32))
    tokens = torch.from_numpy(random.integers(0, colours, (count, HEIGHT * WIDTH)))
    processor = ImageGPTImageProcessor(clusters=clusters, size={"height": HEIGHT, "width": WIDTH})
    return Scores(nats, tokens, processor, [f"image {i}" for i in range(count)], "0123456789ab", **more)


@pytest.mark.parametrize(("colours", "width"), [(16, 1), (256, 1), (257, 2)])
def test_the_figures(colours: int, width: int) -> None:
    found = scores(colours=colours)
    nats = found.nats.double().numpy()
    want = [8 * len(zlib.compress(row.astype(f"<u{width}").tobytes(), 9)) for row in found.tokens.numpy()]
    assert found.complexity.tolist() == want
    np.testing.assert_allclose(found.nats_per_pixel, nats.mean(1))
    np.testing.assert_allclose(found.bits_per_pixel, nats.mean(1) / math.log(2))
    np.testing.assert_allclose(found.ood, nats.sum(1) / math.log(2) - np.array(want))
    assert found.palette.startswith(f"{colours} colours ")
    assert found.palette != scores(colours=colours + 1).palette


def test_the_most_unusual_image_is_first() -> None:
    found = scores(7)
    for by in ("nats_per_pixel", "ood"):
        values = found.measure(by)[found.order(by)].tolist()
        assert values == sorted(values, reverse=True)
        assert len(set(values)) == 7
    with pytest.raises(ValueError, match=r"by is 'bits'; want nats_per_pixel or ood"):
        found.order("bits")


@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_that_of_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    unusual, usual = random.integers(0, 9, 30) + 1.0, random.integers(0, 9, 40).astype(float)  # many are equal
    truth, values = np.repeat([1, 0], [30, 40]), np.concatenate([unusual, usual])
    assert auroc(unusual, usual) == pytest.approx(roc_auc_score(truth, values), abs=1e-12)


def test_compare_is_high_where_these_are_the_unusual_ones() -> None:
    usual, strange = scores(20), scores(30, seed=1)
    strange.nats.mul_(5.0)
    assert strange.compare(usual) > 0.9
    assert strange.compare(usual) + usual.compare(strange) == pytest.approx(1.0)
    assert usual.compare(usual) == 0.5


def test_what_cannot_be_compared_is_not() -> None:
    found = scores()
    with pytest.raises(ValueError, match=r"the reference is of 17 colours \w{8}, these are of 16 colours"):
        found.compare(scores(colours=17))
    other = scores()
    object.__setattr__(other, "model", "ba9876543210")
    with pytest.raises(ValueError, match="the reference is of the model ba9876543210"):
        found.compare(other)
    object.__setattr__(other, "model", found.model)
    other.processor.size = {"height": WIDTH, "width": HEIGHT}
    with pytest.raises(ValueError, match="the reference is of 4x3 pixels, these are of 3x4"):
        found.compare(other)
    given = scores(labels=torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="the reference was scored with classes given, these are without"):
        found.compare(given)
    with pytest.raises(ValueError, match="the reference was scored without classes given, these are with"):
        given.compare(found)
    with pytest.raises(ValueError, match="has no images"):
        found.compare(select(scores(), []))


@pytest.mark.parametrize("labels", [None, torch.arange(5)])
def test_npz_round_trip(tmp_path: Path, labels: torch.Tensor | None) -> None:
    found = scores(labels=labels)
    found.save(tmp_path / "a.npz")
    again = Scores.load(tmp_path / "a.npz")
    assert torch.equal(again.nats, found.nats)
    assert torch.equal(again.tokens, found.tokens)
    assert (again.names, again.model, again.palette) == (found.names, found.model, found.palette)
    assert again.labels is None if labels is None else torch.equal(again.labels, labels)
    assert torch.equal(again.ood, found.ood)
    assert (again.processor.height, again.processor.width) == (HEIGHT, WIDTH)
    with pytest.raises(FileExistsError):
        found.save(tmp_path / "a.npz", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_csv_has_every_figure_and_the_palette_beside_it(tmp_path: Path) -> None:
    found = scores(3)
    found = Scores(found.nats, found.tokens, found.processor, ['a,"b"\n', "\udc80", "c"], found.model)
    found.save(tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == found.names
    for name in ("nats_per_pixel", "bits_per_pixel", "bits", "complexity", "ood"):
        assert [float(row[name]) for row in rows] == getattr(found, name).tolist()
    assert {row["palette"] for row in rows} == {found.palette}
    assert [row["number"] for row in rows] == ["0", "1", "2"]
    with pytest.raises(ValueError, match=r"a\.txt: want a name that ends in \.npz or \.csv"):
        found.save(tmp_path / "a.txt")


BROKEN = {
    "nats": (np.zeros((5, 12), np.float32), r"nats must be \(N, H, W\) finite float32"),
    "nats of NaN": (np.full((5, 3, 4), np.nan, np.float32), "nats must be"),
    "tokens": (np.full((5, 3, 4), 16, np.uint16), "tokens must be"),
    "names": (np.arange(5), "names must be"),
    "model": (np.array(["a", "b"]), "model must be"),
    "labels": (np.zeros(4, np.int64), "labels must be"),
    "clusters": (np.full((16, 3), 7.0, np.float32), "clusters"),
    "names of objects": (np.array([{}] * 5, dtype=object), "not numbers"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_is_none_is_named(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a.npz"
    scores().save(path)
    with np.load(path) as file:
        arrays = dict(file)
    value, reason = BROKEN[what]
    np.savez(path, **arrays | {what.split()[0]: value})
    with pytest.raises(ValueError, match=rf"a\.npz: not a file of scores: .*{reason}"):
        Scores.load(path)


def test_a_text_is_no_file_of_scores(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_text("nats")
    with pytest.raises(ValueError, match=r"a\.npz: not a file of scores"):
        Scores.load(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError):
        Scores.load(tmp_path / "b.npz")


def test_parts_are_merged_in_order() -> None:
    whole = scores(5, labels=torch.arange(5))
    again = merge([select(whole, [0, 1]), select(whole, [2, 3, 4])], whole.processor)
    assert torch.equal(again.nats, whole.nats)
    assert torch.equal(again.labels, whole.labels)  # type: ignore[arg-type]
    assert again.names == whole.names


def test_maps_show_image_and_surprise() -> None:
    """Brighter where the nats are higher, and as bright as it gets from ln K on; the image beside it."""
    found = scores(2)
    found.nats[0] = torch.linspace(0.0, 1.2 * math.log(COLOURS), HEIGHT * WIDTH)
    found.tokens[0] = 3
    edge = 256 // WIDTH
    first, _ = found.maps()
    pixels = np.asarray(first).astype(int)
    image = np.asarray(found.images[0])
    assert (pixels[: HEIGHT * edge, : WIDTH * edge] == image.repeat(edge, 0).repeat(edge, 1)).all()
    left = WIDTH * edge + 6
    heat = pixels[edge // 2 : HEIGHT * edge : edge, left + edge // 2 : left + WIDTH * edge : edge].sum(-1).ravel()
    order = np.diff(heat)
    capped = int(np.argmax(found.nats[0].numpy() >= math.log(COLOURS)))
    assert (order[: capped - 1] > 0).all()
    assert (order[capped:] == 0).all()
    assert first.size == (2 * WIDTH * edge + 6 + 6 + 12 + 42, HEIGHT * edge)
    assert found.maps(scale=1)[0].height == 4 * 16  # room for what is written beside the bar
    with pytest.raises(ValueError, match="scale is 0"):
        found.maps(scale=0)


def test_maps_are_made_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from igpt_fast.likelihood import maps

    found, made, before = scores(3), [], maps.surprise_map
    monkeypatch.setattr(maps, "surprise_map", lambda *args: made.append(before(*args)) or made[-1])
    each = found.each_map()
    assert next(each).tobytes() == made[0].tobytes()
    assert len(made) == 1
    assert [picture.tobytes() for picture in found.maps()] == [made[0].tobytes(), *(item.tobytes() for item in each)]


@pytest.mark.parametrize(("count", "cells"), [(1, 1), (2, 2), (5, 5), (30, 16)])
def test_a_grid_has_each_image_once(count: int, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    from igpt_fast.likelihood import maps

    before = maps.extremes

    def extremes(sections: Any, colours: int) -> Any:
        seen.extend(cell.text.split("  ")[1] for _, section in sections for cell in section)
        return before(sections, colours)

    monkeypatch.setattr(maps, "extremes", extremes)
    found = scores(count)
    assert found.grid(by="ood").width > 200
    names = [found.names[i] for i in found.order("ood")]
    if cells < 16:
        assert sorted(seen) == sorted(names)
    else:
        assert seen == names[:8] + names[::-1][:8]
    with pytest.raises(ValueError, match="n is 0"):
        found.grid(0)
