"""A directory of token shards: its manifest, and the data set that a run maps into memory.

``manifest.json`` says what the tokens are, how many images each shard has, and the SHA-256 of every file:
``clusters.npy`` (K, 3) float32, if the tokens are colours; ``heldout.npy`` (N,) bool; ``labels.npy`` (N,) int32, if
there are classes; ``shard-00000.npy`` and so on, (n, T) uint8 or uint16. ``skipped.jsonl`` lists what is not among
them, a name and a reason each. The small files are checked when the directory is opened; of the shards the tokens that
a batch takes, and beside the run, so that it need not wait, the SHA-256 of each.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import os
import threading
import zipfile
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt_fast import files
from igpt_fast.checks import whole_number
from igpt_fast.files import printable, shown
from igpt_fast.learning.data import ImageSet, check_classes
from igpt_fast.learning.tokenizers import Tokenizer, tokenizer_of

MANIFEST, CLUSTERS, HELDOUT, LABELS, SKIPPED = (
    "manifest.json",
    "clusters.npy",
    "heldout.npy",
    "labels.npy",
    "skipped.jsonl",
)
FORMAT, VERSION = "igpt_fast token shards", 1
_MAX_IMAGES, _MAX_SHARDS = 1 << 32, 1 << 20


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"shard-{number:05d}.npy"


def write_npy(path: Path, array: np.ndarray) -> str:
    """Writes the file, by ``write``, which says why it fails, as numpy's own does not; returns its SHA-256."""
    header = io.BytesIO()
    array = np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (header.getvalue(), array.reshape(-1).view(np.uint8).data):
            digest.update(part)
            file.write(part)
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """Of a file's content."""
    with files.open_input(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type] # a file, or bytes of a pipe


@dataclass(frozen=True)
class Shard:
    """A file of the manifest."""

    file: str
    images: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says.

    Args:
        tokenizer: See ``Tokenizer.entry``.
        shards: In order.
        sha256: Of the other files, by name.
        classes: Their names; empty: none.
        heldout: How many images are held out.
        skipped: How many were left out.
        source: Name and fingerprint of what the images came from, and how they were taken, for the reader.
    """

    tokenizer: dict[str, Any]
    shards: list[Shard]
    sha256: dict[str, str]
    classes: list[str]
    heldout: int
    skipped: int
    source: dict[str, Any]

    @property
    def images(self) -> int:
        """All of them."""
        return sum(shard.images for shard in self.shards)

    def text(self) -> str:
        """The file."""
        values = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": self.tokenizer,
            "images": self.images,
            "heldout": self.heldout,
            "skipped": self.skipped,
            "classes": self.classes,
            "source": self.source,
            "sha256": self.sha256,
            "shards": [vars(shard) for shard in self.shards],
        }
        return json.dumps(values, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a directory of shards.

    Raises:
        FileNotFoundError: It has none.
        ValueError: Not one, or of another version.
    """
    path = folder / MANIFEST
    values = files.read_json(path)
    try:
        if values.get("format") != FORMAT or values.get("version") != VERSION:
            found = f"{shown(values.get('format'))}, version {shown(values.get('version'))}"
            raise ValueError(f"is of the format {found}; want {FORMAT!r}, version {VERSION}")
        shards = values.get("shards")
        if not isinstance(shards, list) or not 0 < len(shards) <= _MAX_SHARDS:
            raise ValueError("names no shards")
        read = [_shard(number, shard) for number, shard in enumerate(shards)]
        for name, kind in {"tokenizer": dict, "sha256": dict, "classes": list, "source": dict}.items():
            if not isinstance(values.get(name), kind):
                raise ValueError(f"its {name} is {shown(values.get(name))}")
        heldout = whole_number("heldout", values.get("heldout"), 0, _MAX_IMAGES)
        skipped = whole_number("skipped", values.get("skipped"), 0, _MAX_IMAGES)
        parts = {name: values[name] for name in ("tokenizer", "sha256", "classes", "source")}
        return Manifest(shards=read, heldout=heldout, skipped=skipped, **parts)
    except ValueError as error:
        raise ValueError(f"{path}: not a usable manifest: {error}") from error


