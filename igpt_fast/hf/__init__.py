"""Bridges to Hugging Face's libraries; alone imports transformers.

``bridge``: models on shared parameters. ``auto``: its automatic classes and pipelines load ours, ``pooling`` among
these. ``accelerate``: transformers' models made fast in place; ``modules``: the classes that its modules get;
``cache``: what its ``generate`` is given; ``twins``: what our engines are given. ``linear``: the models' linear layers
as torch's own, for quantizers.

May use: model, engines, image, checkpoint, ops, and the ground.
"""

from igpt_fast.hf.accelerate import Served, accelerate, accelerated, restore
from igpt_fast.hf.auto import register, unregister
from igpt_fast.hf.bridge import from_transformers, to_transformers
from igpt_fast.hf.linear import linear_layers

__all__ = [
    "Served",
    "accelerate",
    "accelerated",
    "from_transformers",
    "linear_layers",
    "register",
    "restore",
    "to_transformers",
    "unregister",
]
