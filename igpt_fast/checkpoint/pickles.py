"""PyTorch's pickled checkpoints, read opcode by opcode before torch sees them: never unpickled here."""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from igpt_fast import files
from igpt_fast.files import printable

# Of a safetensors header, a pickle, a zip directory, an index: far above any real checkpoint (XL: 724 tensors,
# 90 kB), far below what would hurt when parsed into objects.
_MAX_HEADER_BYTES = 4 << 20
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


def strings_of(path: Path) -> set[str]:
    """The strings in the pickle of a ``torch.save`` file, names of its tensors among them, whatever else it holds; the
    pickle is read, and not run.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is no such file; the message names it.
    """
    found: set[str] = set()
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        try:
            stream = _zip_pickle(file, path.stat().st_size) if zipped else io.BytesIO(file.read(_MAX_HEADER_BYTES))
            for _ in range(1 if zipped else _LEGACY_PICKLES):
                found.update(value for _, value, _ in pickletools.genops(stream) if isinstance(value, str))
        except MemoryError:
            raise
        except Exception as error:  # see scan_torch_file
            raise ValueError(f"{path}: not a PyTorch checkpoint: {files.first_line(error)}") from error
    return found


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
                raise ValueError(f"entry {printable(entry.filename)} is compressed, which PyTorch never does")
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
            raise ValueError(f"its pickle names {printable(argument.replace(' ', '.'))}, which no state dict needs")
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