def _shard(number: int, values: Any) -> Shard:
    if not isinstance(values, dict) or values.get("file") != shard_name(number):  # so that no path leads elsewhere
        raise ValueError(f"its shard {number} is not {shard_name(number)}")
    if not isinstance(values.get("sha256"), str):
        raise ValueError(f"its shard {number} has no SHA-256")
    images = whole_number(f"its shard {number}'s images", values.get("images"), 0, _MAX_IMAGES)
    return Shard(values["file"], images, values["sha256"])


class ShardData(ImageSet):
    """The images of a directory of shards, mapped into memory: see ``objectives.protocol.Data``.

    Args:
        folder: As ``igpt tokenize`` writes it.
        classes: Take the labels as well.

    Raises:
        FileNotFoundError: No such directory, or a file of it is missing.
        ValueError: The manifest, or one of the small files, is damaged or of another data set; nothing to train on; no
            labels; a class without an image to train on. Later, from ``train_batch`` and ``heldout_batches``: a token
            out of range, or, as soon as it is known, a shard that is not the manifest's. The message names the file.
    """

    def __init__(self, folder: str | os.PathLike[str], *, classes: bool = False) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.skipped = self.manifest.skipped
        self.tokenizer = self._read_tokenizer()
        count = self.manifest.images
        self.heldout = torch.from_numpy(self._read_small(HELDOUT, np.dtype(bool), (count,)))
        if bool(self.heldout.all()):
            raise ValueError(f"{self.folder / HELDOUT}: leaves no image to train on")
        self.labels, self.class_names = None, []
        if classes:
            self._read_classes(count)
        self._shards = [self._map(shard) for shard in self.manifest.shards]
        self._starts = np.cumsum([0, *(shard.images for shard in self.manifest.shards)])

    def __reduce__(self) -> Any:
        """For another process, which maps them itself."""
        return _opened, (self.folder, self.labels is not None)

    def _read_tokenizer(self) -> Tokenizer:
        clusters = None
        if self.manifest.tokenizer.get("kind") == "colours":
            try:
                colours = whole_number("vocabulary", self.manifest.tokenizer.get("vocabulary"))
            except ValueError as error:
                raise ValueError(f"{self.folder / MANIFEST}: {error}") from error
            clusters = self._read_small(CLUSTERS, np.dtype(np.float32), (colours, 3))
        try:
            return tokenizer_of(self.manifest.tokenizer, clusters)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.folder / (MANIFEST if clusters is None else CLUSTERS)}: {error}") from error

    def _read_classes(self, count: int) -> None:
        if not self.manifest.classes:
            raise ValueError(f"{self.folder}: has no labels; tokenize it with --classes")
        labels = self._read_small(LABELS, np.dtype(np.int32), (count,))
        self.labels = torch.from_numpy(labels.astype(np.int64))
        try:
            self.class_names = check_classes(self.labels, self.manifest.classes, self.heldout)
        except ValueError as error:
            raise ValueError(f"{self.folder / LABELS}: {error}") from error

    def _read_small(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """A file that is held in memory, if it is what the manifest says."""
        path = self.folder / name
        with files.open_input(path) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type] # a file, or bytes of a pipe
            self._compare(name, found, self.manifest.sha256.get(name))
            file.seek(0)
            array = files.read_npy(file, math.prod(shape) * dtype.itemsize)
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{path}: holds {shown(array.shape)} {array.dtype}; want {shape} {dtype}")
        return array.copy()

    def _compare(self, name: str, found: str, wanted: Any) -> None:
        if found != wanted:
            what = "is another palette than the manifest's" if name == CLUSTERS else "is damaged or of another data set"
            said = f"its SHA-256 is {found[:12]}..., the manifest's {printable(wanted)[:12]}..."
            raise ValueError(f"{self.folder / name}: {what}: {said}")

    def _map(self, shard: Shard) -> np.ndarray:
        path, shape = self.folder / shard.file, (shard.images, self.tokenizer.length)
        files.open_input(path, 0).close()  # says what is wrong with a folder or a device
        try:
            array = np.lib.format.open_memmap(path, mode="r")
        except Exception as error:  # a header is parsed by ast, whose errors have no common class
            raise ValueError(f"{path}: is damaged: {files.first_line(error)}") from error
        if array.shape != shape or array.dtype != self.tokenizer.dtype:
            found = f"{shown(array.shape)} {array.dtype}"
            raise ValueError(f"{path}: holds {found}; the manifest says {shape} {self.tokenizer.dtype}")
        return array

    def verify(self) -> None:
        """Waits until every shard has been compared with the manifest.

        Raises:
            FileNotFoundError, ValueError: A shard is gone, or another one; the message names it.
        """
        self._hashing.result()

    @functools.cached_property
    def _hashing(self) -> Future[None]:
        """Compares the shards with the manifest in a thread, which the end of the process does not wait for."""
        future: Future[None] = Future()

        def compare() -> None:
            try:
                for shard in self.manifest.shards:
                    self._compare(shard.file, sha256_of(self.folder / shard.file), shard.sha256)
                future.set_result(None)
            except Exception as error:  # raised where the result is asked for
                future.set_exception(error)

        threading.Thread(target=compare, daemon=True).start()
        return future

    def at(self, places: Tensor) -> tuple[Tensor, Tensor | None]:
        at = places.numpy()
        numbers = np.searchsorted(self._starts, at, side="right") - 1
        if self._hashing.done():
            self.verify()
        rows = [self._shards[number][place - self._starts[number]] for number, place in zip(numbers, at, strict=True)]
        for number, row in zip(numbers, rows, strict=True):
            if row.max() >= self.vocabulary:
                wrong = f"token {row.max()} is not in 0..{self.vocabulary - 1}"
                raise ValueError(f"{self.folder / self.manifest.shards[number].file}: {wrong}")
        tokens = np.stack(rows).astype(np.int64) if rows else np.zeros((0, self.tokenizer.length), np.int64)
        return torch.from_numpy(tokens), None if self.labels is None else self.labels[places]

    def fingerprint(self) -> str:
        """SHA-256 of what the manifest says of the tokens, the held-out part, and the classes if they are used."""
        small = [self.manifest.sha256.get(name) for name in (HELDOUT, *((LABELS,) if self.n_classes else ()))]
        parts = [self.tokenizer.digest(), small, [shard.sha256 for shard in self.manifest.shards], self.class_names]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _opened(folder: Path, classes: bool) -> ShardData:
    return ShardData(folder, classes=classes)


