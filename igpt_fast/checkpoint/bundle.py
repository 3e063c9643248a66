"""TensorFlow's checkpoints (tensor bundles, V2) without TensorFlow.

``PREFIX.index`` is a table of LevelDB's: blocks of sorted names, each block with a checksum, whose values are protocol
buffers: a header, then of each variable its dtype, shape, shard, place and checksum. ``PREFIX.data-00000-of-00032`` and
so on, the shards, hold the values and nothing else. So every byte of every file is under a checksum or can have but one
value, and whatever was damaged is noticed.

Source: tensorflow/core/protobuf/tensor_bundle.proto; LevelDB's doc/table_format.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from igpt_fast import backend, files
from igpt_fast.files import printable, shown

_MAX_INDEX_BYTES = 64 << 20
_MAX_SHARDS = 4096
# Far above iGPT-XL with an optimizer's slots, far below what would hurt as objects.
_MAX_VARIABLES = 1 << 16
_MAX_NAME_BYTES = 1024  # names share beginnings: a small table could claim long ones again and again
_MAX_AXES = 8
_MAX_MESSAGE_BYTES = 4096  # of a variable: a shape and five numbers
_CHUNK = 1 << 20

_FOOTER_BYTES = 48
_TRAILER_BYTES = 5  # behind each block: how it is compressed, and the checksum
_MAGIC = 0xDB4775248B80FB57
_VERSION = 1
# Bytes of an element, by TensorFlow's numbers of dtypes; others (strings, resources) have none of their own.
_ITEM_BYTES = {1: 4, 2: 8, 3: 4, 4: 1, 5: 2, 6: 1, 8: 8, 9: 8, 10: 1, 14: 2, 17: 2, 18: 16, 19: 2, 22: 4, 23: 8}
# Field -> wire type of the messages: 0 a varint, 2 bytes, 5 four bytes.
_HEADER = {1: 0, 2: 0, 3: 2}  # shards, endianness, version
_VERSIONS = {1: 0, 2: 0, 3: 0}  # of the producer, of the oldest consumer, bad ones
_ENTRY = {1: 0, 2: 2, 3: 0, 4: 0, 5: 0, 6: 5, 7: 2}  # dtype, shape, shard, offset, size, checksum, slices
_SHAPE = {2: 2, 3: 0}  # axes, whether their number is unknown
_AXIS = {1: 0, 2: 2}  # size, name


@dataclass(frozen=True)
class Variable:
    """What the index says of a variable: ``dtype`` is TensorFlow's number, ``checksum`` the masked CRC-32C."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int


class Bundle:
    """A checkpoint whose index and files have been found to fit each other; values are read when they are asked for.

    Args:
        prefix: Its files' common beginning, such as ``model.ckpt-1000000``.

    Raises:
        FileNotFoundError: There is no index.
        BackendUnavailableError: The compiled module, which computes the checksums, is not there.
        ValueError: Anything else is wrong; the message names the file.
    """

    def __init__(self, prefix: Path) -> None:
        self.index = Path(f"{prefix}.index")
        content = _read_index(self.index)
        try:
            shards, self.variables = _parse(content)
        except ValueError as error:
            raise ValueError(f"{self.index}: not a usable index of a TensorFlow checkpoint: {error}") from error
        self.shards = [Path(f"{prefix}.data-{i:05}-of-{shards:05}") for i in range(shards)]
        self._check_places()

    def read(self, name: str, out: np.ndarray) -> None:
        """Reads a variable's bytes into a contiguous array of its size, and holds them to the checksum.

        Raises:
            ValueError: They are damaged, or cannot be read; the message names the shard and the variable.
        """
        variable = self.variables[name]
        if out.nbytes != variable.size or not out.flags.c_contiguous:
            raise ValueError(f"{self.index}: {name}: {out.nbytes} bytes are asked for, it has {variable.size}")
        with self._open(name) as file:
            self._fill(file, name, out)
        self._check(name, _crc32c(out))

    def verify(self, name: str) -> None:
        """Holds a variable to its checksum in little memory. Raises as ``read``."""
        left, crc = self.variables[name].size, 0
        buffer = np.empty(min(left, _CHUNK), np.uint8)
        with self._open(name) as file:
            while left:
                part = buffer[: min(left, _CHUNK)]
                self._fill(file, name, part)
                crc = _crc32c(part, crc)
                left -= len(part)
        self._check(name, crc)

    def _open(self, name: str) -> IO[bytes]:
        variable = self.variables[name]
        try:
            file = _open_regular(self.shards[variable.shard])
        except OSError as error:
            raise ValueError(f"{self.shards[variable.shard]}: {printable(name)}: {files.first_line(error)}") from error
        file.seek(variable.offset)
        return file

    def _fill(self, file: IO[bytes], name: str, out: np.ndarray) -> None:
        place = f"{self.shards[self.variables[name].shard]}: {printable(name)}"
        try:
            count = file.readinto(out.reshape(-1).view(np.uint8).data)  # type: ignore[attr-defined]
        except OSError as error:
            raise ValueError(f"{place}: cannot be read: {files.first_line(error)}") from error
        if count != out.nbytes:
            raise ValueError(f"{place}: the file has become shorter while it was read")

    def _check(self, name: str, crc: int) -> None:
        variable = self.variables[name]
        if _masked(crc) != variable.checksum:
            raise ValueError(f"{self.shards[variable.shard]}: {printable(name)}: damaged: its checksum is another")

    def _check_places(self) -> None:
        """Every byte of every shard is one variable's."""
        ends = [0] * len(self.shards)
        for name, variable in sorted(self.variables.items(), key=lambda item: (item[1].offset, item[1].size)):
            place = f"{self.index}: {printable(name)}"
            if variable.shard >= len(self.shards):
                raise ValueError(f"{place}: is in shard {shown(variable.shard)} of {len(self.shards)}")
            if variable.offset != ends[variable.shard]:
                what = "overlaps another variable" if variable.offset < ends[variable.shard] else "follows a gap"
                raise ValueError(f"{place}: {what}: begins at {shown(variable.offset)}, not {ends[variable.shard]}")
            ends[variable.shard] += variable.size
        for shard, end in zip(self.shards, ends, strict=True):
            try:
                with _open_regular(shard) as file:
                    size = file.seek(0, 2)
            except OSError as error:
                raise ValueError(f"{files.first_line(error)}, and {self.index} says that it has variables") from error
            if size != end:
                raise ValueError(f"{shard}: has {size} bytes, and {self.index.name} says {shown(end)}: damaged")


