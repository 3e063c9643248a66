"""Bridges to Hugging Face's libraries; alone imports transformers. ``bridge``: models on shared parameters.

May use: model, checkpoint, and the ground.
"""

from igpt_fast.hf.bridge import from_transformers, to_transformers

__all__ = ["from_transformers", "to_transformers"]
