"""``ImageGPTImageProcessor``: images to the tokens of a model and back, with transformers' arguments and JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from igpt_fast import files, ops
from igpt_fast.config import ImageGPTConfig
from igpt_fast.files import shown
from igpt_fast.image.clusters import dequantize, quantize
from igpt_fast.image.reading import is_fractional, open_image, to_pil
from igpt_fast.image.settings import MAX_TOKENS, SETTINGS, checked, is_usual, settle

CONFIG_NAME = "preprocessor_config.json"


class BatchFeature(dict[str, Any]):
    """What a processor returns: a dictionary whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"BatchFeature has no {name!r}, only {', '.join(self) or 'nothing'}") from None

    def to(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """Moves the tensors, in place, as ``torch.Tensor.to``; a dtype is for those of floats alone."""
        for name, value in self.items():
            if isinstance(value, Tensor):
                moved = value.to(*args, **kwargs)
                if moved.dtype != value.dtype and not value.is_floating_point():
                    moved = value.to(moved.device)
                self[name] = moved
        return self


class ImageGPTImageProcessor:
    """Makes the tokens of images: to RGB, resize, scale to [-1, 1], nearest cluster.

    Images are 8-bit RGB from the start (see ``to_rgb``: other modes are converted, transparency is composited on
    white, EXIF orientation applied), so that the usual settings never leave uint8. transformers' class keeps floats
    in [0, 1] as they are and needs ``do_rescale=False`` for them; here both give the same for them.

    Args:
        clusters: (K, 3) floats in [-1, 1].
        extra: Other entries of a ``preprocessor_config.json``, kept to be written back.
        settings: The rest, by keyword; ``None`` is the default.
            do_resize (True), size, resample (2, bilinear): To ``{"height", "width"}``, default 32x32;
            ``{"shortest_edge"}``, with or without ``longest_edge``, or ``{"max_height", "max_width"}`` keep the
            aspect. An integer is the edge of a square (with ``default_to_square=False`` the shortest edge), a pair
            is (height, width).
            do_center_crop (False), crop_size: After resizing; a smaller image gets black borders.
            do_rescale (True), rescale_factor (1/255), do_normalize (True), image_mean, image_std (0.5): Values are
            ``(x * rescale_factor - image_mean) / image_std``; numbers or one for each channel.
            do_color_quantize (True): ``input_ids``; else ``pixel_values``.
            input_data_format: See ``to_rgb``.
            return_tensors: ``"pt"``, ``"np"``, or ``None`` for a list of arrays.
            device: Of the tensors.
            do_convert_rgb, disable_grouping, image_seq_length, pad_size: Taken and written back, without effect.
            do_pad, data_format: Likewise, but only ``False`` and ``"channels_first"`` are supported.

    Raises:
        TypeError: An unknown argument, or clusters that are not floats.
        ValueError: A value that the argument does not take.

    Source: transformers ``ImageGPTImageProcessor``.
    """

    model_input_names = ("input_ids",)
    clusters: np.ndarray | None
    size: dict[str, int]

    def __init__(self, clusters: Any = None, *, extra: dict[str, Any] | None = None, **settings: Any) -> None:
        self.extra = dict(extra or {})
        if own := [name for name in self.extra if name in SETTINGS]:
            raise ValueError(f"extra: {own[0]} is an argument of its own")
        for name, value in settle({"clusters": clusters, **settings}, {}).items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, checked(name, value) if name in SETTINGS else value)

    @property
    def height(self) -> int:
        """Height of the images, where the size is fixed."""
        return self._fixed_size()[0]

    @property
    def width(self) -> int:
        """Width of the images, where the size is fixed."""
        return self._fixed_size()[1]

    def _fixed_size(self) -> tuple[int, int]:
        size = self.crop_size if self.do_center_crop else self.size
        if "height" not in size:
            raise ValueError(f"ImageGPTImageProcessor: size is {size}: the height and width depend on the image")
        return size["height"], size["width"]

    def __getattr__(self, name: str) -> Any:
        # Reached for what is not set: here for the type checker, which cannot see the settings.
        raise AttributeError(f"ImageGPTImageProcessor has no attribute {name!r}")

    def __repr__(self) -> str:
        data = self.to_dict()
        if self.clusters is not None:
            data["clusters"] = f"({len(self.clusters)}, 3)"
        return f"ImageGPTImageProcessor({', '.join(f'{key}={value!r}' for key, value in data.items())})"

    def __call__(self, images: Any, **settings: Any) -> BatchFeature:
        """``preprocess``."""
        return self.preprocess(images, **settings)

    def preprocess(self, images: Any, **settings: Any) -> BatchFeature:
        """Tokens, or pixel values, of images.

        Args:
            images: An image as ``to_rgb`` takes it, or the path of a file; a list of them, of mixed kinds and sizes;
                an array or tensor of four dimensions.
            settings: Those of the constructor, for this call; ``None`` leaves the processor's own.

        Returns:
            ``input_ids`` (B, H * W) int64; without ``do_color_quantize``, ``pixel_values`` (B, 3, H, W) float32
            (uint8 with neither ``do_rescale`` nor ``do_normalize``). Arrays, tensors, or lists of B arrays.

        Raises:
            TypeError: An unknown argument, or something that is not an image.
            ValueError: As the constructor and ``to_rgb``; no images, no clusters, or results of different sizes that
                should become one tensor.
        """
        given = settle(settings, self._settings())
        if given["do_color_quantize"] and given["clusters"] is None:
            raise ValueError("preprocess: do_color_quantize needs clusters; the processor has none")
        pixels, units = [], []
        for i, image in enumerate(_flatten(images)):
            try:
                picture = to_pil(image, input_data_format=given["input_data_format"])
                pixels.append(_sized(picture, given))
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"preprocess: images[{i}]: {error}") from error
            # Floats in [0, 1] count as rescaled already, where the caller says that no rescaling is needed.
            plain = 1 / 255 if is_fractional(image) else 1.0
            units.append(given["rescale_factor"] if given["do_rescale"] else plain)
        if not pixels:
            raise ValueError("preprocess: images is empty; want at least one")
        if given["do_color_quantize"]:
            return _packed("input_ids", _tokens(pixels, units, given), given)
        values = [np.moveaxis(_values(item, unit, given), -1, 0) for item, unit in zip(pixels, units, strict=True)]
        return _packed("pixel_values", values, given)

    def decode(self, tokens: Any) -> list[Image.Image]:
        """The pictures of tokens.

        Args:
            tokens: (N, H * W) or (H * W,) integers in 0..K-1, without the start token: array, tensor or list.

        Returns:
            N images in mode RGB.

        Raises:
            TypeError: Not integers.
            ValueError: Another shape, a token out of range, no clusters, no fixed size, or a scaling other than
                ``x / 127.5 - 1``.
        """
        if self.clusters is None:
            raise ValueError("decode: the processor has no clusters")
        if not is_usual(self.rescale_factor, self._settings()):
            raise ValueError("decode: the processor's rescale_factor, image_mean or image_std are not the usual ones")
        array = tokens.detach().cpu().numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
        height, width = self._fixed_size()
        if array.ndim not in (1, 2) or array.shape[-1] != height * width:
            raise ValueError(f"decode: tokens has shape {array.shape}; want (N, {height * width}), {height}x{width}")
        colours = dequantize(array, self.clusters).reshape(-1, height, width, 3)
        return [Image.fromarray(item) for item in colours]

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``preprocessor_config.json``, in plain JSON values."""
        data: dict[str, Any] = dict(self.extra)
        for name in SETTINGS:
            value = getattr(self, name)
            if value is not None:
                data[name] = value.tolist() if isinstance(value, np.ndarray) else value
        return {**data, "image_processor_type": "ImageGPTImageProcessor"}

    def to_json_string(self) -> str:
        """``to_dict`` as indented JSON with sorted keys and a final newline."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, data: dict[str, Any], **settings: Any) -> ImageGPTImageProcessor:
        """A processor of the content of a ``preprocessor_config.json``; unknown entries go to ``extra``.

        Raises:
            TypeError, ValueError: As the constructor; or the entries are another processor's.
        """
        kind = data.get("image_processor_type", data.get("feature_extractor_type", "ImageGPTImageProcessor"))
        if not isinstance(kind, str) or not kind.startswith("ImageGPT"):
            raise ValueError(f"image_processor_type is {shown(kind)}; want 'ImageGPTImageProcessor'")
        # Both names of the type are left out: the new one is written anyway, the old one would contradict it.
        kinds = ("image_processor_type", "feature_extractor_type")
        extra = {key: value for key, value in data.items() if key not in SETTINGS and key not in kinds}
        known = {key: value for key, value in data.items() if key in SETTINGS}
        square = extra.pop("default_to_square", None)
        processor = cls(**known, default_to_square=square, extra=extra)
        return cls(**{**processor._settings(), **settings}, extra=extra) if settings else processor

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SETTINGS}

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        subfolder: str = "",
        **settings: Any,
    ) -> ImageGPTImageProcessor:
        """Reads the ``preprocessor_config.json`` of a folder or of a repository of the hub.

        Where it names no size, the size is the square that the model's ``config.json`` beside it has positions for,
        and 32x32 without one.

        Args:
            name_or_dir: A folder or a hub name.
            revision, cache_dir, local_files_only, token, subfolder: As in ``huggingface_hub.hf_hub_download``.
            settings: Those of the constructor, in place of the file's.

        Raises:
            FileNotFoundError: No such folder, repository or file.
            TypeError: An unknown argument.
            ValueError: Unusable content; the message names the file.
        """
        where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
        where |= {"token": token, "subfolder": subfolder}
        path = files.find_file(name_or_dir, CONFIG_NAME, **where)
        assert path is not None
        data = files.read_json(path)
        if data.get("size") is None:
            config = files.find_file(name_or_dir, "config.json", required=False, **where)
            data["size"] = None if config is None else _side(config)
        try:
            processor = cls.from_dict(data)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a usable processor: {files.first_line(error)}") from error
        return cls(**{**processor._settings(), **settings}, extra=processor.extra) if settings else processor

    def save_pretrained(self, directory: str | os.PathLike[str]) -> list[str]:
        """Writes ``preprocessor_config.json`` into a folder, made if need be, whole or not at all.

        Returns:
            The path of the file, in a list.

        Raises:
            NotADirectoryError: ``directory`` is a file.
            OSError: It cannot be made or written to.
        """
        directory = Path(directory)
        if directory.exists() and not directory.is_dir():
            raise NotADirectoryError(f"{directory}: is not a folder")
        text = self.to_json_string()
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / CONFIG_NAME
        with files.replacing(path) as partial_path:
            partial_path.write_text(text, encoding="utf-8")
        return [str(path)]


