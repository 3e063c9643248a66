"""Files from outside and to the outside: found in a folder or on the hub, read with bounds, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
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
        ValueError: ``name_or_path`` is neither a folder nor a valid hub name.
    """
    root = Path(name_or_path)
    if root.is_dir():
        path = root / subfolder / filename
        if path.is_file():
            return path
        if required:
            raise FileNotFoundError(f"{root / subfolder}: has no {filename}")
        return None
    if root.exists():
        raise ValueError(f"{root}: is a file; give its folder")
    return _find_on_hub(
        str(name_or_path),
        filename,
        required,
        {
            "revision": revision,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "token": token,
            "subfolder": subfolder or None,
        },
    )


def _find_on_hub(name: str, filename: str, required: bool, options: dict[str, Any]) -> Path | None:
    import huggingface_hub
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: no such folder")
    try:
        return Path(huggingface_hub.hf_hub_download(name, filename, **options))
    except HFValidationError as error:
        raise ValueError(f"{name}: neither a folder nor a hub name: {error}") from error
    except LocalEntryNotFoundError as error:
        if not required and _other_files_cached(name, options):
            return None
        raise FileNotFoundError(
            f"{name}: no such folder; and {filename} of a hub repository of that name is neither in the cache nor"
            f" reachable ({type(error.__cause__ or error).__name__})"
        ) from error
    except EntryNotFoundError as error:
        if not required:
            return None
        raise FileNotFoundError(f"{name}: the hub repository has no {filename}") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"{name}: no such folder, and not found on the hub: {reason}") from error


def _other_files_cached(name: str, options: dict[str, Any]) -> bool:
    """Whether the cache holds the repository's config.json, so that a file missing beside it was never there."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(
        name,
        f"{options['subfolder']}/config.json" if options["subfolder"] else "config.json",
        cache_dir=options["cache_dir"],
        revision=options["revision"],
    )
    return isinstance(found, str)


def read_json(path: str | os.PathLike[str], max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: Too large, not UTF-8, not JSON, or not an object; the message names the file.
    """
    path = Path(path)
    try:
        if path.stat().st_size > max_bytes:
            raise ValueError(f"larger than {max_bytes >> 20} MiB")
        data = json.loads(path.read_text(encoding="utf-8"))
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
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: exists already")
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=f".partial{path.suffix}", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
