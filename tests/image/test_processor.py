"""ImageGPTImageProcessor against transformers': values, tokens, arguments and files."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from igpt_fast.config import ImageGPTConfig
from igpt_fast.image import ImageGPTImageProcessor, dequantize


def colours(height: int = 6, width: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def palette(k: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (k, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def hf() -> Any:
    from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

    return ImageGPTImageProcessorPil


# ---- the processor against transformers'


def disagreement(mine: np.ndarray, theirs: np.ndarray, values: np.ndarray, clusters: np.ndarray) -> int:
    """Tokens that differ although the two distances do by more than rounding; values: (..., 3)."""
    distance = [((values.astype(np.float64) - clusters[t].astype(np.float64)) ** 2).sum(-1) for t in (mine, theirs)]
    return int(((mine != theirs) & (np.abs(distance[0] - distance[1]) > 1e-5)).sum())


def pictures() -> list[Image.Image]:
    smooth = np.add.outer(np.arange(90) * 2, np.arange(70))[..., None] % 256 * [1.0, 0.7, 0.4]
    return [
        Image.fromarray(colours(40, 57)),
        Image.fromarray(smooth.astype(np.uint8)),
        Image.fromarray(colours(5, 9, 1)),
    ]


@pytest.mark.parametrize("size", [32, (16, 24), {"height": 50, "width": 3}])
@pytest.mark.parametrize("resample", [0, 2, 3, Image.Resampling.LANCZOS])
def test_tokens_agree_with_transformers(hf: Any, size: Any, resample: Any) -> None:
    clusters = palette(512)
    images = pictures()
    mine = ImageGPTImageProcessor(clusters, size=size, resample=resample)(images, return_tensors="np")
    theirs = hf(clusters=clusters, size=size, resample=resample)(images, return_tensors="np")
    assert mine.input_ids.dtype == theirs["input_ids"].dtype == np.int64
    assert mine["input_ids"].shape == theirs["input_ids"].shape
    raw = hf(clusters=clusters, size=size, resample=resample, do_color_quantize=False)(images, return_tensors="np")
    values = raw["pixel_values"].transpose(0, 2, 3, 1).reshape(*mine.input_ids.shape, 3)
    assert disagreement(mine.input_ids, theirs["input_ids"], values, clusters) == 0
    assert np.mean(mine.input_ids == theirs["input_ids"]) > 0.999


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
        {"image_mean": 0.25, "image_std": 2.0, "rescale_factor": 1 / 127.5},
        {"do_resize": False, "do_normalize": False},
    ],
)
def test_pixel_values_equal_transformers_bit_for_bit(hf: Any, options: dict[str, Any]) -> None:
    options = {"do_color_quantize": False, "size": 16, **options}
    images = pictures()
    mine = ImageGPTImageProcessor(**options)(images)["pixel_values"]
    theirs = hf(**options)(images)["pixel_values"]
    for ours, reference in zip(mine, theirs, strict=True):
        assert ours.dtype == reference.dtype
        np.testing.assert_array_equal(ours, reference)


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [({"do_normalize": False}, 0, 1), ({"image_mean": 0.4}, -0.8, 1.2), ({"do_rescale": False}, -1, 509)],
)
def test_tokens_of_unusual_scalings(hf: Any, options: dict[str, Any], low: float, high: float) -> None:
    clusters = np.random.default_rng(0).uniform(low, high, (64, 3)).astype(np.float32)
    options = {"clusters": clusters, "size": 16, "resample": 0, **options}
    image = pictures()[0]
    mine = ImageGPTImageProcessor(**options)(image)["input_ids"][0]
    theirs = hf(**options)(image)["input_ids"][0]
    assert np.mean(mine == theirs) > 0.99
    assert len(np.unique(mine)) > 32


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(41, 70), st.integers(0, 2))
def test_sizes_that_keep_the_aspect(hf: Any, height: int, width: int, small: int, large: int, kind: int) -> None:
    size = [
        {"shortest_edge": small},
        {"shortest_edge": small, "longest_edge": large},
        {"max_height": small, "max_width": large},
    ]
    image = Image.fromarray(colours(height, width))
    try:
        theirs = hf(do_color_quantize=False, size=size[kind])(image)["pixel_values"][0]
    except (ValueError, ZeroDivisionError):  # transformers rounds an edge down to nothing
        assert kind > 0
        return
    mine = ImageGPTImageProcessor(do_color_quantize=False, size=size[kind])(image)["pixel_values"][0]
    np.testing.assert_array_equal(mine, theirs)


def test_the_usual_path_is_the_uint8_quantizer_and_exact() -> None:
    clusters = palette(512)
    image = colours(32, 32)
    tokens = ImageGPTImageProcessor(clusters)(image, return_tensors="np").input_ids[0]
    values = image.reshape(-1, 1, 3) / 127.5 - 1.0
    np.testing.assert_array_equal(tokens, ((values - clusters.astype(np.float64)) ** 2).sum(-1).argmin(-1))


def test_mixed_kinds_in_one_batch(tmp_path: Path) -> None:
    processor = ImageGPTImageProcessor(palette(), size=8)
    pixels = colours(20, 30)
    path = tmp_path / "x.png"
    Image.fromarray(pixels).save(path)
    kinds = [Image.fromarray(pixels), pixels, torch.from_numpy(pixels.transpose(2, 0, 1).copy()), pixels / 255.0, path]
    kinds += [[pixels.astype(np.uint16) * 257], str(path), Image.fromarray(pixels).convert("RGBA")]
    batch = processor([*kinds, np.stack([pixels, pixels])], return_tensors="pt").input_ids
    assert batch.shape == (10, 64)
    assert batch.dtype == torch.int64
    assert (batch == batch[0]).all()
    for one in kinds:
        assert torch.equal(processor(one, return_tensors="pt").input_ids, batch[:1])
    assert processor(pixels[..., 0], return_tensors="np").input_ids.shape == (1, 64)  # two dimensions: one grey image


def test_floats_with_and_without_rescaling_mean_the_same(hf: Any) -> None:
    pixels = colours(16, 16)
    processor = ImageGPTImageProcessor(palette(), size=16)
    expected = processor(pixels, return_tensors="np").input_ids
    for value in (True, False):
        got = processor([pixels / 255.0], return_tensors="np", do_rescale=value).input_ids
        np.testing.assert_array_equal(got, expected)
    mixed = processor([pixels / 255.0, Image.fromarray(pixels)], do_rescale=False, do_color_quantize=False).pixel_values
    theirs = hf(size=16)(pixels / 255.0, do_rescale=False, do_color_quantize=False, do_resize=False)["pixel_values"]
    np.testing.assert_allclose(mixed[0], theirs[0], atol=2e-7)
    np.testing.assert_array_equal(mixed[1], (pixels.transpose(2, 0, 1).astype(np.float32) - 0.5) / 0.5)


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64", "uint32", "float32", "float64"])
@pytest.mark.parametrize("rescale", [True, False])
def test_integers_and_whole_floats_are_those_of_transformers(hf: Any, dtype: str, rescale: bool) -> None:
    image = colours(20, 30).astype(dtype)
    options = {"size": 16, "do_color_quantize": False, "do_rescale": rescale}
    mine = ImageGPTImageProcessor(**options)(image)["pixel_values"][0]
    np.testing.assert_array_equal(mine, hf(**options)(image)["pixel_values"][0])
    np.testing.assert_array_equal(mine, ImageGPTImageProcessor(**options)(colours(20, 30))["pixel_values"][0])


def test_a_palette_of_bytes_is_for_a_processor_that_leaves_bytes(tmp_path: Path) -> None:
    clusters = colours(5, 6).reshape(-1, 3).astype(np.float32)
    unusual = ImageGPTImageProcessor(clusters, do_rescale=False, do_normalize=False, do_resize=False)
    tokens = unusual(colours(5, 6), return_tensors="np").input_ids
    np.testing.assert_array_equal(tokens, np.arange(30)[None])
    with pytest.raises(ValueError, match=r"values in .*; want floats in \[-1, 1\]"):
        ImageGPTImageProcessor(clusters)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"clusters": clusters.tolist()}))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: .*values in"):
        ImageGPTImageProcessor.from_pretrained(tmp_path)


def test_center_crop_of_the_processor() -> None:
    processor = ImageGPTImageProcessor(do_color_quantize=False, do_rescale=False, do_normalize=False, do_resize=False)
    pixels = colours(10, 13)
    cut = processor(pixels, do_center_crop=True, crop_size=(4, 6)).pixel_values[0].transpose(1, 2, 0)
    np.testing.assert_array_equal(cut, pixels[3:7, 3:9])
    padded = processor(pixels, do_center_crop=True, crop_size=(13, 13)).pixel_values[0].transpose(1, 2, 0)
    np.testing.assert_array_equal(padded, np.pad(pixels, ((1, 2), (0, 0), (0, 0))))
    with pytest.raises(ValueError, match="crop_size"):
        processor(pixels, do_center_crop=True)


def test_return_kinds_and_the_feature_dictionary() -> None:
    processor = ImageGPTImageProcessor(palette(), size=4)
    image = Image.fromarray(colours())
    plain = processor([image, image])
    assert isinstance(plain.input_ids, list)
    assert plain.input_ids[0].shape == (16,)
    features = processor(image, return_tensors="pt")
    assert dict(**features).keys() == {"input_ids"}
    assert features.to("cpu") is features
    assert features.to(torch.float16).input_ids.dtype == torch.int64
    assert features.to("meta").input_ids.device.type == "meta"
    values = processor(image, return_tensors="pt", do_color_quantize=False).to("cpu", torch.float16)
    assert values.pixel_values.dtype == torch.float16
    assert values.pixel_values.shape == (1, 3, 4, 4)
    with pytest.raises(AttributeError, match="labels"):
        _ = features.labels
    assert pickle.loads(pickle.dumps(processor))(image, return_tensors="np").input_ids.tolist() == [
        plain.input_ids[0].tolist()
    ]
    different = processor([image, colours(7, 8)], do_resize=False)
    assert [len(row) for row in different.input_ids] == [30, 56]
    with pytest.raises(ValueError, match="different sizes"):
        processor([image, colours(7, 8)], do_resize=False, return_tensors="pt")


def test_decode_gives_back_the_colours() -> None:
    clusters = palette(50)
    processor = ImageGPTImageProcessor(clusters, size=(4, 6))
    tokens = np.random.default_rng(0).integers(0, 50, (3, 24))
    for given_tokens in (tokens, torch.from_numpy(tokens), tokens.tolist()):
        images = processor.decode(given_tokens)
        assert [image.size for image in images] == [(6, 4)] * 3
        np.testing.assert_array_equal(np.stack(images), dequantize(tokens, clusters).reshape(3, 4, 6, 3))
    assert len(processor.decode(tokens[0])) == 1
    assert processor.decode(tokens[:0]) == []
    with pytest.raises(ValueError, match="start token"):
        processor.decode(np.full((1, 24), 50))
    with pytest.raises(ValueError, match=r"\(N, 24\)"):
        processor.decode(tokens[:, 1:])
    with pytest.raises(TypeError, match="integers"):
        processor.decode(tokens / 2)
    with pytest.raises(ValueError, match="clusters"):
        ImageGPTImageProcessor(size=4).decode(tokens)
    with pytest.raises(ValueError, match="usual"):
        ImageGPTImageProcessor(clusters, size=(4, 6), image_mean=0.4).decode(tokens)
    with pytest.raises(ValueError, match="depend on the image"):
        ImageGPTImageProcessor(clusters, size={"shortest_edge": 4}).decode(tokens)


# ---- the processor's arguments and files


def test_defaults() -> None:
    processor = ImageGPTImageProcessor()
    assert (processor.height, processor.width, processor.clusters) == (32, 32, None)
    assert "size" in repr(processor)
    processor.size = 16
    assert processor.size == {"height": 16, "width": 16}
    with pytest.raises(ValueError, match="size"):
        processor.size = True
    assert ImageGPTImageProcessor(size=9, default_to_square=False).size == {"shortest_edge": 9}
    with pytest.raises(AttributeError, match="widht"):
        _ = processor.widht


BAD = [
    ("size", True),
    ("size", 0),
    ("size", -3),
    ("size", 10**9),
    ("size", 10**400),
    ("size", 32.0),
    ("size", "32"),
    ("size", [32]),
    ("size", {"height": 32}),
    ("size", {"height": 32, "width": None}),
    ("size", {"height": True, "width": 32}),
    ("size", {"height": 10**6, "width": 10**6}),
    ("size", {"longest_edge": 4}),
    ("resample", 7),
    ("resample", "bilinear"),
    ("resample", True),
    ("do_resize", 1),
    ("do_color_quantize", "yes"),
    ("rescale_factor", float("nan")),
    ("rescale_factor", 10**400),
    ("rescale_factor", "1/255"),
    ("image_mean", [0.5, 0.5]),
    ("image_mean", [0.5, 0.5, None]),
    ("image_mean", {"r": 1}),
    ("image_std", 0),
    ("image_std", [0.5, 0.0, 0.5]),
    ("image_std", float("inf")),
    ("do_pad", True),
    ("data_format", "channels_last"),
    ("input_data_format", "hwc"),
    ("return_tensors", "tf"),
    ("return_tensors", []),
    ("clusters", [[float("nan"), 0.0, 0.0]]),
    ("clusters", [[0.0, 0.0]]),
    ("clusters", "clusters.npy"),
    ("clusters", {}),
    ("clusters", [[0.0, 0.0, 0.0], [255.0, 255.0, 255.0]]),
    ("device", 10**300),
    ("device", "x" * 400_000),
    ("resample", 10**300),
    ("size", {"\x1b" * 400_000: 1}),
    ("data_format", "\n" * 400_000),
    ("image_processor_type", "CLIPImageProcessor"),
    ("image_processor_type", 3),
    ("image_processor_type", "\x1b" * 400_000),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values_in_arguments_and_in_files(tmp_path: Path, name: str, value: Any) -> None:
    if name != "image_processor_type":
        with pytest.raises((ValueError, TypeError), match=name):
            ImageGPTImageProcessor(**{name: value})
        with pytest.raises((ValueError, TypeError), match=name):
            ImageGPTImageProcessor(palette())(colours(), **{name: value})
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({name: value}))
    with pytest.raises(ValueError, match=name) as caught:
        ImageGPTImageProcessor.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_unknown_arguments_and_bad_images() -> None:
    processor = ImageGPTImageProcessor(palette())
    for call in (
        lambda: ImageGPTImageProcessor(do_magic=True),
        lambda: processor(colours(), do_magic=True),
        lambda: ImageGPTImageProcessor.from_dict({}, do_magic=True),
    ):
        with pytest.raises(TypeError, match="do_magic"):
            call()
    with pytest.raises(ValueError, match="empty"):
        processor([])
    with pytest.raises(TypeError, match="int"):
        processor([1, 2])
    with pytest.raises(ValueError, match=r"images\[1\].*no pixels"):
        processor([colours(), np.zeros((0, 3), np.uint8)])
    with pytest.raises(ValueError, match=r"images\[0\].*integers from -\d+ to"):
        processor(colours().astype(np.int64) - 1)
    with pytest.raises(TypeError, match=r"images\[0\].*complex"):
        processor(colours().astype(complex))
    with pytest.raises(FileNotFoundError, match="nothing"):
        processor("nothing.png")
    with pytest.raises(ValueError, match="clusters"):
        ImageGPTImageProcessor()(colours())
    with pytest.raises(ValueError, match="return_tensors"):
        processor(colours(), device="meta")
    with pytest.raises(ValueError, match="too many"):
        processor(Image.new("RGB", (40_000, 1)), size={"shortest_edge": 100})
    with pytest.raises(ValueError, match="extra"):
        ImageGPTImageProcessor(extra={"size": 4})


CASES = [
    {},
    {"size": 32},
    {"size": (16, 24), "resample": 3, "do_normalize": False, "image_mean": [0.1, 0.2, 0.3], "rescale_factor": 0.5},
    {"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": 7, "do_convert_rgb": True},
    {"do_color_quantize": False, "do_resize": False, "do_rescale": False, "disable_grouping": True, "do_pad": False},
]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("with_clusters", [True, False])
def test_json_goes_both_ways(hf: Any, tmp_path: Path, options: dict[str, Any], with_clusters: bool) -> None:
    options = {"size": 32, "clusters": palette(8) if with_clusters else None, **options}
    mine, theirs = ImageGPTImageProcessor(**options), hf(**options)
    assert json.loads(mine.to_json_string()) == json.loads(theirs.to_json_string())
    theirs.save_pretrained(tmp_path / "theirs")
    assert mine.save_pretrained(tmp_path / "mine") == [str(tmp_path / "mine" / "preprocessor_config.json")]
    loaded = ImageGPTImageProcessor.from_pretrained(tmp_path / "theirs")
    assert loaded.to_dict() == mine.to_dict()
    assert json.loads(hf.from_pretrained(tmp_path / "mine").to_json_string()) == mine.to_dict()
    assert ImageGPTImageProcessor.from_pretrained(tmp_path / "mine", size=5).height == (
        7 if options.get("do_center_crop") else 5
    )
    assert os.listdir(tmp_path / "mine") == ["preprocessor_config.json"]


def test_other_entries_are_kept(tmp_path: Path) -> None:
    data = {"feature_extractor_type": "ImageGPTFeatureExtractor", "size": 16, "note": {"a": [1, None]}, "n": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(data))
    processor = ImageGPTImageProcessor.from_pretrained(tmp_path, resample=0)
    assert processor.extra == {"note": {"a": [1, None]}, "n": 3}
    assert processor.resample == 0
    processor.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert written["note"] == {"a": [1, None]}
    assert written["image_processor_type"] == "ImageGPTImageProcessor"
    assert "feature_extractor_type" not in written


def test_the_size_comes_from_the_file_else_from_the_model(tmp_path: Path) -> None:
    path, config = tmp_path / "preprocessor_config.json", tmp_path / "config.json"
    path.write_text("{}")
    assert ImageGPTImageProcessor.from_pretrained(tmp_path).height == 32
    config.write_text(ImageGPTConfig(n_positions=256).to_json_string())
    assert ImageGPTImageProcessor.from_pretrained(tmp_path).height == 16
    path.write_text('{"size": null}')
    assert ImageGPTImageProcessor.from_pretrained(tmp_path).width == 16
    path.write_text('{"size": {"height": 8, "width": 8}}')
    assert ImageGPTImageProcessor.from_pretrained(tmp_path).height == 8
    path.write_text("{}")
    config.write_text(ImageGPTConfig(n_positions=200).to_json_string())
    with pytest.raises(ValueError, match=r"config\.json.*200"):
        ImageGPTImageProcessor.from_pretrained(tmp_path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="preprocessor_config"):
        ImageGPTImageProcessor.from_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    for content in (b"", b"[]", b"\xff\xfe", b"[" * 50_000, b'{"size": ', b'{"clusters": [[1e999, 0.1, 0.1]]}'):
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            ImageGPTImageProcessor.from_pretrained(tmp_path)
        assert str(path) in str(caught.value)
    with pytest.raises(NotADirectoryError):
        ImageGPTImageProcessor().save_pretrained(path)
    with pytest.raises(TypeError):  # what cannot be written leaves the old file as it was
        ImageGPTImageProcessor(extra={"x": object()}).save_pretrained(tmp_path)
    assert path.read_bytes() == b'{"clusters": [[1e999, 0.1, 0.1]]}'


def test_standalone() -> None:
    code = "import sys, igpt_fast.image as i; i.ImageGPTImageProcessor(); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
