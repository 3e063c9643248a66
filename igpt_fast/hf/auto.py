"""transformers' automatic classes, and its pipelines with them, told to load ImageGPT's checkpoints as ours."""

from __future__ import annotations

from typing import Any

from igpt_fast import kin
from igpt_fast.config import ImageGPTConfig
from igpt_fast.image import ImageGPTImageProcessor
from igpt_fast.model import ImageGPTForCausalImageModeling, ImageGPTForImageClassification, ImageGPTModel

__all__ = ["register", "unregister"]

_MODELS = {
    "AutoModel": ImageGPTModel,
    "AutoModelForCausalLM": ImageGPTForCausalImageModeling,
    "AutoModelForImageClassification": ImageGPTForImageClassification,
}
# By transformers' names of what resizes; the last one is found by its value, which files name, and never loaded.
_PROCESSORS = {
    "pil": ImageGPTImageProcessor,
    "torchvision": ImageGPTImageProcessor,
    "name of the first": "ImageGPTImageProcessorPil",
}
_FEATURES = "image-feature-extraction"
_before: dict[str, Any] = {}  # transformers' pipelines of tasks that have one of ours


def register() -> None:
    """From now on ``AutoConfig``, ``AutoModel``, ``AutoModelForCausalLM``, ``AutoModelForImageClassification``,
    ``AutoImageProcessor`` and ``pipeline`` load the checkpoints of ImageGPT as the classes of this package; and the
    pipeline ``image-feature-extraction`` has ``pool=True`` for them.

    Those of this process alone; what was loaded before stays what it is. A second call changes nothing.

    Raises:
        ImportError: transformers is not installed, or older than 5.0.
    """
    transformers = kin.library("transformers", "igpt_fast.hf.register")
    transformers.AutoConfig.register(ImageGPTConfig.model_type, ImageGPTConfig, exist_ok=True)
    for name, model in _MODELS.items():
        getattr(transformers, name).register(ImageGPTConfig, model, exist_ok=True)
    _processors().register(ImageGPTConfig, dict(_PROCESSORS), exist_ok=True)
    tasks = _tasks()
    _before.setdefault(_FEATURES, tasks[_FEATURES])
    tasks[_FEATURES] = {**_before[_FEATURES], "impl": "igpt_fast.hf.pooling.ImageFeatureExtractionPipeline"}


def unregister() -> None:
    """Takes ``register`` back: transformers loads its own classes again.

    Raises:
        ImportError: transformers is not installed, or older than 5.0.
    """
    transformers = kin.library("transformers", "igpt_fast.hf.unregister")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    CONFIG_MAPPING._extra_content.pop(ImageGPTConfig.model_type, None)
    for mapping in (*(getattr(transformers, name)._model_mapping for name in _MODELS), _processors()):
        mapping._extra_content.pop(ImageGPTConfig, None)
    _tasks().update(_before)
    _before.clear()


def _processors() -> Any:
    # AutoImageProcessor.register takes classes alone, and not the name that is among ours.
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    return IMAGE_PROCESSOR_MAPPING


def _tasks() -> dict[str, Any]:
    from transformers.pipelines import SUPPORTED_TASKS

    return SUPPORTED_TASKS