def _open_regular(path: Path) -> IO[bytes]:
    """As ``files.open_input``, but no pipes, whose other end may never write."""
    if path.exists() and not path.is_dir() and not path.is_file():
        raise ValueError(f"{path}: is a pipe, a device or a socket, not a file")
    return files.open_input(path)


def _read_index(path: Path) -> bytes:
    with _open_regular(path) as file:
        size = file.seek(0, 2)
        if size > _MAX_INDEX_BYTES:
            raise ValueError(f"{path}: an index of {size} bytes; at most {_MAX_INDEX_BYTES} are read")
        file.seek(0)
        return file.read(size)


def _crc32c(data: np.ndarray | bytes, before: int = 0) -> int:
    if backend._C is None:
        raise backend.BackendUnavailableError(f"crc32c: {backend.native_reason}")
    array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    return int(backend._C.crc32c(array.ctypes.data, array.nbytes, before))


def _masked(crc: int) -> int:
    """As it is stored: a checksum of data with checksums in it would be weak."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# --- the table ---------------------------------------------------------------------------------------------------


def _parse(content: bytes) -> tuple[int, dict[str, Variable]]:
    """The number of shards, and the variables."""
    variables: dict[str, Variable] = {}
    shards = None
    for key, value in _table(content):
        if shards is None:
            if key:
                raise ValueError("has no header")
            shards = _shards(value)
            continue
        if len(variables) == _MAX_VARIABLES:
            raise ValueError(f"has more than {_MAX_VARIABLES} variables")
        try:
            name = key.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"the name {shown(key)} is not UTF-8") from None
        try:
            variables[name] = _variable(value)
        except ValueError as error:
            raise ValueError(f"{printable(name)}: {error}") from error
    if shards is None:
        raise ValueError("has no header")
    return shards, variables


def _table(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys, in strictly ascending order, and values. The blocks fill the file up to its footer, in this order: those of
    the entries, one about the table (empty), one of the first ones' places."""
    if len(content) < _FOOTER_BYTES or int.from_bytes(content[-8:], "little") != _MAGIC:
        raise ValueError("it has no footer of one: truncated, or another kind of file")
    footer = content[-_FOOTER_BYTES:-8]
    about, at = _handle(footer, 0)
    places, at = _handle(footer, at)
    if any(footer[at:]):
        raise ValueError("its footer is damaged")
    blocks = []
    for last, value in _entries(_block(content, places)):
        blocks.append((last, _handle_alone(value)))
        if len(blocks) > _MAX_VARIABLES:
            raise ValueError(f"has more than {_MAX_VARIABLES} blocks")
    end = 0
    for offset, size in [*(handle for _, handle in blocks), about, places]:
        if offset != end:
            raise ValueError(f"a block begins at {shown(offset)}, and the one before ends at {end}")
        end += size + _TRAILER_BYTES
    if end != len(content) - _FOOTER_BYTES:
        raise ValueError(f"its blocks end at {shown(end)}, its footer begins at {len(content) - _FOOTER_BYTES}")
    _block(content, about)
    before: bytes | None = None
    for last, handle in blocks:
        for key, value in _entries(_block(content, handle)):
            if (before is not None and key <= before) or key > last:
                raise ValueError(f"its names are not in order at {shown(key)}")
            before = key
            yield key, value
        before = last  # at least the block's last name, and before the next one's first


