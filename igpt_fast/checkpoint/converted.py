"""A network from elsewhere, under transformers' names, and how it becomes one of transformers' folders.

A tensor is read, reshaped and written before the next one is looked at: the peak of memory is about the largest one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from igpt_fast.checkpoint.pretrained import CONFIG, OF_A_MODEL, _is_finite, config_text, write_folder
from igpt_fast.checkpoint.tensors import _SAFETENSORS_DTYPES, SAFETENSORS, StoredTensor
from igpt_fast.checks import dtype_name
from igpt_fast.config import ImageGPTConfig

ARCHITECTURE = "ImageGPTForCausalImageModeling"
_CHUNK = 1 << 18  # elements


@dataclass(frozen=True)
class Converted:
    """What ``from_openai`` gives.

    Args:
        source: The file that lists what was found.
        config: Derived from the shapes.
        tensors: By the names of ``ImageGPTForCausalImageModeling``, in their order; each is read and checked on demand.
    """

    source: Path
    config: ImageGPTConfig
    tensors: dict[str, StoredTensor]

    @property
    def dtype(self) -> torch.dtype:
        """That of the token embedding, as it is stored."""
        dtype = self.tensors["transformer.wte.weight"].dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """Writes a folder that ``from_pretrained`` loads, here and in transformers; all of it, or nothing.

        Args:
            directory: Made if it does not exist; it holds one model afterwards.
            dtype: Of the weights: float32, float16 or bfloat16; as they are stored if ``None``.
            texts: Further files and what is in them.

        Raises:
            OSError: The folder or a file cannot be written.
            ValueError: A tensor is damaged, not finite, or too large for ``dtype``; or another dtype.
        """
        dtype = self.dtype if dtype is None else dtype
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"save_pretrained: dtype is {dtype}; want float32, float16 or bfloat16")

        def write(path: Path) -> None:
            write_safetensors(path, self.tensors, dtype)

        config = config_text(self.config, ARCHITECTURE, dtype)
        write_folder(Path(directory), {SAFETENSORS: write}, {**(texts or {}), CONFIG: config}, OF_A_MODEL)


def write_safetensors(path: Path, tensors: Mapping[str, StoredTensor], dtype: torch.dtype) -> None:
    """Writes tensors into a ``.safetensors`` file, one after another.

    Raises:
        OSError: It cannot be written.
        ValueError: A tensor cannot be read, is not finite, or is too large for ``dtype``; the message names it.
    """
    kind = next(name for name, known in _SAFETENSORS_DTYPES.items() if known == dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            _write(file, name, tensor, dtype)


def _write(file: IO[bytes], name: str, tensor: StoredTensor, dtype: torch.dtype) -> None:
    """A function of its own, so that one tensor is gone before the next one is read."""
    value = tensor.read()
    if tuple(value.shape) != tensor.shape:
        raise ValueError(f"{tensor.file}: {name}: became {tuple(value.shape)}, and not {tensor.shape}")
    for part in value.reshape(-1).split(_CHUNK):
        stored = part.to(dtype)
        if not _is_finite(stored):
            what = f"NaN, infinity, or values too large for {dtype_name(dtype)}"
            raise ValueError(f"{tensor.file}: {name}: holds {what}")
        file.write(stored.view(torch.uint8).numpy())
