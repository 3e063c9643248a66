"""Pictures in zip and tar files, as WebDataset has them: ``key.jpg`` beside ``key.cls`` or ``key.json``, or in folders.

Members are read in place, never extracted, each no further than a bound; links, devices and the names' directions mean
nothing here.
"""

from __future__ import annotations

import functools
import json
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from igpt_fast import files
from igpt_fast.files import printable
from igpt_fast.image.folders import IMAGE_SUFFIXES
from igpt_fast.learning.sources.protocol import (
    MAX_FILE,
    Classes,
    Content,
    check_labels,
    classes_of_names,
    classes_of_values,
    digest_of,
    look_of,
)

_MAX_LABEL = 1 << 16  # bytes of a .cls or .json
_MAX_NAME = 4096
_LABEL_KEYS = ("label", "cls", "class")


@dataclass(frozen=True)
class Member:
    """A file in an archive: where its bytes begin, and how many they are; of a zip, the number among its files."""

    name: str
    place: int
    size: int


@dataclass(frozen=True)
class Archive:
    """See ``Source``.

    Args:
        path: A zip or tar file, or a directory of some.
        members: The pictures, with the file that each lies in.
        notes: What may be a label: the .cls, else the .json, beside a picture, by its key.
    """

    path: Path
    members: list[tuple[Path, Member]]
    notes: dict[tuple[Path, str], Member]
    block: ClassVar[int] = 1

    @classmethod
    def open(cls, path: Path, archives: list[Path]) -> Archive:
        """All pictures of the archives.

        Raises:
            FileNotFoundError, ValueError: No such file, damaged, or a tar that is compressed.
        """
        _zip.cache_clear()  # the files may be other ones now
        _tar.cache_clear()
        pictures, notes = [], {}
        for archive in archives:
            for member in _members(archive):
                suffix = Path(member.name).suffix.lower()
                if suffix in IMAGE_SUFFIXES:
                    pictures.append((archive, member))
                elif suffix == ".cls":
                    notes[archive, _key(member.name)] = member
                elif suffix == ".json":  # which may hold anything else
                    notes.setdefault((archive, _key(member.name)), member)
        keys = {(archive, _key(member.name)) for archive, member in pictures}
        return cls(path, pictures, {key: note for key, note in notes.items() if key in keys})

    @property
    def names(self) -> list[str]:
        return [member.name for _, member in self.members]

    def __len__(self) -> int:
        return len(self.members)

    def part(self, places: np.ndarray) -> Archive:
        return Archive(self.path, [self.members[place] for place in places], {})

    def pictures(self) -> Iterator[tuple[str, Content]]:
        for archive, member in self.members:
            try:
                yield member.name, _read(archive, member, MAX_FILE)
            except ValueError as error:
                yield member.name, error

    def fingerprint(self) -> str:
        parts = {archive for archive, _ in self.members}
        return digest_of([f"{path.name}\0{look_of(path)}" for path in sorted(parts)])

    def classes(self) -> Classes:
        names = self.names
        if not self.notes:
            while names and len({name.split("/")[0] for name in names}) == 1 and all(n.count("/") > 1 for n in names):
                names = [name.partition("/")[2] for name in names]  # all lie in one folder
            return check_labels(self.path, classes_of_names(self.path, names))
        values = []
        for archive, member in self.members:
            note = self.notes.get((archive, _key(member.name)))
            if note is None:
                raise ValueError(f"{archive}: {printable(member.name)} has no .cls or .json beside it")
            values.append(_label(archive, note))
        return check_labels(self.path, classes_of_values(self.path, values, names))


def _key(name: str) -> str:
    """WebDataset's: up to the first full stop of the last part."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _label(archive: Path, note: Member) -> Any:
    where = f"{archive}: {printable(note.name)}"
    try:
        text = _read(archive, note, _MAX_LABEL).decode("utf-8").strip()
        if note.name.lower().endswith(".cls"):
            return int(text) if text.isdecimal() else text
        values = json.loads(text)
        found = [values[key] for key in _LABEL_KEYS if key in values] if isinstance(values, dict) else []
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not a usable label: {files.first_line(error)}") from error
    if not found:
        raise ValueError(f"{where}: has none of {', '.join(_LABEL_KEYS)}")
    return found[0]


def _members(path: Path) -> Iterator[Member]:
    """All plain files of an archive; hidden ones are left out."""
    with files.open_input(path) as file:
        try:
            for member in _scan_zip(file) if _is_zip(path) else _scan_tar(file):
                parts = member.name.split("/")
                if (
                    not any(part.startswith(".") and part not in (".", "..") for part in parts)
                    and "__MACOSX" not in parts
                ):
                    yield member
        except (OSError, MemoryError):
            raise
        except Exception as error:  # what both modules raise on a damaged file has no common class
            raise ValueError(f"{path}: not a usable zip or tar file: {files.first_line(error)}") from error


def _is_zip(path: Path) -> bool:
    return path.suffix.lower() == ".zip"


def _scan_zip(file: IO[bytes]) -> Iterator[Member]:
    with zipfile.ZipFile(file) as archive:
        for place, info in enumerate(archive.infolist()):
            if not info.is_dir():
                yield Member(info.filename[:_MAX_NAME], place, info.file_size)


def _scan_tar(file: IO[bytes]) -> Iterator[Member]:
    start = file.read(6)
    file.seek(0)
    if start[:2] == b"\x1f\x8b" or start[:3] == b"BZh" or start == b"\xfd7zXZ\0" or start[:4] == b"\x28\xb5\x2f\xfd":
        raise ValueError("is compressed, so that nothing in it can be had by itself: unpack it to a plain .tar")
    with tarfile.open(fileobj=file, mode="r:") as archive:
        before = -1
        while (info := archive.next()) is not None:
            if info.size < 0 or info.offset <= before:
                raise ValueError("its headers lead back, which would have no end")
            before = info.offset
            archive.members.clear()  # type: ignore[attr-defined] # or all would be kept
            if info.isreg() and not info.issparse():
                yield Member(info.name[:_MAX_NAME], info.offset_data, info.size)


@functools.lru_cache(maxsize=4)
def _zip(path: Path) -> tuple[zipfile.ZipFile, list[zipfile.ZipInfo]]:
    archive = zipfile.ZipFile(files.open_input(path))
    return archive, archive.infolist()


@functools.lru_cache(maxsize=4)
def _tar(path: Path) -> IO[bytes]:
    return files.open_input(path)


def _read(path: Path, member: Member, most: int) -> bytes:
    """The content of a member.

    Raises:
        ValueError: Too large, damaged, encrypted, or cut off; of this member alone.
    """
    if member.size > most:
        raise ValueError(f"claims {member.size} bytes; at most {most} are read")
    if not _is_zip(path):
        file = _tar(path)
        file.seek(member.place)
        content = file.read(member.size)
        if len(content) != member.size:
            raise ValueError(f"is truncated: {len(content)} bytes of {member.size}")
        return content
    archive, infos = _zip(path)
    try:
        with archive.open(infos[member.place]) as opened:
            return opened.read(most + 1)  # which zipfile ends at the size that was claimed
    except Exception as error:  # see above; RuntimeError where it is encrypted
        raise ValueError(f"cannot be unpacked: {files.first_line(error)}") from error
