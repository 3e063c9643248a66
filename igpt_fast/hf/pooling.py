"""transformers' pipeline of image features, which pools those of our models. It is loaded by transformers alone."""

from __future__ import annotations

from typing import Any

from transformers.pipelines import image_feature_extraction

from igpt_fast.model import ImageGPTModel


class ImageFeatureExtractionPipeline(image_feature_extraction.ImageFeatureExtractionPipeline):
    """transformers' own; with ``pool=True`` an ``ImageGPTModel``, which has no pooler, gives the mean over positions.

    That is what ``ImageGPTForImageClassification`` takes, and computed only where it is asked for.
    """

    def postprocess(self, model_outputs: Any, pool: Any = None, return_tensors: Any = False) -> Any:  # type: ignore[override]
        if pool and isinstance(self.model, ImageGPTModel):
            model_outputs = {"pooler_output": model_outputs["last_hidden_state"].mean(dim=1)}  # (B, n_embd)
        return super().postprocess(model_outputs, pool=pool, return_tensors=return_tensors)