def _block(content: bytes, handle: tuple[int, int]) -> bytes:
    offset, size = handle
    end = offset + size
    if end + _TRAILER_BYTES > len(content) - _FOOTER_BYTES:
        raise ValueError(f"a block claims the bytes {shown(offset)} to {shown(end)} of {len(content)}")
    stored = int.from_bytes(content[end + 1 : end + _TRAILER_BYTES], "little")
    if _masked(_crc32c(content[offset : end + 1])) != stored:
        raise ValueError(f"the block at {offset} is damaged: its checksum is another")
    if kind := content[end]:
        name = {1: "Snappy"}.get(kind, f"method {kind}")
        raise ValueError(f"the block at {offset} is compressed ({name}); TensorFlow has compressed none since 1.2")
    return content[offset:end]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values. A key is stored as what it does not share with the one before."""
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 - 4 * restarts
    if len(block) < 4 or end < 0:
        raise ValueError(f"a block of {len(block)} bytes claims {restarts} restarts")
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or shared + own > _MAX_NAME_BYTES or at + own + length > end:
            raise ValueError(f"an entry claims {shown(shared)} + {shown(own)} and {shown(length)} bytes")
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + length]
        at += own + length


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Offset and size of a block, and where the next number begins."""
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _handle_alone(data: bytes) -> tuple[int, int]:
    handle, at = _handle(data, 0)
    if at != len(data):
        raise ValueError("the place of a block has more than two numbers")
    return handle


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of up to 64 bits, seven of them in a byte, and where the next one begins."""
    number = 0
    for shift, byte in enumerate(data[at : at + 10]):
        number |= (byte & 127) << 7 * shift
        if byte < 128:
            if number >> 64 or (byte == 0 and shift):
                raise ValueError("a number has more than 64 bits, or more bytes than it needs")
            return number, at + shift + 1
    raise ValueError("a number does not end")


# --- the messages ------------------------------------------------------------------------------------------------


def _message(data: bytes, kinds: Mapping[int, int]) -> dict[int, list[Any]]:
    """A protocol buffer's values by their fields' numbers; ``kinds`` has all fields that there may be."""
    if len(data) > _MAX_MESSAGE_BYTES:  # before a list of them is made
        raise ValueError(f"is described in {len(data)} bytes; want {_MAX_MESSAGE_BYTES} or less")
    found: dict[int, list[Any]] = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if kinds.get(tag >> 3) != tag & 7:
            raise ValueError(f"has an unknown field ({shown(tag >> 3)}, wire type {tag & 7})")
        number, at = _varint(data, at) if tag & 7 != 5 else (4, at)  # the value, or how many bytes it has
        value: Any = number
        if tag & 7:
            if at + number > len(data):
                raise ValueError("is cut off")
            value, at = data[at : at + number], at + number
        found.setdefault(tag >> 3, []).append(value)
    return found


def _one(message: Mapping[int, list[Any]], field: int, default: Any) -> Any:
    values = message.get(field, [default])
    if len(values) != 1:
        raise ValueError(f"has its field {field} {len(values)} times")
    return values[0]


def _shards(value: bytes) -> int:
    header = _message(value, _HEADER)
    version = _message(_one(header, 3, b""), _VERSIONS)
    shards, big, oldest = _one(header, 1, 0), _one(header, 2, 0), _one(version, 2, 0)
    if big:
        raise ValueError("was written by a big-endian machine; only little-endian files are read")
    if oldest > _VERSION:
        raise ValueError(f"wants a reader of version {shown(oldest)}; this is {_VERSION}")
    if not 1 <= shards <= _MAX_SHARDS:
        raise ValueError(f"claims {shown(shards)} shards; want 1..{_MAX_SHARDS}")
    return int(shards)


def _variable(value: bytes) -> Variable:
    entry = _message(value, _ENTRY)
    if 7 in entry:
        raise ValueError("is partitioned into slices, which are not read")
    shape = _message(_one(entry, 2, b""), _SHAPE)
    if _one(shape, 3, 0):
        raise ValueError("has an unknown shape")
    axes = [_one(_message(axis, _AXIS), 1, 0) for axis in shape.get(2, [])]
    dtype, shard, offset, size = (_one(entry, field, 0) for field in (1, 3, 4, 5))
    checksum = int.from_bytes(_one(entry, 6, bytes(4)), "little")
    if len(axes) > _MAX_AXES or max([0, *axes, offset, size]) >> 63:
        raise ValueError(f"has the shape {shown(axes)}, the offset {shown(offset)} and {shown(size)} bytes")
    if dtype not in _ITEM_BYTES:
        raise ValueError(f"has TensorFlow's dtype {shown(dtype)}, whose elements have no fixed size")
    if math.prod(axes) * _ITEM_BYTES[dtype] != size:
        raise ValueError(f"has the shape {shown(axes)} of {_ITEM_BYTES[dtype]} bytes each, but {shown(size)} bytes")
    return Variable(dtype, tuple(axes), shard, offset, size, checksum)
