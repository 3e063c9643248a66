"""The device maps of ``from_pretrained``: where which module of a model goes, as the library accelerate has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from igpt_fast import kin
from igpt_fast.files import listed, shown

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
_WHO = "from_pretrained: device_map"


def one_device(device_map: Any) -> tuple[torch.device | None, Any]:
    """(device, ``None``) where a device map names one for all, else (``None``, the map).

    Raises:
        ValueError: It is neither a device, nor the name of a strategy, nor a dict of modules and their places.
    """
    if isinstance(device_map, Mapping):
        if not device_map or not all(isinstance(name, str) for name in device_map):
            raise ValueError(f"{_WHO}: want the names of modules and where they go, got {shown(device_map)}")
        places = {name: place if place == "disk" else _device(place) for name, place in device_map.items()}
        if places.keys() != {""} or places[""] == "disk":
            return None, dict(device_map)
        device_map = device_map[""]
    elif isinstance(device_map, str) and device_map in _STRATEGIES:
        return None, device_map
    return _device(device_map), None


def _device(place: Any) -> torch.device:
    try:
        if isinstance(place, bool):
            raise TypeError("a bool is no device")
        return torch.device(place)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{_WHO}: want a device, one of {', '.join(_STRATEGIES)}, or a dict of modules and their devices or 'disk',"
            f" got {shown(place)}"
        ) from error


def places_of(model: Any, device_map: Any, max_memory: Any, folder: Any) -> dict[str, Any]:
    """Where the modules of a model go, whose weights may be on the meta device still.

    Raises:
        ImportError: accelerate is not installed.
        ValueError: A weight has no place, or goes to the disk and there is no folder for it.
    """
    utils = kin.library("accelerate.utils", _WHO)
    if isinstance(device_map, str):
        whole = list(model._no_split_modules)
        max_memory = None if max_memory is None else dict(max_memory)  # which accelerate writes to
        if device_map != "sequential":
            low = device_map == "balanced_low_0"
            max_memory = utils.get_balanced_memory(model, max_memory, no_split_module_classes=whole, low_zero=low)
        device_map = utils.infer_auto_device_map(model, max_memory, no_split_module_classes=whole)
    left = [
        name
        for name, _ in model.named_parameters()
        if not any(place in ("", name) or name.startswith(f"{place}.") for place in device_map)
    ]
    if left:
        raise ValueError(f"{_WHO}: has no place for {listed(left)}")
    if folder is None and (on_disk := [name for name, place in device_map.items() if place == "disk"]):
        raise ValueError(f"{_WHO}: {listed(on_disk)} would go to the disk: give offload_folder")
    if device_map.keys() == {""}:  # which accelerate writes to no disk
        return {name: device_map[""] for name, _ in model.named_children()}
    return dict(device_map)


def dispatch(model: nn.Module, places: dict[str, Any], folder: Any) -> None:
    """Puts the modules of a model where ``places_of`` says."""
    if "disk" in places.values():  # the index of other weights, which accelerate would take for this model's
        Path(folder, "index.json").unlink(missing_ok=True)
    skip: Any = model._skip_keys_device_placement
    kin.library("accelerate", _WHO).dispatch_model(model, places, offload_dir=folder, skip_keys=skip)
