"""Tensors in files: safetensors, PyTorch's ``.bin``, and the index of a sharded checkpoint.

Opening a checkpoint reads names, shapes and dtypes only, so that a caller can refuse it before any memory is
allocated; each tensor is read when it is asked for. Whatever a file claims is compared with its size first,
and nothing in a file is ever run.
"""

from __future__ import annotations

import io
import os
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igpt_fast import files

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"

_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Of a safetensors header, a pickle, a zip directory, an index: far above any real checkpoint (XL: 724 tensors,
# 90 kB), far below what would hurt when parsed into objects.
_MAX_HEADER_BYTES = 4 << 20
_MAX_SHARDS = 4096

_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.(?:safetensors|bin)")

# What the pickle of a state dict consists of. ``weights_only`` already keeps code out; it does let through
# ``bytearray(10**12)``, which only eats the memory.
_PICKLE_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(?:tensor(?:_v2)?|parameter)|torch Size|torch [A-Z]\w*Storage"
    r"|torch\.storage (?:Untyped|Typed)Storage|torch\.nn\.parameter Parameter"
)
_PICKLE_OPS = re.compile(
    r"PROTO|STOP|GLOBAL|REDUCE|BUILD|BINPERSID|MARK|TUPLE[123]?|EMPTY_(?:TUPLE|LIST|DICT)|APPENDS?|SETITEMS?"
    r"|(?:LONG_)?BIN(?:PUT|GET)|NONE|NEWTRUE|NEWFALSE|BININT[12]?|LONG1|BINFLOAT|BINUNICODE|SHORT_BINSTRING"
)
_MAX_SHARED_TUPLES = 12  # uses of a tuple after its first; nested, they make at most 2**12 of it
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of the format before PyTorch 1.6
_LEGACY_PICKLES = 5  # magic, protocol, system, the object, the storage keys; then raw storages


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not yet read.

    Args:
        file: Where it is.
        shape, dtype: What it is; ``dtype`` is the file's own word where torch has no floating type for it.
        read: Reads it; the result may be a view of the mapped file, so copy before keeping it.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    read: Callable[[], Tensor]


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


