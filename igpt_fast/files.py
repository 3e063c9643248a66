"""Files in and out: found in a folder or on the hub, read with bounds, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64 << 20


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
    options = {
        "revision": revision,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "token": token,
        "subfolder": subfolder or None,
    }
    return _find_on_hub(os.fspath(name_or_path), filename, required, options)


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
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: no such folder")
    try:
        if not _in_cache(name, filename, options) and not options["local_files_only"]:
            # One question before the download, which would go on asking a dead network for 20 seconds.
            url = huggingface_hub.hf_hub_url(
                name, filename, subfolder=options["subfolder"], revision=options["revision"]
            )
            huggingface_hub.get_hf_file_metadata(url, token=options["token"], timeout=10)
        return Path(huggingface_hub.hf_hub_download(name, filename, **options))
    except HFValidationError as error:
        raise ValueError(f"{name}: neither a folder nor a hub name: {_first_line(error)}") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(f"{name}: no such folder, and not found on the hub: {_first_line(error)}") from error
    except Exception as error:  # the client's network errors have no common class across its versions
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            if not required:
                return None
            raise FileNotFoundError(f"{name}: the hub repository has no {filename}") from error
        if not required and _in_cache(name, "config.json", options):
            return None  # the cache holds the repository, and not this file of it
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise FileNotFoundError(
            f"{name}: no such folder; and {filename} of a hub repository of that name is neither in the cache nor"
            f" reachable ({type(cause).__name__}: {_first_line(cause)[:200]})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _in_cache(name: str, filename: str, options: dict[str, Any]) -> bool:
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(
        name,
        f"{options['subfolder']}/{filename}" if options["subfolder"] else filename,
        cache_dir=options["cache_dir"],
        revision=options["revision"],
    )
    return isinstance(found, str)


def read_json(path: str | os.PathLike[str], max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: The file.
        max_bytes: No more than this is read; parsed, JSON takes up to some twenty times its size.

    Raises:
        OSError: No such file, or it cannot be read.
        ValueError: Too large, not UTF-8, not JSON, or not an object; the message names the file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise ValueError(f"larger than {max_bytes / (1 << 20):g} MiB")
        data = json.loads(content.decode("utf-8"))
        if not isinstance(data, dict):
            raise ValueError("the top level is not an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not usable JSON: {error}") from error
    return data


@contextmanager
def replacing(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; renamed to ``path`` on success, removed on failure.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is false.
        OSError: The folder does not exist or cannot be written to.
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
    partials: list[Path] = []
    try:
        for target in targets:
            handle, name = tempfile.mkstemp(
                prefix=f".{target.name}.", suffix=f".partial{target.suffix}", dir=target.parent
            )
            os.close(handle)
            partials.append(Path(name))
        yield list(partials)
        for partial in partials:
            _finish(partial)
        for path in outdated:
            path.unlink(missing_ok=True)
        for partial, target in zip(partials, targets, strict=True):
            partial.replace(target)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def _finish(partial: Path) -> None:
    """Ordinary permissions (mkstemp gives 0600), and the content on the disk before the name changes."""
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o666 & ~umask)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
