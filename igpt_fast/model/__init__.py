"""The network as ``torch.nn`` modules: transformers' ImageGPT classes, arguments, outputs and state-dict keys.

``imagegpt``: the network, and the model that draws; ``classification``: the one that classifies. ``layers``: what they
are made of. ``outputs``: what they return. ``trainable``: what trainers call. ``intermediates``: features, of the
layers that are asked for. ``generate``: transformers' ``generate`` on top of ``sampling``; ``settings``: what it is
asked for. ``resizing``: tables for other sizes and colours.
May use: ops, checkpoint, engines (which run it fast), sampling, and the ground.
"""

from igpt_fast.model.classification import ImageGPTForImageClassification
from igpt_fast.model.imagegpt import ImageGPTForCausalImageModeling, ImageGPTModel, ImageGPTPreTrainedModel

__all__ = [
    "ImageGPTForCausalImageModeling",
    "ImageGPTForImageClassification",
    "ImageGPTModel",
    "ImageGPTPreTrainedModel",
]
