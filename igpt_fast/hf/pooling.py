"""transformers' pipeline of image features, which pools those of our models. It is loaded by transformers alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers.pipelines import image_feature_extraction

from igpt_fast.model import ImageGPTModel


class ImageFeatureExtractionPipeline(image_feature_extraction.ImageFeatureExtractionPipeline):
    """transformers' own; with ``pool=True`` an ``ImageGPTModel``, which has no pooler, gives the mean over positions.

    Over the last layer's, behind ``ln_f``, and in float32 at least: what ``ImageGPTForImageClassification`` takes, and
    ``forward_intermediates(input_ids, 1)`` gives; of other layers, and with SOS, that is to be asked for features.
    """

    def postprocess(self, model_outputs: Any, pool: Any = None, return_tensors: Any = False) -> Any:  # type: ignore[override]
        if pool and isinstance(self.model, ImageGPTModel):
            states = model_outputs["last_hidden_state"]  # (B, T, n_embd)
            wide = torch.promote_types(states.dtype, torch.float32)
            model_outputs = {"pooler_output": states.mean(dim=1, dtype=wide)}  # (B, n_embd)
        return super().postprocess(model_outputs, pool=pool, return_tensors=return_tensors)