def _side(config_path: Path) -> int:
    """Edge of the square image that a model's positions hold."""
    positions = ImageGPTConfig.from_json_file(config_path).n_positions
    side = math.isqrt(positions)
    if side * side != positions:
        raise ValueError(f"{config_path}: n_positions {positions} is not a square; give size in {CONFIG_NAME}")
    return side


def _flatten(images: Any, depth: int = 0) -> Iterator[Any]:
    """The single images of an image, a batch, or a list that may hold both, and lists of them."""
    if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
        yield from images
    elif isinstance(images, list | tuple) and depth < 2:
        for item in images:
            yield from _flatten(item, depth + 1)
    elif isinstance(images, str | os.PathLike):
        yield open_image(images)
    elif isinstance(images, Image.Image | np.ndarray | Tensor):
        yield images
    else:
        kind = type(images).__name__
        raise TypeError(f"preprocess: images holds a {kind}; want PIL images, arrays, tensors or paths")


def _sized(picture: Image.Image, given: dict[str, Any]) -> np.ndarray:
    """(H, W, 3) uint8: resized and cropped."""
    if given["do_resize"]:
        width, height = _target(given["size"], *picture.size)
        picture = picture.resize((width, height), given["resample"])
    if given["do_center_crop"]:
        width, height = given["crop_size"]["width"], given["crop_size"]["height"]
        left, top = _margin(picture.width, width), _margin(picture.height, height)
        picture = picture.crop((left, top, left + width, top + height))
    return np.asarray(picture)


