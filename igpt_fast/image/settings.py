"""The settings of ``ImageGPTImageProcessor``: their names, their defaults, and what they take.

Source: transformers ``ImagesKwargs``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt_fast.checks import finite_number, whole_number
from igpt_fast.files import shown
from igpt_fast.image.clusters import check_clusters
from igpt_fast.image.reading import CHANNELS_FIRST, CHANNELS_LAST

MAX_TOKENS = 1 << 24  # pixels of one processed image; as n_positions of ImageGPTConfig

_SIZE_KEYS = ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"max_height", "max_width"})


def settle(settings: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """All settings, checked: those given, else the processor's own, else the defaults."""
    square = _flag("default_to_square", settings.pop("default_to_square", None), True)
    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise TypeError(f"ImageGPTImageProcessor: unknown argument {shown(unknown[0])}; it takes {', '.join(SETTINGS)}")
    result = {}
    for name in SETTINGS:
        value = settings.get(name)
        if name == "size" and isinstance(value, int) and not isinstance(value, bool) and not square:
            value = {"shortest_edge": value}
        result[name] = own[name] if value is None and name in own else checked(name, value)
    if result["do_center_crop"] and (result["crop_size"] is None or "height" not in result["crop_size"]):
        raise ValueError(f"ImageGPTImageProcessor: do_center_crop needs a crop_size, got {result['crop_size']!r}")
    if result["clusters"] is not None and result["do_rescale"] and is_usual(result["rescale_factor"], result):
        check_clusters(result["clusters"])
    return result


def is_usual(unit: float, given: dict[str, Any]) -> bool:
    """Whether a colour v becomes v / 127.5 - 1, so that the uint8 quantizer serves."""
    centred = all(np.all(np.asarray(given[name]) == 0.5) for name in ("image_mean", "image_std"))
    return given["do_normalize"] and centred and math.isclose(unit, 1 / 255, rel_tol=1e-6)


def checked(name: str, value: Any) -> Any:
    """The value of a setting, tidied; its default for ``None``."""
    default, check = SETTINGS[name]
    value = default if value is None else value
    return None if value is None else check(name, value)


def _wrong(name: str, value: Any, wanted: str) -> ValueError:
    return ValueError(f"ImageGPTImageProcessor: {name} is {shown(value)}; want {wanted}")


def _flag(name: str, value: Any, default: bool | None = None) -> Any:
    if value is None:
        return default
    if not isinstance(value, bool | np.bool_):
        raise _wrong(name, value, "True or False")
    return bool(value)


def _whole(name: str, value: Any, most: int = MAX_TOKENS, least: int = 1) -> int:
    return whole_number(f"ImageGPTImageProcessor: {name}", value, least, most)


def _size(name: str, value: Any) -> dict[str, int]:
    if isinstance(value, int | np.integer):
        value = {"height": value, "width": value}
    elif isinstance(value, list | tuple) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    try:
        value = dict(value)  # transformers' SizeDict becomes one too
    except (TypeError, ValueError):
        raise _wrong(name, value, "a number of pixels, (height, width) or a dictionary") from None
    if set(value) not in _SIZE_KEYS:
        raise _wrong(name, value, "the keys " + " or ".join(str(sorted(keys)) for keys in _SIZE_KEYS))
    size = {key: _whole(f"{name}[{key!r}]", edge) for key, edge in value.items()}
    if "height" in size and size["height"] * size["width"] > MAX_TOKENS:
        raise _wrong(name, value, f"at most {MAX_TOKENS} pixels")
    return size


def _number(name: str, value: Any) -> float:
    return finite_number(f"ImageGPTImageProcessor: {name}", value)


def _per_channel(name: str, value: Any) -> float | list[float]:
    value = value.tolist() if isinstance(value, np.ndarray | Tensor) else value
    if isinstance(value, list | tuple):
        if len(value) != 3:
            raise _wrong(name, value, "a number or three")
        return [_number(name, item) for item in value]
    return _number(name, value)


def _deviation(name: str, value: Any) -> float | list[float]:
    value = _per_channel(name, value)
    if not np.asarray(value, np.float32).all():
        raise _wrong(name, value, "numbers other than 0")
    return value


def _choice(name: str, value: Any, *, choices: tuple[Any, ...]) -> Any:
    value = getattr(value, "value", value)  # transformers' enumerations
    if value not in choices or isinstance(value, bool) != isinstance(choices[0], bool):
        raise _wrong(name, value, " or ".join(repr(choice) for choice in choices))
    return value


def _device(name: str, value: Any) -> str:
    try:
        return str(torch.device(value))
    except (RuntimeError, TypeError, ValueError):
        raise _wrong(name, value, "a device such as 'cpu' or 'cuda:0'") from None


def _palette(name: str, value: Any) -> np.ndarray:
    return check_clusters(value, usual=False)  # which range is right depends on the scaling: see settle


SETTINGS: dict[str, tuple[Any, Callable[[str, Any], Any]]] = {
    "clusters": (None, _palette),
    "do_color_quantize": (True, _flag),
    "do_resize": (True, _flag),
    "size": ({"height": 32, "width": 32}, _size),
    "resample": (2, partial(_whole, most=5, least=0)),
    "do_rescale": (True, _flag),
    "rescale_factor": (1 / 255, _number),
    "do_normalize": (True, _flag),
    "image_mean": ([0.5, 0.5, 0.5], _per_channel),
    "image_std": ([0.5, 0.5, 0.5], _deviation),
    "do_center_crop": (None, _flag),
    "crop_size": (None, _size),
    "do_convert_rgb": (None, _flag),
    "do_pad": (None, partial(_choice, choices=(False,))),
    "pad_size": (None, _size),
    "data_format": (None, partial(_choice, choices=(CHANNELS_FIRST,))),
    "input_data_format": (None, partial(_choice, choices=(CHANNELS_FIRST, CHANNELS_LAST))),
    "device": (None, _device),
    "return_tensors": (None, partial(_choice, choices=("pt", "np"))),
    "disable_grouping": (None, _flag),
    "image_seq_length": (None, _whole),
}
