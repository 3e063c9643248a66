"""Bridges to Hugging Face's libraries; alone imports transformers. ``bridge``: models on shared parameters.
``accelerate``: transformers' models made fast in place; ``modules``: the classes that its modules get; ``cache``: what
its ``generate`` is given; ``twins``: what our engines are given.

May use: model, engines, checkpoint, ops, and the ground.
"""

from igpt_fast.hf.accelerate import Served, accelerate, accelerated, restore
from igpt_fast.hf.bridge import from_transformers, to_transformers

__all__ = ["Served", "accelerate", "accelerated", "from_transformers", "restore", "to_transformers"]