def _margin(side: int, crop: int) -> int:
    """Where a centred crop starts; negative where the image is smaller and black is added. Rounded as transformers."""
    return (side - crop) // 2 if side >= crop else -((crop - side) // 2)


def _target(size: dict[str, int], width: int, height: int) -> tuple[int, int]:
    """(width, height) of an image after resizing, rounded as transformers rounds."""
    if "height" in size:
        return size["width"], size["height"]
    if "max_height" in size:
        scale = min(size["max_height"] / height, size["max_width"] / width)
        new = (int(width * scale), int(height * scale))
    else:
        short, long, edge = min(width, height), max(width, height), float(size["shortest_edge"])
        limit = size.get("longest_edge")
        if limit is not None and long / short * edge > limit:
            edge = limit * short / long
        other = int(edge * long / short)
        if round(edge) == short:
            other = long
        new = (round(edge), other) if width <= height else (other, round(edge))
    new = (max(1, new[0]), max(1, new[1]))
    if new[0] * new[1] > MAX_TOKENS:
        raise ValueError(f"size {size} makes {new[0]}x{new[1]} pixels of {width}x{height}; too many")
    return new


def _values(pixels: np.ndarray, unit: float, given: dict[str, Any]) -> np.ndarray:
    """(H, W, 3) float32 of uint8 pixels, by a table of the 256 levels, rounded step by step as in transformers."""
    if unit == 1.0 and not given["do_normalize"]:
        return pixels
    levels = (np.arange(256, dtype=np.float64) * unit).astype(np.float32)
    table: np.ndarray = np.repeat(levels[:, None], 3, axis=1)
    if given["do_normalize"]:
        table = (table - np.asarray(given["image_mean"], np.float32)) / np.asarray(given["image_std"], np.float32)
    return np.stack([table[:, channel][pixels[..., channel]] for channel in range(3)], axis=-1)


