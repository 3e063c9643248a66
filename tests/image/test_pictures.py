"""Images of every kind to RGB, files that are opened, grids and animations that are written."""

import io
import os
import struct
import threading
import warnings
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageSequence

from igpt_fast.image import (
    center_crop,
    check_animation,
    image_grid,
    open_image,
    resize,
    save_animation,
    save_image,
    to_rgb,
    writing,
)

WHITE = [255, 255, 255]


def colours(height: int = 6, width: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---- to_rgb: PIL modes


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "CMYK", "YCbCr", "HSV", "P", "RGBX"])
def test_opaque_modes_are_converted_as_pil_does(mode: str) -> None:
    image = Image.fromarray(colours()).convert(mode)
    np.testing.assert_array_equal(to_rgb(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_transparency_shows_white(mode: str) -> None:
    rgba = np.concatenate([np.full((3, 4, 3), 100, np.uint8), np.full((3, 4, 1), 255, np.uint8)], axis=2)
    rgba[0, :, 3] = 0
    rgba[1, :, 3] = 128
    image = Image.fromarray(rgba)
    if mode == "La":
        image = image.convert("LA")
    rgb = to_rgb(image.convert(mode))
    assert rgb[0].tolist() == [WHITE] * 4
    assert np.abs(rgb[1].astype(int) - (100 * 128 + 255 * 127) / 255).max() <= 2
    assert np.abs(rgb[2].astype(int) - 100).max() <= 1


def test_transparent_palette_entry_and_colour_key() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert to_rgb(image).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    image.info["transparency"] = 0
    assert to_rgb(image).tolist() == [[WHITE, [40, 50, 60]]]
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    rgb.info["transparency"] = (1, 2, 3)
    assert to_rgb(rgb).tolist() == [[WHITE, [4, 5, 6]]]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_16_bit_grey_is_scaled_and_not_clipped(mode: str) -> None:
    values = np.array([[0, 257, 257 * 100, 65535, 128, 129]], np.uint16)
    raw = values.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    rgb = to_rgb(Image.frombytes(mode, (6, 1), raw))
    assert rgb[0, :, 0].tolist() == [0, 1, 100, 255, 0, 1]
    assert (rgb == rgb[..., :1]).all()
    np.testing.assert_array_equal(to_rgb(values), rgb)
    np.testing.assert_array_equal(to_rgb(torch.from_numpy(values)), rgb)


def test_16_bit_png_file_and_mode_i(tmp_path: Path) -> None:
    values = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "deep.png"))[..., 0].ravel(), np.arange(256))
    np.testing.assert_array_equal(to_rgb(Image.fromarray(values.astype(np.int32)))[..., 0].ravel(), np.arange(256))
    with pytest.raises(ValueError, match="8 or 16 bits"):
        to_rgb(Image.fromarray(np.array([[0, 255]], np.int32)))
    with pytest.raises(ValueError, match=r"0\.\.65535"):
        to_rgb(Image.fromarray(np.array([[0, 1 << 20]], np.int32)))
    assert to_rgb(Image.new("I", (1, 1))).tolist() == [[[0, 0, 0]]]


def test_mode_f_and_lab() -> None:
    assert to_rgb(Image.fromarray(np.array([[0.0, 0.2, 1.0]], np.float32)))[0, :, 1].tolist() == [0, 51, 255]
    white_black = Image.merge(
        "LAB", [Image.frombytes("L", (2, 1), raw) for raw in (b"\xff\0", b"\x80\x80", b"\x80\x80")]
    )
    assert np.abs(to_rgb(white_black).astype(int) - [[WHITE, [0, 0, 0]]]).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = Image.fromarray(colours(4, 7))
    stored = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.swapaxes(0, 1),
        6: lambda p: p.swapaxes(0, 1)[::-1],
        7: lambda p: p.swapaxes(0, 1)[::-1, ::-1],
        8: lambda p: p.swapaxes(0, 1)[:, ::-1],
    }[orientation](np.asarray(upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, lossless=True)
    opened = open_image(path)
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(upright))
    np.testing.assert_array_equal(to_rgb(opened), np.asarray(upright))  # not turned twice
    with Image.open(path) as lazy:
        np.testing.assert_array_equal(to_rgb(lazy), np.asarray(upright))


