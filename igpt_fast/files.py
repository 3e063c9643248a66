"""Files in and out: found in a folder or on the hub, read with bounds, written whole or not at all."""

from __future__ import annotations

import io
import json
import math
import os
import reprlib
import secrets
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

MAX_JSON_BYTES = 64 << 20
_MAX_JSON_DEPTH = 64  # copying and writing go one call deeper for each level
_MAX_PIPE_BYTES = 256 << 20
_MAX_SHOWN = 100  # of a value or a name
# What a .npz may unpack to: its size times the ratio, and a little file may unpack to the floor in any case. Flat
# colours compress a few hundred times at most.
_MAX_NPZ_RATIO = 400
_MIN_NPZ_BOUND = 1 << 20
_MAX_LINE = 400  # characters of what another library says, which may quote a file


def first_line(error: BaseException) -> str:
    """What an error says, in one line of bounded length that prints; its class where it says nothing."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return _cut("".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in line[: _MAX_LINE + 1]), _MAX_LINE)


def open_input(path: str | os.PathLike[str], max_pipe_bytes: int = _MAX_PIPE_BYTES) -> IO[bytes]:
    """Opens what is given as an input: a regular file, or a pipe, which is read to its end first.

    Args:
        path: The file.
        max_pipe_bytes: No more than this is read of a pipe.

    Returns:
        Open for reading, at its start; it can be rewound.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: As their names say; the message names the file.
        ValueError: A device or a socket, of which reading may never end; no usable name; or too much in a pipe.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: {'is a link to nothing' if path.is_symlink() else 'no such file'}") from None
    except (OSError, ValueError) as error:  # a link to itself, a name too long, or with a null byte
        raise ValueError(f"{str(path)[:_MAX_LINE]}: not a usable file name: {first_line(error)}") from error
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path}: is a folder, not a file")
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        raise ValueError(f"{path}: is a device or a socket, not a file")
    wait = 0 if stat.S_ISFIFO(mode) else getattr(os, "O_NONBLOCK", 0)  # what has become a pipe since shall not wait
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | wait))  # noqa: SIM115 - returned
    except PermissionError as error:
        raise PermissionError(f"{path}: cannot be read: permission denied") from error
    if stat.S_IFMT(os.fstat(file.fileno()).st_mode) != stat.S_IFMT(mode):
        file.close()
        raise ValueError(f"{path}: has become another kind of file while it was opened")
    if stat.S_ISREG(mode):
        return file
    with file:
        content = file.read(max_pipe_bytes + 1)
    if len(content) > max_pipe_bytes:
        raise ValueError(f"{path}: the pipe holds more than {max_pipe_bytes / (1 << 20):g} MiB")
    return io.BytesIO(content)


def find_file(
    name_or_path: str | os.PathLike[str],
    filename: str,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    subfolder: str = "",
    required: bool = True,
) -> Path | None:
    """Path of ``filename`` in a folder, or of a repository of the hub fetched into its cache.

    Args:
        name_or_path: A folder, or a hub name such as ``"openai/imagegpt-small"``.
        filename: Plain file name.
        revision, cache_dir, local_files_only, token, subfolder: As in ``huggingface_hub.hf_hub_download``.
        required: Raise when the file does not exist; else return ``None``.

    Raises:
        FileNotFoundError: No such folder, repository or file, or the hub cannot be reached and its cache
            does not hold the file; the message says which.
        ValueError: ``name_or_path`` is neither a folder nor a valid hub name, or the file is a folder or a
            device.
    """
    if not os.fspath(name_or_path):
        raise ValueError("name_or_path is empty")
    if filename in ("", ".", "..") or any(mark in filename for mark in "/\\\0"):
        raise ValueError(f"{filename!r}: not a plain file name")
    root = Path(name_or_path)
    if _is_folder(root):
        return _find_in_folder(root / subfolder, filename, required)
    if root.is_symlink():
        raise FileNotFoundError(f"{root}: is a link to nothing, or to itself")
    if root.exists():
        raise ValueError(f"{root}: is a file; give its folder")
    options = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
    return _find_on_hub(os.fspath(name_or_path), filename, required, {**options, "subfolder": subfolder or None})


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:  # such as a name longer than the file system allows
        raise FileNotFoundError(f"{str(path)[:200]}: no such folder: {error.strerror}") from error


