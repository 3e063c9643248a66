"""Files that are not trusted, to a network's tensors and back.

``names``: what tensors are called and how they are shaped. ``tensors``: files with bounds. ``pickles``: PyTorch's own
format, scanned. ``pretrained``: ``from_pretrained`` and ``save_pretrained``; ``devices``: its device maps. ``bundle``:
TensorFlow's format.
``openai``: OpenAI's networks in it. ``foreign``: others' networks, which are told and refused. ``converted``: a network
from elsewhere, written as a folder of transformers'.
May use: backend (checksums), config, files, checks.
"""

from igpt_fast.checkpoint.openai import from_openai

__all__ = ["from_openai"]
