"""ImageGPT made fast for PyTorch: drop-in model classes, colour quantization, sampling, single ops.

The names below are loaded when they are first used, so that ``import igpt_fast`` alone stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that defines it. transformers' older names are aliases.
_NAMES = {
    "ImageGPTConfig": "config",
    "ImageGPTModel": "model",
    "ImageGPTForCausalImageModeling": "model",
    "ImageGPTForImageClassification": "model",
    "DynamicCache": "cache",
    "StaticCache": "cache",
    "ImageGPTImageProcessor": "image",
    "quantize": "image",
    "dequantize": "image",
    "fit_clusters": "image",
    "load_clusters": "image",
    "save_clusters": "image",
    "open_image": "image",
    "image_grid": "image",
    "save_image": "image",
    "save_animation": "image",
    "to_rgb": "image",
    "resize": "image",
    "center_crop": "image",
    "Pipeline": "pipeline",
    "Generation": "pipeline",
    "show_config": "backend",
    "set_backend": "backend",
    "get_backend": "backend",
    "use_backend": "backend",
    "BackendUnavailableError": "backend",
}
_ALIASES = {
    "ImageGPTForCausalLM": "ImageGPTForCausalImageModeling",
    "ImageGPTFeatureExtractor": "ImageGPTImageProcessor",
    "ImageGPTImageProcessorFast": "ImageGPTImageProcessor",
    "ImageGPTTokenizer": "ImageGPTImageProcessor",
}
_MODULES = ("backend", "image", "ops", "reference")

__all__ = ["__version__", *_MODULES, *_NAMES, *_ALIASES]

if TYPE_CHECKING:
    from igpt_fast import backend as backend
    from igpt_fast import image as image
    from igpt_fast import ops as ops
    from igpt_fast import reference as reference
    from igpt_fast.backend import BackendUnavailableError as BackendUnavailableError
    from igpt_fast.backend import get_backend as get_backend
    from igpt_fast.backend import set_backend as set_backend
    from igpt_fast.backend import show_config as show_config
    from igpt_fast.backend import use_backend as use_backend


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"igpt_fast.{name}")
    if name in _ALIASES:
        value = __getattr__(_ALIASES[name])
    elif name in _NAMES:
        value = getattr(importlib.import_module(f"igpt_fast.{_NAMES[name]}"), name)
    else:
        raise AttributeError(f"module 'igpt_fast' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