def _find_in_folder(folder: Path, filename: str, required: bool) -> Path | None:
    path = folder / filename
    if path.is_file():
        return path
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path}: is a link to nothing, or to itself")
    if path.exists():
        # Opening a pipe or a device could wait for ever.
        raise ValueError(f"{path}: is {'a folder' if path.is_dir() else 'a pipe or a device'}, not a file")
    if required:
        raise FileNotFoundError(f"{folder}: {'has no ' + filename if folder.is_dir() else 'no such folder'}")
    return None


def _find_on_hub(name: str, filename: str, required: bool, options: dict[str, Any]) -> Path | None:
    import huggingface_hub
    from huggingface_hub import errors

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: no such folder")
    try:
        if not _in_cache(name, filename, options) and not options["local_files_only"]:
            # One question before the download, which would go on asking a dead network for 20 seconds.
            where = {key: options[key] for key in ("subfolder", "revision")}
            url = huggingface_hub.hf_hub_url(name, filename, **where)
            huggingface_hub.get_hf_file_metadata(url, token=options["token"], timeout=10)
        return Path(huggingface_hub.hf_hub_download(name, filename, **options))
    except errors.HFValidationError as error:
        raise ValueError(f"{name}: neither a folder nor a hub name: {first_line(error)}") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise FileNotFoundError(f"{name}: no such folder, and not found on the hub: {first_line(error)}") from error
    except Exception as error:  # the client's network errors have no common class across its versions
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            if not required:
                return None
            raise FileNotFoundError(f"{name}: the hub repository has no {filename}") from error
        if not required and _in_cache(name, "config.json", options):
            return None  # the cache holds the repository, and not this file of it
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise FileNotFoundError(
            f"{name}: no such folder; and {filename} of a hub repository of that name is neither in the cache nor"
            f" reachable ({type(cause).__name__}: {first_line(cause)[:200]})"
        ) from error


def _in_cache(name: str, filename: str, options: dict[str, Any]) -> bool:
    import huggingface_hub

    path = f"{options['subfolder']}/{filename}" if options["subfolder"] else filename
    where = {key: options[key] for key in ("cache_dir", "revision")}
    return isinstance(huggingface_hub.try_to_load_from_cache(name, path, **where), str)