def test_broken_exif_is_no_reason_to_refuse() -> None:
    for block in (b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage", os.urandom(64)):
        image = Image.fromarray(colours())
        image.info["exif"] = block
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, of the corrupt block
            rgb = to_rgb(image)
        np.testing.assert_array_equal(rgb, colours())


def test_the_input_is_neither_changed_nor_shared() -> None:
    image = Image.fromarray(colours())
    image.info["note"] = "kept"
    to_rgb(image)[:] = 0
    np.testing.assert_array_equal(np.asarray(image), colours())
    assert image.info == {"note": "kept"}
    array = colours()
    to_rgb(array)[:] = 0
    np.testing.assert_array_equal(array, colours())


# ---- to_rgb: arrays and tensors


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([0, 1, 3, 4]),
    st.sampled_from(["uint8", "uint16", "bool", "float16", "float32", "float64"]),
    st.booleans(),
    st.booleans(),
    st.integers(5, 9),
    st.integers(5, 9),
)
def test_arrays_and_tensors_mean_the_same_colours(
    channels: int, dtype: str, first: bool, tensor: bool, height: int, width: int
) -> None:
    shape = (height, width, channels) if channels else (height, width)
    reference = np.random.default_rng(height * width).integers(0, 256, shape, dtype=np.uint8)
    if dtype == "bool":
        reference = (reference > 127).astype(np.uint8) * np.uint8(255)
    array: Any = {
        "uint8": lambda: reference,
        "uint16": lambda: reference.astype(np.uint16) * 257,
        "bool": lambda: reference > 0,
    }.get(dtype, lambda: (reference / 255.0).astype(dtype))()
    if channels and first:
        array = np.moveaxis(array, -1, 0)
    rgb = to_rgb(torch.from_numpy(np.ascontiguousarray(array)) if tensor else array)
    if channels == 4:
        expected = np.asarray(
            Image.alpha_composite(Image.new("RGBA", (width, height), "white"), Image.fromarray(reference))
        )
        expected = expected[..., :3]
    else:
        expected = np.broadcast_to(reference if channels else reference[..., None], (height, width, 3))
    assert rgb.dtype == np.uint8
    np.testing.assert_array_equal(rgb, expected)


@pytest.mark.parametrize(
    "dtype", ["int16", "int32", "int64", "uint32", "uint64", "float16", "float32", "float64", ">i8"]
)
def test_integers_and_whole_floats_are_bytes(dtype: str) -> None:
    np.testing.assert_array_equal(to_rgb(colours().astype(dtype)), colours())
    if dtype[0] not in "u>":
        np.testing.assert_array_equal(to_rgb(torch.from_numpy(colours().astype(dtype))), colours())
    assert to_rgb(np.ones((5, 5), dtype))[0, 0, 0] == (255 if "f" in dtype else 1)


