"""Images of every kind to 8-bit RGB, and pictures from files: read with bounds."""

from __future__ import annotations

import io
import math
import os
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

from igpt_fast import files
from igpt_fast.checks import whole_number
from igpt_fast.image.clusters import FLOAT_SLACK, eight_bit

MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a GiB at three bytes a pixel
FITS = ("crop", "pad", "stretch")
_MAX_EDGE = 1 << 31
_DRAFT = 2  # how many times larger than wanted a JPEG is decoded at least
CHANNELS = (1, 3, 4)  # grey, RGB, RGBA; the numbers that transformers looks for
CHANNELS_FIRST, CHANNELS_LAST = "channels_first", "channels_last"

# EXIF orientation -> what turns the stored pixels upright. Source: EXIF 2.3, tag 0x0112.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Any, *, input_data_format: str | None = None) -> np.ndarray:
    """The pixels of one image as 8-bit RGB.

    Args:
        image: A PIL image of any mode, or an array or tensor (H, W), (H, W, C) or (C, H, W) with C in 1, 3, 4. Its
            values: uint16 and PIL's 16-bit grey, 65535 being white; bool; other integers, in 0..255; floats (PIL's
            mode F too) in [0, 1], 1 being white, or, where some are larger, whole numbers in 0..255. Transparency is
            composited on white; EXIF orientation is applied; colour profiles are not.
        input_data_format: ``"channels_first"`` or ``"channels_last"``, for arrays whose shape allows both.

    Returns:
        (H, W, 3) uint8, a copy.

    Raises:
        TypeError: Not an image, or another dtype.
        ValueError: No pixels, another or an ambiguous shape, or a value out of range or not finite.
    """
    return np.array(to_pil(image, input_data_format=input_data_format))


def to_pil(image: Any, *, input_data_format: str | None = None) -> Image.Image:
    """As ``to_rgb``, but a PIL image in mode RGB: ``image`` itself where it is one already, and upright."""
    if input_data_format not in (None, CHANNELS_FIRST, CHANNELS_LAST):
        wanted = f"{CHANNELS_FIRST!r}, {CHANNELS_LAST!r} or None"
        raise ValueError(f"input_data_format is {input_data_format!r}; want {wanted}")
    if isinstance(image, Image.Image):
        return _rgb_of_pil(image)
    if isinstance(image, Tensor):
        image = _array_of(image)
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image is a {type(image).__name__}; want a PIL image, an array or a tensor")
    pixels = eight_bit(_last_channels(image, input_data_format))
    if pixels.shape[2] == 1:
        return Image.fromarray(np.repeat(pixels, 3, axis=2))
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    return picture if pixels.shape[2] == 3 else _on_white(picture)


def is_fractional(image: Any) -> bool:
    """Whether the values of an image are floats in [0, 1], white being 1, and not numbers in 0..255."""
    if isinstance(image, Image.Image):
        return image.mode == "F" and is_fractional(np.asarray(image))
    floats = image.is_floating_point() if isinstance(image, Tensor) else image.dtype.kind == "f"
    return floats and bool(image.max() <= 1.0 + FLOAT_SLACK)


def _rgb_of_pil(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"image is {image.width}x{image.height}: it has no pixels")
    try:
        image.load()  # first: Pillow turns a TIFF upright itself when it loads it, and drops the tag
    except MemoryError:
        raise
    except Exception as error:  # Pillow decodes lazily, and its plugins raise nearly anything on a false file
        raise ValueError(f"image cannot be decoded: {files.first_line(error)}") from error
    upright = _UPRIGHT.get(_orientation(image))
    rgb = _rgb_of_mode(image)
    if upright is not None:
        rgb = rgb.transpose(upright)
    if rgb is not image:
        rgb.info = {}  # what it says of orientation or transparency no longer holds
    return rgb


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none that can be read: a bad tag is no reason to refuse a photograph."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # Pillow parses EXIF lazily, and a broken block raises nearly anything
        return 1