def has_labels(path: Path) -> bool:
    """Whether shards, or a token file, have labels; true of anything else, of which its reader says more."""
    if path.is_dir():
        return not is_own(path / MANIFEST) or bool(read_manifest(path).classes)
    try:
        with zipfile.ZipFile(path) as archive:
            return "labels.npy" in archive.namelist()
    except Exception:  # what zipfile raises on a damaged file has no common class
        return True


def is_shards(folder: Path) -> bool:
    """Whether a directory was written by ``igpt tokenize``.

    Raises:
        ValueError: It was, and is not finished.
    """
    if is_own(folder / MANIFEST):
        return True
    if is_own(folder / PLAN):
        raise ValueError(f"{folder}: is not finished; go on with igpt tokenize --resume")
    return False


PLAN = "plan.json"  # of a directory in the making; see ``tokenize``


def is_own(path: Path) -> bool:
    """Whether this is a manifest or a plan of shards, perhaps a damaged one, and not something else of that name."""
    if not path.is_file():
        return False
    with files.open_input(path) as file:
        return json.dumps(FORMAT).encode() in file.read(200)


def own_files(folder: Path) -> list[Path]:
    """The files in a directory that ``igpt tokenize`` has written, as its manifest or its plan says, and none else."""
    names: set[str] = set()
    for name in (MANIFEST, PLAN):
        if is_own(folder / name):
            names.add(name)
            try:
                values = files.read_json(folder / name)
            except ValueError:  # damaged, and says nothing
                continue
            shards, small = values.get("shards"), values.get("sha256", values.get("files"))
            count = len(shards) if isinstance(shards, list) else shards if isinstance(shards, int) else 0
            numbered = [shard_name(number) for number in range(min(count, _MAX_SHARDS))]
            names.update(numbered, (note_name(name) for name in numbered if not isinstance(shards, list)))
            said = small if isinstance(small, dict | list) else ()
            names.update(name for name in (CLUSTERS, HELDOUT, LABELS) if name in said)
            names.add(SKIPPED)
    return [path for path in (folder / name for name in sorted(names)) if path.is_file()]


def note_name(shard: str) -> str:
    """The file that stands beside a shard until the manifest does."""
    return shard.removesuffix(".npy") + ".json"
