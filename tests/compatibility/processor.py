"""A pytest plugin: transformers' own tests of its ImageGPT processor, run on ours.

``python -m pytest -p processor tests/models/imagegpt/test_image_processing_imagegpt.py`` in a copy of transformers'
tests, with this folder on ``PYTHONPATH``; with ``IMAGEGPT_PROCESSOR=transformers`` on transformers' own, the control.
"""

from __future__ import annotations

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
    """Lets the tests of one version of transformers run beside the common ones of the next."""
    for module in {item.module for item in items if item.module.__name__.endswith("test_image_processing_imagegpt")}:
        common = __import__(module.ImageProcessingTestMixin.__module__, fromlist=["ImageProcessingTester"])
        newer, older = getattr(common, "ImageProcessingTester", None), module.ImageGPTImageProcessingTester
        if newer is None or issubclass(older, newer):
            continue

        class Tester(older):  # type: ignore[misc, valid-type]
            def __init__(self, parent: Any, **settings: Any) -> None:
                super().__init__(parent, **settings)
                self.image_processing_classes = newer._get_image_processing_classes(self)

        Tester.__module__ = module.__name__
        module.ImageGPTImageProcessingTester = Tester
        module.ImageGPTImageProcessingTest.image_processor_tester_class = Tester