def test_an_ambiguous_shape_must_be_named() -> None:
    array = colours(3, 5)
    with pytest.raises(ValueError, match="channels first or last"):
        to_rgb(array)
    assert to_rgb(array, input_data_format="channels_last").shape == (3, 5, 3)
    np.testing.assert_array_equal(to_rgb(array, input_data_format="channels_first"), array.transpose(1, 2, 0))
    with pytest.raises(ValueError, match="input_data_format"):
        to_rgb(array, input_data_format="last")


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        ([[1, 2]], TypeError, "list"),
        (None, TypeError, "NoneType"),
        (b"png", TypeError, "bytes"),
        (np.full((5, 5, 3), 256, np.int64), ValueError, "integers from 256 to 256; want 0..255"),
        (np.full((5, 5, 3), -1, np.int8), ValueError, "from -1 to -1"),
        (np.full((5, 5), 255.5), ValueError, "255.5"),
        (np.full((5, 5), 100.5), ValueError, "whole numbers in 0..255"),
        (np.zeros((5, 5, 3), np.complex64), TypeError, "complex64"),
        (np.zeros((5, 5, 3), object), TypeError, "object"),
        (torch.full((5, 5, 3), 300, dtype=torch.int32), ValueError, "300"),
        (torch.zeros(5, 5, 3, device="meta"), TypeError, "meta"),
        (torch.zeros(5, 5).to_sparse(), TypeError, "sparse"),
        (np.zeros((0, 5, 3), np.uint8), ValueError, "no pixels"),
        (np.zeros((0, 0), np.uint8), ValueError, "no pixels"),
        (Image.new("RGB", (0, 0)), ValueError, "0x0"),
        (np.zeros(5, np.uint8), ValueError, "(5,)"),
        (np.zeros((5, 5, 2), np.uint8), ValueError, "(5, 5, 2)"),
        (np.zeros((2, 5, 5, 3), np.uint8), ValueError, "(2, 5, 5, 3)"),
        (np.full((5, 5), 1.01), ValueError, "[0, 1]"),
        (np.full((5, 5), -0.5), ValueError, "-0.5"),
        (np.full((5, 5), 256.0), ValueError, "256"),
        (np.full((5, 5), np.nan), ValueError, "nan"),
        (torch.full((5, 5), torch.inf), ValueError, "inf"),
        (Image.fromarray(np.full((2, 2), np.nan, np.float32)), ValueError, "nan"),
    ],
)
def test_to_rgb_refuses(image: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        to_rgb(image)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- open_image


def test_open_image_errors_are_one_line(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(colours(64, 64)).save(buffer, "PNG")
    bad = {
        "text.png": b"not an image",
        "empty.png": b"",
        "cut.png": buffer.getvalue()[: len(buffer.getvalue()) // 2],
        "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as caught:
            open_image(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match=r"^not a readable image: "):
            open_image(content)
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_image(tmp_path / "nothing.png")
    with pytest.raises(IsADirectoryError, match="folder"):
        open_image(tmp_path)
    with pytest.raises(ValueError, match="file name"):
        open_image("a\0b")
    with pytest.raises(ValueError, match="is a device or a socket"):
        open_image("/dev/zero")


def test_a_picture_in_memory() -> None:
    buffer = io.BytesIO()
    Image.fromarray(colours(8, 6)).save(buffer, "PNG")
    np.testing.assert_array_equal(np.asarray(open_image(buffer.getvalue())), colours(8, 6))
    with pytest.raises(ValueError, match="6x8 is more than 47 pixels"):
        open_image(buffer.getvalue(), max_pixels=47)


def test_a_picture_in_a_pipe(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(colours()).save(buffer, "PNG")
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(buffer.getvalue(),))
    writer.start()
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "pipe")), colours())
    writer.join()


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunk = lambda kind, data: (  # noqa: E731
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match=r"bomb\.png.*pixels"):
        open_image(path)


def test_a_lazily_opened_truncated_file() -> None:
    buffer = io.BytesIO()
    Image.fromarray(colours(64, 64)).save(buffer, "PNG")
    lazy = Image.open(io.BytesIO(buffer.getvalue()[:6000]))
    with pytest.raises(ValueError, match="cannot be decoded"):
        to_rgb(lazy)


def test_open_image_bounds_and_frees(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(colours(10, 10)).save(path)
    with pytest.raises(ValueError, match="more than 99 pixels"):
        open_image(path, max_pixels=99)
    opened = open_image(path, max_pixels=100)
    assert type(opened) is Image.Image
    assert opened.mode == "RGB"


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_damaged_files_give_an_image_or_a_value_error(tmp_path_factory: Any, data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]))
    buffer = io.BytesIO()
    Image.fromarray(colours(12, 12)).save(buffer, form)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    caught = None
    try:
        assert open_image(path, max_pixels=1 << 20).mode == "RGB"
    except ValueError as error:
        caught = str(error)
    assert caught is None or str(path) in caught


# ---- resize, crop, grids, files


def test_resize_and_center_crop() -> None:
    image = Image.fromarray(colours(20, 30))
    np.testing.assert_array_equal(np.asarray(resize(image, 7, 5)), np.asarray(image.resize((7, 5), 2)))
    np.testing.assert_array_equal(np.asarray(center_crop(image)), colours(20, 30)[:, 5:25])
    np.testing.assert_array_equal(np.asarray(center_crop(colours(20, 30), 3.0)), colours(20, 30)[5:15])
    assert center_crop(image, 1e-9).size == (1, 20)
    assert center_crop(image, 1e9).size == (30, 1)
    for bad in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="aspect"):
            center_crop(image, bad)
    for size in ((0, 5), (5, 2.0), (True, 3), (10**6, 10**6)):
        with pytest.raises(ValueError, match=r"width|height|pixels"):
            resize(image, *size)


def test_image_grid() -> None:
    cells = [np.full((2, 3, 3), 10 * i, np.uint8) for i in range(5)]
    grid = np.asarray(image_grid(cells, 2, scale=2, gap=1, background="red"))
    assert grid.shape == (3 * 4 + 2, 2 * 6 + 1, 3)
    for i in range(5):
        row, column = divmod(i, 2)
        assert (grid[row * 5 : row * 5 + 4, column * 7 : column * 7 + 6] == 10 * i).all()
    assert (grid[4] == [255, 0, 0]).all()
    assert (grid[10:, 7:] == [255, 0, 0]).all()
    assert image_grid(np.stack(cells)).size == (3 * 3 + 2, 2 * 2 + 1)
    assert image_grid([Image.fromarray(cells[0])], columns=9, gap=0, background=(1, 2, 3)).size == (3, 2)
    pixels = torch.from_numpy(colours(1, 1))
    assert np.asarray(image_grid([pixels])).tolist() == pixels.tolist()


