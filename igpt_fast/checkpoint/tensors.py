"""Tensors in files: safetensors, PyTorch's ``.bin``, and the index of a sharded checkpoint.

Opening a checkpoint reads names, shapes and dtypes only, so that a caller can refuse it before any memory is
allocated; each tensor is read when it is asked for. Whatever a file claims is compared with its size first,
and nothing in a file is ever run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igpt_fast import files
from igpt_fast.checkpoint.pickles import _MAX_HEADER_BYTES, _what_it_is, scan_torch_file
from igpt_fast.checks import dtype_name
from igpt_fast.files import listed, printable

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"

_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_SHARDS = 4096
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.(?:safetensors|bin)")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not yet read."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str  # the file's own word where torch has no floating type for it
    read: Callable[[], Tensor]  # the result may be a view of the mapped file, so copy before keeping it


@dataclass(frozen=True)
class StoredWeights:
    """The tensors of a checkpoint by name, and the file (or index) that lists them."""

    source: Path
    tensors: dict[str, StoredTensor]


def open_weights(
    name_or_path: str | os.PathLike[str], *, use_safetensors: bool | None = None, **where: Any
) -> StoredWeights:
    """Opens the weights of a folder or hub repository, in transformers' order of preference.

    Args:
        name_or_path: As for ``files.find_file``.
        use_safetensors: ``True`` only safetensors, ``False`` only ``.bin``, ``None`` either.
        where: Further arguments of ``files.find_file``.

    Raises:
        FileNotFoundError: There are none; or a shard is missing.
        ValueError: A file is not what its name says, or is damaged.
    """
    names = [SAFETENSORS, SAFETENSORS_INDEX] if use_safetensors is not False else []
    names += [PICKLE, PICKLE_INDEX] if not use_safetensors else []
    for name in names:
        path = files.find_file(name_or_path, name, required=False, **where)
        if path is None:
            continue
        if not name.endswith(".json"):
            return StoredWeights(path, open_tensor_file(path))
        return _open_shards(path, lambda shard: files.find_file(name_or_path, shard, **where))
    folder = os.path.join(name_or_path, where.get("subfolder") or "").rstrip("/")
    raise FileNotFoundError(f"{folder}: no weights: none of {', '.join(names)}")


def open_tensor_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one ``.safetensors`` or ``.bin`` file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not such a file, or is damaged or malicious; the message names file and reason.
    """
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)


def _open_shards(index: Path, find: Callable[[str], Path | None]) -> StoredWeights:
    shards = _read_index(index)
    tensors: dict[str, StoredTensor] = {}
    for shard, names in shards.items():
        path = find(shard)
        assert path is not None
        found = open_tensor_file(path)
        if missing := names - found.keys():
            raise ValueError(f"{path}: lacks tensors that {index.name} lists there: {listed(missing)}")
        if extra := found.keys() - names:
            raise ValueError(f"{path}: holds tensors that {index.name} does not list there: {listed(extra)}")
        tensors.update(found)
    return StoredWeights(index, tensors)


def _read_index(index: Path) -> dict[str, set[str]]:
    """Shard file -> names of its tensors."""
    weight_map = files.read_json(index, _MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map")
    suffix = ".safetensors" if index.name == SAFETENSORS_INDEX else ".bin"
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        # Plain names only: a path could point anywhere on this machine.
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard) or not shard.endswith(suffix):
            raise ValueError(f"{index}: {printable(name)}: not a plain {suffix} file name: {printable(shard)}")
        shards.setdefault(shard, set()).add(name)
    if len(shards) > _MAX_SHARDS:
        raise ValueError(f"{index}: lists {len(shards)} shards; at most {_MAX_SHARDS} are read")
    return shards


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
    length = int.from_bytes(head[:8], "little")
    if size < 8 or length > size - 8:
        what = _what_it_is(head) or f"its header claims {length} bytes, the file has {size}: truncated or damaged"
        raise ValueError(f"{path}: not a safetensors file: {what}")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"{path}: header of {length} bytes; at most {_MAX_HEADER_BYTES} are read")
    try:
        file_ = safe_open(path, "pt")
        tensors = {}
        for name in file_.keys():  # noqa: SIM118, not a mapping
            part = file_.get_slice(name)
            kind = part.get_dtype()
            dtype = _SAFETENSORS_DTYPES.get(kind, kind)
            tensors[name] = StoredTensor(path, tuple(part.get_shape()), dtype, partial(_read_safetensor, path, name))
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a usable safetensors file: {files.first_line(error)}") from error
    return tensors


def _read_safetensor(path: Path, name: str) -> Tensor:
    """A view of the file, mapped for this tensor alone: what is read of a mapping counts as the process's memory."""
    from safetensors import safe_open

    try:
        return safe_open(path, "pt").get_tensor(name)
    except Exception as error:
        raise ValueError(f"{path}: {printable(name)} cannot be read: {files.first_line(error)}") from error


def _open_pickle(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    try:
        zipped = scan_torch_file(path)
    except ValueError as error:
        raise ValueError(f"{path}: not a usable PyTorch checkpoint: {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True if zipped else None)
    except Exception as error:  # what a damaged file raises is not documented
        raise ValueError(f"{path}: not a usable PyTorch checkpoint: {files.first_line(error)}") from error
    return _of_state(path, state, size)


def given_weights(state_dict: Mapping[str, Tensor]) -> StoredWeights:
    """The tensors of a state dict in memory, for the checks that those of files get.

    Raises:
        ValueError: It is not a state dict.
    """
    source = Path("state_dict")
    return StoredWeights(source, _of_state(source, state_dict, None))


def _of_state(path: Path, state: Any, size: int | None) -> dict[str, StoredTensor]:
    """The tensors of a state dict that came from a file of a size, or from nowhere."""
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: holds a value of type {type(state).__name__}, not a state dict")
    tensors, claimed = {}, 0
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = f"a value of type {type(value).__name__}"
            raise ValueError(f"{path}: not a state dict: entry {printable(name)} is {kind}")
        # A view may repeat a few stored bytes into any shape.
        claimed += value.numel() * value.element_size()
        if size is not None and claimed > size:
            raise ValueError(f"{path}: {printable(name)}: the tensors claim more bytes than the file has ({size})")
        if value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{path}: {printable(name)}: not an ordinary tensor")
        dtype = value.dtype if value.dtype in _SAFETENSORS_DTYPES.values() else dtype_name(value.dtype)
        tensors[name] = StoredTensor(path, tuple(value.shape), dtype, value.detach)
    return tensors