def read_json(path: str | os.PathLike[str], max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: The file.
        max_bytes: No more than this is read; parsed, JSON takes up to some twenty times its size.

    Raises:
        OSError: No such file, or it cannot be read.
        ValueError: No regular file or pipe; too large, not UTF-8, not JSON, or not an object; a number that is not
            finite as a float, a name that is there twice, or more than 64 levels; the message names the file.
    """
    path = Path(path)
    with open_input(path, max_bytes) as file:
        content = file.read(max_bytes + 1)
    try:
        if len(content) > max_bytes:
            raise ValueError(f"not usable JSON: larger than {max_bytes / (1 << 20):g} MiB")
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_json(content: bytes) -> dict[str, Any]:
    """The object that a JSON text is.

    Raises:
        ValueError: As ``read_json``, without the name of a file.
    """
    try:
        data = json.loads(content.decode("utf-8"), object_pairs_hook=_object)
        if not isinstance(data, dict):
            raise ValueError("the top level is not an object")
        _check_values(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not usable JSON: {first_line(error)}") from error
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = Counter(name for name, _ in pairs)
        raise ValueError(f"has {listed([name for name, count in names.items() if count > 1], 1)} twice")
    return found


def _check_values(data: Any) -> None:
    """JSON's integers have no bound, and Python reads NaN, Infinity and 1e999 as well."""
    waiting = [("the top level", data, 1)]
    while waiting:
        name, value, depth = waiting.pop()
        if isinstance(value, dict | list):
            if depth > _MAX_JSON_DEPTH:
                raise ValueError(f"has more than {_MAX_JSON_DEPTH} levels")
            items = value.items() if isinstance(value, dict) else ((name, item) for item in value)
            waiting += ((key, item, depth + 1) for key, item in items)
        elif isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
            limit = f"{sys.float_info.max:.1e}"
            raise ValueError(f"{printable(name)} is {shown(value)}; want a finite number, at most {limit}")


def read_npy(file: IO[bytes], max_bytes: int, *, kinds: str = "iufb") -> np.ndarray:
    """The numbers in an open ``.npy`` file, or member of a ``.npz``; nothing is unpickled.

    Args:
        file: At its start. What follows the array is not read.
        max_bytes: The file's size, or less: an array that claims more is refused before anything is allocated.
        kinds: Those of dtypes that are taken; ``"U"`` are strings.

    Returns:
        Integers, floats or booleans as they are stored; read-only.

    Raises:
        OSError: It cannot be read.
        ValueError: Not such a file, not numbers, or more than ``max_bytes``; the caller names the file.
    """
    import numpy as np

    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"unknown version {version} of the format")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject or dtype.kind not in kinds or not dtype.itemsize:
            raise ValueError(f"holds {printable(str(dtype))}, not numbers")
        if any(length < 0 for length in shape):
            raise ValueError(f"has the shape {shown(shape)}")
        claimed = math.prod(shape) * dtype.itemsize
        if claimed > max_bytes:
            raise ValueError(f"claims {shown(claimed)} bytes; at most {max_bytes} are read")
        try:
            content = file.read(claimed)
        except MemoryError as error:
            raise ValueError(f"its {claimed} bytes do not fit in memory") from error
        if len(content) != claimed:
            raise ValueError(f"is truncated: {len(content)} bytes of {claimed}")
        return np.frombuffer(content, dtype=dtype).reshape(shape, order="F" if fortran else "C")
    except OSError:
        raise
    except Exception as error:  # numpy parses the header with ast, whose MemoryError is nesting; zlib has its own class
        raise ValueError(f"not a usable .npy file: {first_line(error)}") from error


