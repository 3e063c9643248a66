"""A pytest plugin: transformers' own tests of its ImageGPT processor, run on ours.

``python -m pytest -p processor tests/models/imagegpt/test_image_processing_imagegpt.py`` in a copy of transformers'
tests, with this folder on ``PYTHONPATH``; with ``IMAGEGPT_PROCESSOR=transformers`` on transformers' own, the control.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

NAMES = ("ImageGPTImageProcessor", "ImageGPTImageProcessorPil")


def substitute() -> None:
    """Puts our processor where transformers' tests look for its own: by name, and by the automatic classes."""
    import transformers
    from transformers.models import imagegpt
    from transformers.models.imagegpt import image_processing_pil_imagegpt as pil

    import igpt_fast

    igpt_fast.hf.register()
    for place in (transformers, imagegpt, pil):
        for name in NAMES:
            setattr(place, name, igpt_fast.ImageGPTImageProcessor)


def pytest_configure() -> None:
    if os.environ.get("IMAGEGPT_PROCESSOR") != "transformers":
        substitute()


def pytest_collection_modifyitems(items: list[Any]) -> None:
    for module in {item.module for item in items if item.module.__name__.endswith("test_image_processing_imagegpt")}:
        join(module)


def join(module: Any) -> None:
    """Lets the tests of one version of transformers run beside the common ones of the next."""
    common = importlib.import_module(module.ImageProcessingTestMixin.__module__)
    newer, older = getattr(common, "ImageProcessingTester", None), module.ImageGPTImageProcessingTester
    if newer is None or issubclass(older, newer):
        return

    def __init__(self: Any, parent: Any, **settings: Any) -> None:
        older.__init__(self, parent, **settings)
        self.image_processing_classes = newer._get_image_processing_classes(self)

    tester = type(older.__name__, (older,), {"__init__": __init__, "__module__": module.__name__})
    module.ImageGPTImageProcessingTester = module.ImageGPTImageProcessingTest.image_processor_tester_class = tester