def _tokens(pixels: list[np.ndarray], units: list[float], given: dict[str, Any]) -> list[np.ndarray]:
    """(H * W,) int64 of each image; in one call where sizes and scaling allow."""
    clusters = given["clusters"]
    usual = [is_usual(unit, given) for unit in units]
    if all(usual) and len({item.shape for item in pixels}) == 1:
        return list(quantize(np.stack(pixels), clusters).reshape(len(pixels), -1))
    rows = []
    for item, unit, plain in zip(pixels, units, usual, strict=True):
        if plain:
            rows.append(quantize(item, clusters).reshape(-1))
        else:  # the values may leave [-1, 1], which the public quantize refuses
            values = np.ascontiguousarray(_values(item, unit, given), dtype=np.float32)
            rows.append(ops.quantize(torch.from_numpy(values), torch.from_numpy(clusters)).numpy().reshape(-1))
    return rows


def _packed(name: str, items: list[np.ndarray], given: dict[str, Any]) -> BatchFeature:
    kind, device = given["return_tensors"], given["device"]
    if kind != "pt" and device not in (None, "cpu"):
        raise ValueError(f"preprocess: device is {device!r}; it needs return_tensors='pt'")
    if kind is None:
        return BatchFeature({name: items})
    shapes = {item.shape for item in items}
    if len(shapes) > 1:
        raise ValueError(f"preprocess: the images have different sizes, {sorted(shapes)}; resize or crop them to one")
    batch = np.stack(items)
    return BatchFeature({name: batch if kind == "np" else torch.from_numpy(batch).to(device)})