def read_npz(file: IO[bytes], names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Arrays of an open ``.npz``, those of ``optional`` if it has them: numbers and strings; nothing is unpickled.

    A zip states sizes it need not keep: each is checked before it is believed, and what would unpack to more than 400
    times the file's size (1 MiB for a small file) is refused.

    Raises:
        ValueError, zipfile.BadZipFile, ...: What zipfile raises on a damaged file has no common class; the caller names
            the file.
    """
    import zipfile

    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if missing := [name for name in names if f"{name}.npy" not in members]:
            raise ValueError(f"has no array {missing[0]!r}")
        wanted = {name: members[f"{name}.npy"] for name in (*names, *optional) if f"{name}.npy" in members}
        bound = max(_MIN_NPZ_BOUND, _MAX_NPZ_RATIO * size)
        total = sum(info.file_size for info in wanted.values())
        if total > bound:
            raise ValueError(f"claims to unpack to {total} bytes from {size}; at most {bound} are believed")
        found = {}
        for name, info in wanted.items():
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{printable(info.filename)} is packed by a method that numpy does not write")
            with archive.open(info) as member:
                try:
                    found[name] = read_npy(member, info.file_size, kinds="iufbU")
                except ValueError as error:
                    raise ValueError(f"{info.filename}: {error}") from error
        return found


@contextmanager
def replacing(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; renamed to ``path`` on success, removed on failure.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is false.
        OSError: The folder does not exist or cannot be written to, or the disk is full; its ``filename`` is
            ``path`` whatever the name that was written to.
    """
    with replacing_together([path], overwrite=overwrite) as partials:
        yield partials[0]


@contextmanager
def replacing_together(
    paths: Sequence[str | os.PathLike[str]], *, overwrite: bool = True, outdated: Sequence[Path] = ()
) -> Iterator[list[Path]]:
    """Like ``replacing`` for files that belong together: all are whole before the first gets its name.

    Args:
        paths: Final names, in the order in which they are to appear.
        overwrite: Whether they may exist.
        outdated: Files that are removed before the first rename, because they would describe a mixture of
            old and new files if the process died between two renames.
    """
    targets = [Path(path) for path in paths]
    for target in targets:
        if target.is_dir():
            raise IsADirectoryError(f"{target}: is a folder")
        if target.exists() and not overwrite:
            raise FileExistsError(f"{target}: exists already")
    names = {_partial_name(target): target for target in targets}
    partials: dict[Path, int] = {}  # with the permissions that the system gives any new file
    try:
        for partial in names:
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            partials[partial] = stat.S_IMODE(os.fstat(handle).st_mode)
            os.close(handle)
        yield list(partials)
        for partial, mode in partials.items():
            partial.chmod(mode)  # a library may have put a private file of its own in its place, as safetensors does
            with partial.open("rb+") as file:
                os.fsync(file.fileno())  # the content, before the name changes
        for path in outdated:
            path.unlink(missing_ok=True)
        for partial, target in names.items():
            partial.replace(target)
    except OSError as error:
        told = _about(error, names)
        if told is error:
            raise
        raise told from error
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Fails now rather than after the work when ``folder`` cannot be made or written to; leaves no trace.

    Raises:
        OSError: What the file system says, of the folder or of the one that it would be made in.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing}: is not a directory")
    try:
        tempfile.TemporaryFile(dir=existing).close()  # asks the file system, which permissions alone do not tell
    except OSError as error:
        raise type(error)(f"{existing}: cannot be written to: {error.strerror}") from error


def _partial_name(target: Path) -> Path:
    """Hidden, new, of the same suffix; short enough wherever the target's own name is."""
    suffix = target.suffix if len(target.suffix) <= 16 else ""
    return target.parent / f".{target.name[:40]}.{secrets.token_hex(8)}.partial{suffix}"


def _about(error: OSError, names: dict[Path, Path]) -> OSError:
    """The error with the name of the file that was to be: a failed write carries none, or the temporary one."""
    if error.filename is None:
        target = next(iter(names.values())) if len(names) == 1 else next(iter(names.values())).parent
    elif isinstance(error.filename, str | os.PathLike) and Path(error.filename) in names:
        target = names[Path(error.filename)]
    else:
        return error
    if error.errno is None:
        text = str(error)
        return error if str(target) in text else OSError(f"{target}: {text or 'cannot be written'}")
    return OSError(error.errno, error.strerror, str(target))


BUNDLED = Path(__file__).parent / "assets" / "emoji16"


def listed(names: Iterable[Any], limit: int = 8) -> str:
    """At most ``limit`` names for a message, in order; each as ``printable`` has it."""
    ordered = sorted(map(printable, names))
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


def printable(name: Any) -> str:
    """A name that a file holds, for a message: in one line, ASCII, 100 characters at most."""
    return _cut(ascii(name[: _MAX_SHOWN + 1])[1:-1]) if isinstance(name, str) else shown(name)


def shown(value: Any) -> str:
    """A value from outside as ``repr`` has it, for a message: in one line, ASCII, 100 characters at most."""
    try:
        text = _BRIEF.repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python writes
        text = f"a value of type {type(value).__name__} that is too long to be written"
    return _cut(" ".join(text.split()).encode("ascii", "backslashreplace").decode())


def _cut(text: str, most: int = _MAX_SHOWN) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


_BRIEF = reprlib.Repr()  # bounds the work where a value has many parts, or parts of parts
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 2 * _MAX_SHOWN