@pytest.mark.parametrize(
    ("images", "options", "error", "words"),
    [
        ([], {}, ValueError, "no images"),
        ([colours(4, 4), colours(4, 5)], {}, ValueError, "image 1 is 5x4"),
        (Image.fromarray(colours()), {}, TypeError, "several"),
        ("x.png", {}, TypeError, "several"),
        (3, {}, TypeError, "several"),
        ([colours()], {"columns": 0}, ValueError, "columns"),
        ([colours()], {"scale": 1.5}, ValueError, "scale"),
        ([colours()], {"gap": -1}, ValueError, "gap"),
        ([colours()], {"scale": 10**5}, ValueError, "pixels"),
        ([colours()], {"background": "transparentish"}, ValueError, "transparentish"),
        ([None], {}, TypeError, "NoneType"),
    ],
)
def test_image_grid_refuses(images: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        image_grid(images, **options)


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".bmp", ".tif", ".tiff", ".ppm", ".webp", ".gif", ".jpg", ".jpeg"])
def test_save_image(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    pixels = colours(9, 7)
    save_image(pixels, path)
    got = np.asarray(open_image(path))
    assert got.shape == pixels.shape
    if suffix not in (".jpg", ".jpeg"):
        np.testing.assert_array_equal(got, pixels)
    with pytest.raises(FileExistsError, match="exists"):
        save_image(pixels, path, overwrite=False)
    save_image(Image.fromarray(pixels), path)
    assert os.listdir(tmp_path) == [path.name]


def test_saving_to_nowhere_leaves_nothing(tmp_path: Path) -> None:
    for name in ("x", "x.xyz", "x.npy"):
        with pytest.raises(ValueError, match="suffix"):
            save_image(colours(), tmp_path / name)
        with pytest.raises(ValueError, match="suffix"):
            save_animation([colours()], tmp_path / name)
    with pytest.raises(FileNotFoundError, match="folder"):
        save_image(colours(), tmp_path / "no" / "x.png")
    with pytest.raises(TypeError):
        save_image("x", tmp_path / "x.png")
    (tmp_path / "dir.png").mkdir()
    with pytest.raises(IsADirectoryError):
        save_image(colours(), tmp_path / "dir.png")
    for frames, options, words in (
        ([], {}, "no images"),
        ([colours(), colours(3, 3)], {}, "image 1"),
        ([colours()], {"frame_ms": 0}, "frame_ms"),
        ([colours()], {"last_ms": 1.5}, "last_ms"),
    ):
        with pytest.raises(ValueError, match=words):
            save_animation(frames, tmp_path / "x.gif", **options)
    assert os.listdir(tmp_path) == ["dir.png"]


def few_colours(n: int, frames: int = 4, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    table = (np.arange(n) * 6_700_417 + 7919 * seed) % (1 << 24)  # an odd step: all different
    table = np.stack([table >> 16, table >> 8 & 255, table & 255], axis=1).astype(np.uint8)
    index = rng.integers(0, n, (frames, 24, 24))
    index[:, :16, :16] = np.arange(256).reshape(16, 16) % n  # every colour, the same place in each: deltas are small
    return list(table[index])


@pytest.mark.parametrize("suffix", [".gif", ".png", ".apng"])
@pytest.mark.parametrize("n", [1, 2, 3, 128, 255, 256])
def test_animations_keep_their_colours(tmp_path: Path, suffix: str, n: int) -> None:
    frames = few_colours(n, frames=4 if n > 1 else 1)
    path = tmp_path / f"x{suffix}"
    save_animation(frames, path, frame_ms=50, last_ms=700)
    with Image.open(path) as animation:
        if len(frames) == 1 and suffix != ".gif":  # nothing to animate: a plain PNG
            np.testing.assert_array_equal(np.asarray(animation), frames[0])
            return
        assert animation.info.get("loop") == 0
        shown = [
            (np.asarray(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(animation)
        ]
    assert len(shown) == len(frames)
    for (got, _), frame in zip(shown, frames, strict=True):
        np.testing.assert_array_equal(got, frame)
    assert [duration for _, duration in shown] == [50.0] * (len(frames) - 1) + [700.0]
    with pytest.raises(FileExistsError):
        save_animation(frames, path, overwrite=False)


def test_an_animation_has_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said as soon as a frame shows it, and beforehand by ``check_animation``."""
    long = np.zeros((1, 1 << 16, 3), np.uint8)
    for path in (tmp_path / "x.gif", tmp_path / "x.GIF"):
        with pytest.raises(ValueError, match=r"65536x1 pixels; a GIF has 65535"):
            save_animation([long], path)
        with pytest.raises(ValueError, match="65535"):
            check_animation(path, 1, 1 << 16, 1)
    save_animation([long[:, 1:]], tmp_path / "x.gif")
    save_animation([long], tmp_path / "x.apng")
    check_animation("x.gif", 4352, 4352, 17)  # 1024 images of 16 x 16, enlarged eight times
    with pytest.raises(ValueError, match="120 frames of 4352x4352 are more than"):
        check_animation("x.gif", 4352, 4352, 120)
    monkeypatch.setitem(writing._MOST_ANIMATED, "GIF", 100)
    taken = []
    with pytest.raises(ValueError, match="3 frames of 6x7 are more than 100 pixels"):
        save_animation((taken.append(i) or colours(7, 6) for i in range(9)), tmp_path / "y.gif")  # type: ignore
    assert len(taken) == 3
    assert sorted(os.listdir(tmp_path)) == ["x.apng", "x.gif"]


def test_a_gif_is_made_frame_by_frame(tmp_path: Path) -> None:
    """Of frames that are made when their turn comes a byte a pixel is kept, not the frames."""
    alive: set[int] = set()
    most = 0

    def frames() -> Iterator[Image.Image]:
        nonlocal most
        for i in range(8):
            frame = Image.new("RGB", (6, 5), (i, 0, 0))
            alive.add(i)
            weakref.finalize(frame, alive.discard, i)
            most = max(most, len(alive))
            yield frame

    save_animation(frames(), tmp_path / "x.gif")
    assert most <= 2
    with Image.open(tmp_path / "x.gif") as animation:
        assert animation.n_frames == 8


def test_a_gif_whose_frames_have_their_own_256_colours(tmp_path: Path) -> None:
    frames = [few_colours(200, 1, seed)[0] for seed in range(3)]
    save_animation(frames, tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as animation:
        for got, frame in zip(ImageSequence.Iterator(animation), frames, strict=True):
            np.testing.assert_array_equal(np.asarray(got.convert("RGB")), frame)


def test_a_gif_of_more_colours_is_near_and_not_dithered(tmp_path: Path) -> None:
    row = np.linspace(0, 255, 600).astype(np.uint8)
    frame = np.stack(
        [np.broadcast_to(row, (8, 600)), np.full((8, 600), 7), np.broadcast_to(255 - row // 2, (8, 600))], -1
    )
    frame[:, :, 1] += (np.arange(600) % 3).astype(np.uint8)
    save_animation([frame.astype(np.uint8)], tmp_path / "x.gif")
    got = np.asarray(open_image(tmp_path / "x.gif")).astype(int)
    assert np.abs(got - frame).max() < 8
    assert (got == got[:1]).all()  # dithering would make the equal rows differ


def test_a_picture_that_memory_does_not_suffice_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name and size are said; as it is decoded, and as it is converted."""
    Image.new("RGB", (2000, 1000)).save(tmp_path / "a.png")
    Image.new("L", (2000, 1000)).save(tmp_path / "grey.png")

    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    for owner, name, picture in ((ImageFile.ImageFile, "load", "a"), (Image.Image, "convert", "grey")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(ValueError, match=rf"{picture}\.png: .*its 2000x1000 pixels, 6 MiB or more, do not fit"):
                open_image(tmp_path / f"{picture}.png")


def test_headings_stand_above_their_columns_where_they_can_be_read() -> None:
    cells = [np.full((60, 60, 3), 200, np.uint8)] * 6
    plain = np.asarray(image_grid(cells, 3))
    headed = np.asarray(image_grid(cells, 3, headings=["input", "", "original"]))
    top = len(headed) - len(plain)
    assert 15 < top < 40
    assert np.array_equal(headed[top:], plain)
    dark = [(headed[:top, left : left + 60] < 100).any() for left in (0, 61, 122)]
    assert dark == [True, False, True]
    assert (headed[0] == 255).all()  # no letter is cut off
    assert (headed[top - 1] == 255).all()
    narrow = [np.full((16, 16, 3), 200, np.uint8)] * 3
    assert image_grid(narrow, 3, headings=["input", "kept", "original"]).size == image_grid(narrow, 3).size
    assert writing.grid_size(6, 3, 60, 60, 1, ["input", "", "original"])[1] == headed.shape[1::-1]