def _rgb_of_mode(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey(image).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None
        return converted
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    try:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            return _on_white(image.convert("RGBA"))
        return image if image.mode == "RGB" else image.convert("RGB")
    except (ValueError, OSError) as error:
        raise ValueError(f"image has mode {image.mode} and cannot be converted to RGB: {error}") from error


def _on_white(rgba: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """Mode L of a picture in PIL's modes I;16*, I and F, which PIL itself would clip."""
    values = np.asarray(image)
    if image.mode == "I":
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ValueError(f"image has mode I and values in {low}..{high}; want 0..65535")
        # Pillow used to open every 16-bit PNG in mode I. Elsewhere such small values may well be 8-bit ones.
        if 0 < high <= 255 and image.format != "PNG":
            raise ValueError(f"image has mode I and values up to {high}: 8 or 16 bits? Convert it to L or I;16")
        values = values.astype(np.uint16)
    grey = eight_bit(values)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey = np.where(values == transparent, np.uint8(255), grey)
    return Image.fromarray(grey)


def _array_of(tensor: Tensor) -> np.ndarray:
    special = tensor.is_complex() or tensor.is_meta or tensor.is_quantized or tensor.is_nested
    if special or tensor.layout != torch.strided:
        kind = f"{tensor.dtype}, layout {tensor.layout}, on {tensor.device}"
        raise TypeError(f"image is a tensor of {kind}; want plain values")
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor.resolve_neg()).numpy()


def _last_channels(array: np.ndarray, input_data_format: str | None) -> np.ndarray:
    """(H, W, C) of an array (H, W), (H, W, C) or (C, H, W)."""
    shape = tuple(array.shape)
    if 0 in shape:
        raise ValueError(f"image has shape {shape}: it has no pixels")
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3:
        raise ValueError(f"image has shape {shape}; want (H, W), (H, W, C) or (C, H, W) with C in {CHANNELS}")
    first = shape[0] in CHANNELS and input_data_format != CHANNELS_LAST
    last = shape[2] in CHANNELS and input_data_format != CHANNELS_FIRST
    if first and last:
        raise ValueError(f"image has shape {shape}: channels first or last? Say so by input_data_format")
    if not first and not last:
        wanted = {None: "(H, W, C) or (C, H, W)", CHANNELS_FIRST: "(C, H, W)", CHANNELS_LAST: "(H, W, C)"}
        raise ValueError(f"image has shape {shape}; want {wanted[input_data_format]} with C in {CHANNELS}")
    return np.moveaxis(array, 0, -1) if first else array


def open_image(path: str | os.PathLike[str] | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens an image file: its first frame, upright, in mode RGB.

    Args:
        path: A file, or a pipe, in any format that Pillow reads, except EPS, for which it would run Ghostscript; or the
            content of such a file, as bytes.
        max_pixels: Refuse larger pictures, before their pixels are decoded.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: As their names say.
        ValueError: A device, not an image, truncated, or too large; the message names the file, where there is one. Or
            a URL.
    """
    if isinstance(path, bytes):
        return _decode(io.BytesIO(path), max_pixels)[0]
    if isinstance(path, str) and path.lower().startswith(("http://", "https://", "data:")):
        raise ValueError(f"{files.shown(path)}: is a URL; nothing is downloaded here: download it first")
    with files.open_input(path) as file:
        try:
            return _decode(file, max_pixels)[0]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _decode(file: IO[bytes], max_pixels: int = MAX_PIXELS, least: int = 0) -> tuple[Image.Image, tuple[int, int]]:
    """The picture, and its (width, height) as it is stored; a JPEG may come at a half, a quarter or an eighth of that,
    which is quicker, as long as neither edge falls below ``least``, where that is not 0."""
    try:
        return _decoded(file, max_pixels, least)
    except Exception as error:  # Pillow's plugins raise nearly anything on a false file
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = "no known image format" if unknown else files.first_line(error)
        raise ValueError(f"not a readable image: {reason}") from error


def _decoded(file: IO[bytes], max_pixels: int, least: int) -> tuple[Image.Image, tuple[int, int]]:
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tags that are odd
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=[name for name in Image.ID if name != "EPS"]) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"{image.width}x{image.height} is more than {max_pixels} pixels")
            size = image.size
            if least and image.format == "JPEG" and _orientation(image) == 1:  # turned, its last row might come first
                image.draft(None, (least, least))
            try:
                image.load()
                rgb = to_pil(image)
                # A copy: a plain Image that holds no file.
                return rgb.copy() if rgb is image else rgb, size if image.size != size else rgb.size
            except MemoryError as error:
                need = f"{3 * size[0] * size[1] / (1 << 20):.0f} MiB or more"
                raise ValueError(f"its {size[0]}x{size[1]} pixels, {need}, do not fit in memory") from error


def resize(
    image: Any, width: int, height: int, *, resample: int = Image.Resampling.BILINEAR, input_data_format: Any = None
) -> Image.Image:
    """The image in another size, whatever its aspect; Pillow's filters, which average when they make smaller.

    Args:
        image: Anything that ``to_rgb`` takes.
        width, height: Pixels, at least 1.
        resample: A ``PIL.Image.Resampling``.
        input_data_format: See ``to_rgb``.

    Raises:
        TypeError, ValueError: As ``to_rgb``; or a size that is no size or above ``MAX_PIXELS``.
    """
    width = whole_number("width", width, 1, _MAX_EDGE)
    height = whole_number("height", height, 1, _MAX_EDGE)
    if width * height > MAX_PIXELS:
        raise ValueError(f"resize: {width}x{height} is more than {MAX_PIXELS} pixels")
    return to_pil(image, input_data_format=input_data_format).resize((width, height), Image.Resampling(resample))


def center_crop(image: Any, aspect: float = 1.0) -> Image.Image:
    """The largest centred part of an image whose width is ``aspect`` times its height, to whole pixels.

    Raises:
        TypeError, ValueError: As ``to_rgb``; or an ``aspect`` that is not a positive number.
    """
    if not 0.0 < aspect < math.inf:
        raise ValueError(f"center_crop: aspect is {aspect}; want a positive number")
    picture = to_pil(image)
    return picture.crop(_middle(*picture.size, aspect))


def _middle(width: int, height: int, aspect: float) -> tuple[int, int, int, int]:
    """The box that ``center_crop`` cuts out."""
    inner_width = min(width, max(1, round(height * aspect)))
    inner_height = min(height, max(1, round(width / aspect)))
    left, top = (width - inner_width) // 2, (height - inner_height) // 2
    return left, top, left + inner_width, top + inner_height


def fitted(image: Any, aspect: float, fit: str = "crop") -> Image.Image:
    """An image that is to become one whose width is ``aspect`` times its height.

    Args:
        image: Anything that ``to_rgb`` takes.
        aspect: A positive number.
        fit: ``"crop"``, the middle alone; ``"pad"``, all of it, with white beside or above and below;
            ``"stretch"``, all of it as it is, to be squeezed.

    Raises:
        TypeError, ValueError: As ``center_crop``; or another ``fit``.
    """
    if fit not in FITS:
        raise ValueError(f"fit is {files.shown(fit)}; want one of {', '.join(FITS)}")
    if fit == "crop":
        return center_crop(image, aspect)
    picture = to_pil(image)
    size = max(picture.width, round(picture.height * aspect)), max(picture.height, round(picture.width / aspect))
    if fit == "stretch" or size == picture.size:
        return picture
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"padded to {size[0]}x{size[1]} it would have more than {MAX_PIXELS} pixels")
    padded = Image.new("RGB", size, "white")
    padded.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
    return padded


def read_mask(path: Path, height: int, width: int, fit: str = "crop") -> np.ndarray:
    """The (height, width) bool of an image file, true where it is bright.

    It is ``fitted`` as the images are, so that both lie over each other; of another size, the nearest pixels are taken.
    """
    picture = fitted(open_image(path), width / height, fit).convert("L")
    picture = picture.resize((width, height), Image.Resampling.NEAREST)
    mask = np.asarray(picture) >= 128
    if mask.all():
        raise ValueError(f"{path}: is white everywhere, which leaves nothing to draw; black is drawn")
    return mask


def read_middle(source: Path | bytes, height: int, width: int) -> np.ndarray:
    """The (height, width, 3) uint8 pixels of the middle of an image, as ``read_square`` has them, but for large JPEGs
    that are stored upright: these are decoded at a fraction of their size, to no less than twice what is wanted.

    Args:
        source: An image file, or its content.
        height, width: Pixels.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError, ValueError: As ``open_image``; only files are named.
    """
    with files.open_input(source) if isinstance(source, Path) else io.BytesIO(source) as file:
        try:
            picture, full = _decode(file, least=_DRAFT * max(height, width))
        except ValueError as error:
            raise error if isinstance(source, bytes) else ValueError(f"{source}: {error}") from error
    if picture.size == full:
        return np.asarray(resize(center_crop(picture, width / height), width, height))
    scale = max(round(whole / part) for whole, part in zip(full, picture.size, strict=True))
    left, top, right, bottom = (edge / scale for edge in _middle(*full, width / height))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR, (left, top, right, bottom)))


def read_square(path: Path, side: int, fit: str = "crop") -> np.ndarray:
    """The (side, side, 3) uint8 pixels of an image, ``fitted``; the whole of it, as it is, for side 0."""
    picture = open_image(path)
    if side:
        picture = resize(fitted(picture, 1.0, fit), side, side)
    return np.asarray(picture, dtype=np.uint8)
