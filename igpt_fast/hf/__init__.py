"""Bridges to Hugging Face's libraries; alone imports transformers. ``bridge``: models on shared parameters. ``auto``:
its automatic classes and pipelines load ours, ``pooling`` among these. ``linear``: the models' linear layers as torch's
own, for quantizers.

May use: model, image, checkpoint, and the ground.
"""

from igpt_fast.hf.auto import register, unregister
from igpt_fast.hf.bridge import from_transformers, to_transformers
from igpt_fast.hf.linear import linear_layers

__all__ = ["from_transformers", "linear_layers", "register", "to_transformers", "unregister"]
