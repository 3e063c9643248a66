"""ImageGPT made fast for PyTorch: drop-in model classes, colour quantization, sampling, single ops.

The names below are loaded when they are first used, so that ``import igpt_fast`` alone stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# Module -> the public names that it defines. transformers' older names are aliases.
_DEFINED = {
    "config": "ImageGPTConfig",
    "model": "ImageGPTModel ImageGPTForCausalImageModeling ImageGPTForImageClassification",
    "engines.cache": "DynamicCache StaticCache",
    "image": "ImageGPTImageProcessor quantize dequantize fit_clusters load_clusters save_clusters open_image image_grid"
    " save_image save_animation to_rgb resize center_crop",
    "pipeline": "Pipeline Generation",
    "likelihood.scores": "Scores",
    "environment": "show_config",
    "backend": "set_backend get_backend use_backend BackendUnavailableError",
}
_NAMES = {name: module for module, names in _DEFINED.items() for name in names.split()}
_ALIASES = {
    "ImageGPTForCausalLM": "ImageGPTForCausalImageModeling",
    "ImageGPTFeatureExtractor": "ImageGPTImageProcessor",
    "ImageGPTImageProcessorFast": "ImageGPTImageProcessor",
    "ImageGPTImageProcessorPil": "ImageGPTImageProcessor",
    "ImageGPTTokenizer": "ImageGPTImageProcessor",
}
_MODULES = ("backend", "hf", "image", "ops", "reference")

__all__ = ["__version__", *_MODULES, *_NAMES, *_ALIASES]

if TYPE_CHECKING:
    from igpt_fast import backend as backend
    from igpt_fast import hf as hf
    from igpt_fast import image as image
    from igpt_fast import ops as ops
    from igpt_fast import reference as reference
    from igpt_fast.backend import BackendUnavailableError as BackendUnavailableError
    from igpt_fast.backend import get_backend as get_backend
    from igpt_fast.backend import set_backend as set_backend
    from igpt_fast.backend import use_backend as use_backend
    from igpt_fast.config import ImageGPTConfig as ImageGPTConfig
    from igpt_fast.engines.cache import DynamicCache as DynamicCache
    from igpt_fast.engines.cache import StaticCache as StaticCache
    from igpt_fast.environment import show_config as show_config
    from igpt_fast.image import ImageGPTImageProcessor as ImageGPTImageProcessor
    from igpt_fast.image import center_crop as center_crop
    from igpt_fast.image import dequantize as dequantize
    from igpt_fast.image import fit_clusters as fit_clusters
    from igpt_fast.image import image_grid as image_grid
    from igpt_fast.image import load_clusters as load_clusters
    from igpt_fast.image import open_image as open_image
    from igpt_fast.image import quantize as quantize
    from igpt_fast.image import resize as resize
    from igpt_fast.image import save_animation as save_animation
    from igpt_fast.image import save_clusters as save_clusters
    from igpt_fast.image import save_image as save_image
    from igpt_fast.image import to_rgb as to_rgb
    from igpt_fast.likelihood.scores import Scores as Scores
    from igpt_fast.model import ImageGPTForCausalImageModeling as ImageGPTForCausalImageModeling
    from igpt_fast.model import ImageGPTForImageClassification as ImageGPTForImageClassification
    from igpt_fast.model import ImageGPTModel as ImageGPTModel
    from igpt_fast.pipeline import Generation as Generation
    from igpt_fast.pipeline import Pipeline as Pipeline

    ImageGPTForCausalLM = ImageGPTForCausalImageModeling
    ImageGPTFeatureExtractor = ImageGPTImageProcessorFast = ImageGPTImageProcessorPil = ImageGPTImageProcessor
    ImageGPTTokenizer = ImageGPTImageProcessor


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
