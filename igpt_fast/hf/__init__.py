"""Bridges to Hugging Face's libraries; alone imports transformers. ``bridge``: models on shared parameters. ``auto``:
its automatic classes load ours.

May use: model, image, checkpoint, and the ground.
"""

from igpt_fast.hf.auto import register, unregister
from igpt_fast.hf.bridge import from_transformers, to_transformers

__all__ = ["from_transformers", "register", "to_transformers", "unregister"]
