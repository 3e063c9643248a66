"""The commands, one file for each or a few: ``sample``, which has ``complete`` too; ``decode``; ``demo``;
``tokenize``, ``train``, ``finetune``, ``score``, ``features``, ``probe``; ``colours``: ``quantize`` and ``clusters``;
``convert``, ``env``, ``completion``. A function's arguments are the command's options, and its docstring the help, with
an example.

May use: the rest of cli, and everything below.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

# Group -> its commands, each with the module that has it, in the order of ``igpt --help``.
GROUPS = {
    "draw": {"sample": "sample", "complete": "sample", "decode": "decode", "demo": "demo"},
    "learn": {name: name for name in ("tokenize", "train", "finetune", "score", "features", "probe")},
    "colours": {"quantize": "colours", "clusters": "colours"},
    "tools": {name: name for name in ("convert", "env", "completion")},
}
COMMANDS = {name: module for group in GROUPS.values() for name, module in group.items()}


def load(name: str) -> Callable[..., None]:
    """The function of a command, whose module is imported only now."""
    return getattr(importlib.import_module(f"{__name__}.{COMMANDS[name]}"), name)