def some(names: Iterable[str], limit: int = 8) -> str:
    """At most ``limit`` names for a message; each is shortened, for a file may hold anything."""
    listed = sorted(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(_printable(name) for name in listed[:limit]) + more


def _printable(name: Any) -> str:
    text = ascii(str(name)[:101])[1:-1]
    return text if len(text) <= 100 else text[:97] + "..."


# --- sharded -----------------------------------------------------------------------------------------------------


def _open_shards(index: Path, find: Callable[[str], Path | None]) -> StoredWeights:
    shards = _read_index(index)
    tensors: dict[str, StoredTensor] = {}
    for shard, names in shards.items():
        path = find(shard)
        assert path is not None
        found = open_tensor_file(path)
        if missing := names - found.keys():
            raise ValueError(f"{path}: lacks tensors that {index.name} lists there: {some(missing)}")
        if extra := found.keys() - names:
            raise ValueError(f"{path}: holds tensors that {index.name} does not list there: {some(extra)}")
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
            raise ValueError(f"{index}: {_printable(name)}: not a plain {suffix} file name: {_printable(shard)}")
        shards.setdefault(shard, set()).add(name)
    if len(shards) > _MAX_SHARDS:
        raise ValueError(f"{index}: lists {len(shards)} shards; at most {_MAX_SHARDS} are read")
    return shards


# --- safetensors -------------------------------------------------------------------------------------------------


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
            read = _reader(path, name, partial(_read_safetensor, path))
            tensors[name] = StoredTensor(path, tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(kind, kind), read)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a usable safetensors file: {error}") from error
    return tensors


def _read_safetensor(path: Path, name: str) -> Tensor:
    """A view of the file, mapped for this tensor alone: what is read of a mapping counts as the process's memory."""
    from safetensors import safe_open

    return safe_open(path, "pt").get_tensor(name)


def _reader(path: Path, name: str, get: Callable[[str], Tensor]) -> Callable[[], Tensor]:
    def read() -> Tensor:
        try:
            return get(name)
        except Exception as error:
            raise ValueError(f"{path}: {_printable(name)} cannot be read: {error}") from error

    return read


def _what_it_is(head: bytes) -> str | None:
    """A better reason than "damaged" for files that are often found in place of weights."""
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer; fetch the real file (git lfs pull)"
    if re.match(rb"\s*<[!?A-Za-z]", head) and b"\0" not in head[:8]:
        return "it is a web page (HTML or XML), perhaps a failed download"
    if head.startswith(b"PK\x03\x04"):
        return "it is a zip file, such as PyTorch's .bin"
    return None


# --- PyTorch .bin ------------------------------------------------------------------------------------------------


def _open_pickle(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    try:
        zipped = scan_torch_file(path)
    except ValueError as error:
        raise ValueError(f"{path}: not a usable PyTorch checkpoint: {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True if zipped else None)
    except Exception as error:  # what a damaged file raises is not documented
        raise ValueError(f"{path}: not a usable PyTorch checkpoint: {files.first_line(error)[:300]}") from error
    return _state_dict(path, state, size)


def scan_torch_file(path: Path, *, largest: int | None = None) -> bool:
    """Refuses a ``torch.save`` file that holds more than tensors in containers, or claims more than it has.

    To be called before ``torch.load(weights_only=True)``, which keeps code out, but lets a small file eat the
    memory or the time.

    Args:
        path: The file.
        largest: The largest number that its pickle may hold; ``None``: the file's size, which no size, offset
            or stride of a tensor exceeds.

    Returns:
        Whether it is of the zip format, the one since PyTorch 1.6.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is no such file; the message is the reason alone, so the caller names the file.
    """
    size = path.stat().st_size
    largest = max(size, 1 << 16) if largest is None else largest
    with path.open("rb") as file:
        head = file.read(64)
        file.seek(0)
        zipped = head.startswith(b"PK\x03\x04")
        try:
            if zipped:
                _scan_pickle(_zip_pickle(file, size), largest)
            else:
                _scan_legacy(file, largest)
        except MemoryError:
            raise
        except Exception as error:  # what zipfile and pickletools raise on damage is not documented: EOFError, ...
            raise ValueError((None if zipped else _what_it_is(head)) or files.first_line(error)) from error
    return zipped


def _state_dict(path: Path, state: Any, size: int) -> dict[str, StoredTensor]:
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds {_article(state)}, not a state dict")
    tensors = {}
    claimed = 0
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path}: not a state dict: entry {_printable(name)} is {_article(value)}")
        # A view may repeat a few stored bytes into any shape.
        claimed += value.numel() * value.element_size()
        if claimed > size:
            raise ValueError(f"{path}: {_printable(name)}: the tensors claim more bytes than the file has ({size})")
        if value.layout != torch.strided or value.device.type != "cpu":
            raise ValueError(f"{path}: {_printable(name)}: not an ordinary tensor")
        dtype = value.dtype if value.dtype in _SAFETENSORS_DTYPES.values() else str(value.dtype).removeprefix("torch.")
        tensors[name] = StoredTensor(path, tuple(value.shape), dtype, _constant(value.detach()))
    return tensors


def _article(value: Any) -> str:
    return f"a value of type {type(value).__name__}"


def _constant(value: Tensor) -> Callable[[], Tensor]:
    return lambda: value


def _zip_pickle(file: io.BufferedReader, size: int) -> io.BytesIO:
    """The pickle in a ``torch.save`` file, once the zip's entries are known to be stored plainly and to fit."""
    directory = _zip_directory_bytes(file, size)
    if directory > _MAX_HEADER_BYTES:
        raise ValueError(f"zip directory of {directory} bytes; at most {_MAX_HEADER_BYTES} are read")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        total = sum(entry.file_size for entry in entries)
        if total > size:
            raise ValueError(f"its entries claim {total} bytes, the file has {size}: a zip bomb or damaged")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError(f"entry {_printable(entry.filename)} is compressed, which PyTorch never does")
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise ValueError("a TorchScript archive, not a state dict")
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"a zip with {len(pickles)} data.pkl instead of one")
        if pickles[0].file_size > _MAX_HEADER_BYTES:
            raise ValueError(f"data.pkl of {pickles[0].file_size} bytes; at most {_MAX_HEADER_BYTES} are read")
        return io.BytesIO(archive.read(pickles[0]))


def _zip_directory_bytes(file: io.BufferedReader, size: int) -> int:
    """Size of a zip's central directory as its end records claim; ``zipfile`` would parse all of it at once."""
    start = max(0, size - (1 << 16) - 22 - 20 - 56)  # longest comment, end record, zip64 locator and record
    file.seek(start)
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0:
        raise ValueError("a zip without its end: truncated")
    claims = [int.from_bytes(tail[end + 12 : end + 16], "little")]
    if tail[max(0, end - 20) : end].startswith(b"PK\x06\x07"):
        record = int.from_bytes(tail[end - 12 : end - 4], "little") - start
        # zip64: the record stands right before its locator.
        for at in {record, end - 20 - 56}:
            if at >= 0 and tail[at : at + 4] == b"PK\x06\x06":
                claims.append(int.from_bytes(tail[at + 40 : at + 48], "little"))
        claims = claims[1:] if claims[0] == 0xFFFFFFFF else claims
    file.seek(0)
    return max(claims, default=0)


def _scan_legacy(file: io.BufferedReader, largest: int) -> None:
    pickles = io.BytesIO(file.read(_MAX_HEADER_BYTES))
    if [argument for name, argument in _operations(pickles) if name == "LONG1"] != [_LEGACY_MAGIC]:
        raise ValueError("neither a zip nor PyTorch's older format")
    for _ in range(_LEGACY_PICKLES - 1):
        _scan_pickle(pickles, largest)


def _scan_pickle(stream: io.BytesIO, largest: int) -> None:
    """Refuses whatever the pickle of a state dict does not need, before anything is built from it.

    A tuple is fetched from the memo a few times at most (as the ``betas`` that groups of an optimizer share):
    tuples of the same tuple, nested a hundred times, take for ever to hash.
    """
    tuples: set[int] = set()
    fetched = 0
    before = ""
    for name, argument in _operations(stream):
        if name == "GLOBAL" and not _PICKLE_GLOBALS.fullmatch(argument):
            raise ValueError(f"its pickle names {_printable(argument.replace(' ', '.'))}, which no state dict needs")
        if isinstance(argument, int) and not 0 <= argument <= largest:
            raise ValueError(f"its pickle holds the number {argument}; at most {largest} is believed")
        if name.endswith("BINPUT") and before.startswith("TUPLE"):
            tuples.add(argument)
        fetched += name.endswith("BINGET") and argument in tuples
        if fetched > _MAX_SHARED_TUPLES:
            raise ValueError("its pickle uses the same tuples again and again")
        before = name


def _operations(stream: io.BytesIO) -> Iterator[tuple[str, Any]]:
    """Names and arguments of a pickle's operations up to its end; only those of a state dict are let through."""
    for operation, argument, _ in pickletools.genops(stream):
        if not _PICKLE_OPS.fullmatch(operation.name):
            raise ValueError(f"its pickle uses {operation.name}, which no state dict needs")
        if operation.name == "PROTO" and argument != 2:
            raise ValueError(f"its pickle has protocol {argument}; PyTorch writes 2")
        yield operation.name, argument
