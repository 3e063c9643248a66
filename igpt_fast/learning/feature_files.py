"""Features of a data set in a file: made a part at a time, by several processes, gone on with after an interruption.

Beside the file stands, until it is there, a folder of parts: ``part-00000.npy`` and so on, (n, layers, F) float32 each,
with a manifest of what they were made of. A part is there whole or not at all. Rows of images that could not be read
are NaN in it, and are left out of the file.
"""

from __future__ import annotations

import functools
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from igpt_fast import files
from igpt_fast.learning.extraction import check_masks, extract
from igpt_fast.learning.feature_sources import Source

SUFFIXES = (".npz", ".parquet")
MANIFEST = "manifest.json"
_PART_BYTES, _PART_ROWS = 64 << 20, 512  # of a part, at most
_MAX_MANIFEST = 1 << 20

Done = Callable[[int], Any]


@dataclass(frozen=True)
class FeatureRun:
    """What is made of what.

    Args:
        model: The network.
        model_hash: Of its weights.
        source: The images.
        layers: The paper's numbers, ascending.
        sos, bands, pool, masks, batch_size, dtype: See ``extraction.feature_batches``.
        about: More that the file shall say of itself.
    """

    model: Any
    model_hash: str
    source: Source
    layers: Sequence[int]
    sos: bool = True
    bands: int = 1
    pool: str | None = "mean"
    masks: int | None = None
    batch_size: int = 64
    dtype: str | None = None
    about: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the features of an image: (layers, F)."""
        config = self.model.config
        each = self.bands if self.pool else config.n_positions
        return (len(self.layers), each * config.n_embd)

    @property
    def parts(self) -> list[range]:
        """Which images stand in which part."""
        rows = min(_PART_ROWS, max(1, _PART_BYTES // (4 * self.shape[0] * self.shape[1])))
        return [range(i, min(i + rows, len(self.source))) for i in range(0, len(self.source), rows)]

    def manifest(self) -> dict[str, Any]:
        """What the parts depend on."""
        sos = self.sos and not self.model.config.bidirectional
        settings = {"layers": list(self.layers), "sos": sos, "bands": self.bands, "pool": self.pool}
        settings |= {"masks": check_masks(self.masks, self.model.config), "dtype": self.dtype}
        settings |= {"images": len(self.source), "parts": len(self.parts)}
        return {"format": 1, "model": self.model_hash, "data": self.source.fingerprint(), "settings": settings}


def parts_folder(out: Path) -> Path:
    """Where the parts of a file stand."""
    return out.with_name(out.name + ".parts")


def begin(run: FeatureRun, out: Path, overwrite: bool = False) -> int:
    """Makes the folder of parts, or goes on with one; returns how many images are done.

    Args:
        run: What is to be made.
        out: The file that is to be.
        overwrite: Begin anew where there are parts of something else.

    Raises:
        OSError: The folder cannot be made.
        ValueError: It holds parts of another model or of other data or settings, or is something else; the message says
            which.
    """
    folder, manifest = parts_folder(out), run.manifest()
    if folder.exists():
        if not (folder / MANIFEST).is_file():
            raise ValueError(f"{folder}: is there, and holds no parts of features; move it away")
        old = files.read_json(folder / MANIFEST, _MAX_MANIFEST)
        if old == manifest:
            return sum(len(part) for i, part in enumerate(run.parts) if _is_done(folder, i, part, run))
        if not overwrite and any(folder.glob("part-*.npy")):
            what = f"it holds parts of {_difference(old, manifest)}"
            raise ValueError(f"{folder}: {what}; begin anew (--force), or name another file")
        _remove(folder)
    folder.mkdir(exist_ok=True)
    with files.replacing(folder / MANIFEST) as partial:
        partial.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return 0


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    words = [text for key, text in (("model", "another model"), ("data", "other data")) if old.get(key) != new[key]]
    before = old.get("settings")
    settings = before if isinstance(before, dict) else {}
    changed = [key for key, value in new["settings"].items() if settings.get(key) != value]
    if changed:
        words.append("other settings: " + ", ".join(f"{key} was {files.shown(settings.get(key))}" for key in changed))
    return "; ".join(words) or "another version"


def make(run: FeatureRun, out: Path, share: Sequence[int], done: Done) -> None:
    """Makes those parts of a share that are not there yet.

    Args:
        run, out: As of ``begin``, which comes first.
        share: Numbers of parts.
        done: Called with how many images of the share are done, now and then.

    Raises:
        FloatingPointError, OSError, ValueError: A feature is not finite, a picture cannot be read, or a part cannot be
            written.
    """
    folder, finished = parts_folder(out), 0
    for number in share:
        part = run.parts[number]
        if not _is_done(folder, number, part, run):
            readable, tokens = run.source.tokens(part)
            features = np.full((len(part), *run.shape), np.nan, dtype=np.float32)
            if len(tokens):
                told = functools.partial(_told, done, finished)
                found = extract(
                    run.model,
                    tokens,
                    run.layers,
                    sos=run.sos,
                    bands=run.bands,
                    pool=run.pool,
                    masks=run.masks,
                    batch_size=run.batch_size,
                    dtype=run.dtype,
                    progress=told,
                )
                features[readable] = found.reshape(len(found), *run.shape)
            with files.replacing(_path(folder, number)) as partial, partial.open("wb") as file:
                np.save(file, features, allow_pickle=False)
        finished += len(part)
        done(finished)


def _told(done: Done, before: int, images: int, of: int) -> None:
    done(before + images)


def _path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.npy"


def _is_done(folder: Path, number: int, part: range, run: FeatureRun) -> bool:
    """Whether a part is there; one that is damaged is made again."""
    path = _path(folder, number)
    try:
        return path.is_file() and _open(path).shape == (len(part), *run.shape)
    except ValueError:
        return False


def _open(path: Path) -> np.ndarray:
    """Mapped, not read."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a part of features: {files.first_line(error)}") from error
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim != 3:
        raise ValueError(f"{path}: not a part of features")
    return array


def finish(run: FeatureRun, out: Path, overwrite: bool = False) -> int:
    """Joins the parts to the file and removes them; returns how many images it has.

    Raises:
        FileExistsError: The file exists and ``overwrite`` is false.
        ImportError: A .parquet, and pyarrow is not installed.
        OSError: It cannot be written.
        ValueError: A part is missing, as where processes do not share the folder, or no image could be read.
    """
    folder = parts_folder(out)
    for number, part in enumerate(run.parts):
        if not _is_done(folder, number, part, run):
            raise ValueError(f"{_path(folder, number)}: is missing; all processes need to see the same folder")
    kept = np.concatenate([~np.isnan(_part(folder, i)[:, 0, 0]) for i in range(len(run.parts))])
    if not kept.any():
        raise ValueError(f"{out}: none of the {len(kept)} images can be read")
    write = _write_npz if out.suffix.lower() == ".npz" else _write_parquet
    with files.replacing(out, overwrite=overwrite) as partial:
        write(partial, run, folder, kept)
    _remove(folder)
    return int(kept.sum())


def _part(folder: Path, number: int) -> np.ndarray:
    return _open(_path(folder, number))


def _columns(run: FeatureRun, kept: np.ndarray) -> dict[str, np.ndarray]:
    """What stands beside the features."""
    found: dict[str, np.ndarray] = {}
    if run.source.names:
        found["names"] = np.array(run.source.names, dtype=np.str_)[kept]
    if run.source.labels is not None:
        found["labels"] = run.source.labels.numpy()[kept]
    held = getattr(getattr(run.source, "data", None), "heldout", None)
    if held is not None:
        found["heldout"] = held.numpy()[kept]
    return found


def _about(run: FeatureRun) -> str:
    return json.dumps({**run.manifest(), "about": run.about})


def _write_npz(path: Path, run: FeatureRun, folder: Path, kept: np.ndarray) -> None:
    """``layer_4`` (N, F) float32 for each layer, ``names``, ``labels``, ``class_names``, ``heldout``, ``about``."""
    shape = (int(kept.sum()), run.shape[1])
    arrays = {**_columns(run, kept), "about": np.array(_about(run))}
    if run.source.labels is not None:
        arrays["class_names"] = np.array(list(run.source.class_names), dtype=np.str_)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for i, layer in enumerate(run.layers):
            with archive.open(f"layer_{layer}.npy", "w", force_zip64=True) as member:
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for rows, selected in _kept(run, folder, kept):
                    member.write(np.ascontiguousarray(rows[selected, i], dtype="<f4").tobytes())
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _kept(run: FeatureRun, folder: Path, kept: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for number, part in enumerate(run.parts):
        yield _part(folder, number), kept[part.start : part.stop]


def need_pyarrow() -> None:
    """Raises ImportError, which names the extra, where pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ImportError('a .parquet file needs pyarrow: pip install "igpt_fast[train]"') from error


def _write_parquet(path: Path, run: FeatureRun, folder: Path, kept: np.ndarray) -> None:
    """A row an image: ``name``, ``label`` (its class's name), ``heldout``, and ``layer_4``, lists of F float32."""
    need_pyarrow()
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = _columns(run, np.ones_like(kept))
    kinds = {"names": ("name", pa.string()), "labels": ("label", pa.string()), "heldout": ("heldout", pa.bool_())}
    vector = pa.list_(pa.float32(), run.shape[1])
    fields = [kinds[name] for name in columns] + [(f"layer_{layer}", vector) for layer in run.layers]
    schema = pa.schema(fields, metadata={"igpt_fast": _about(run)})
    if "labels" in columns:
        columns["labels"] = np.array(list(run.source.class_names))[columns["labels"]]
    if "names" in columns:
        columns["names"] = np.array([_utf8(name) for name in columns["names"].tolist()])
    with pq.ParquetWriter(path, schema) as writer:
        for number, part in enumerate(run.parts):
            selected = kept[part.start : part.stop]
            if not selected.any():
                continue
            rows = _part(folder, number)
            found = [pa.array(values[part.start : part.stop][selected].tolist()) for values in columns.values()]
            for i in range(len(run.layers)):
                flat = pa.array(np.ascontiguousarray(rows[selected, i]).reshape(-1))
                found.append(pa.FixedSizeListArray.from_arrays(flat, run.shape[1]))
            writer.write_table(pa.table(found, schema=schema))


def _utf8(name: str) -> str:
    """The name of a file as text, a byte that is none as ``\\xff``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def abandon(out: Path) -> None:
    """After a failure: no part, no folder."""
    folder = parts_folder(out)
    if not any(folder.glob("part-*.npy")):
        _remove(folder)


def _remove(folder: Path) -> None:
    """The parts and the manifest, and the folder, where nobody has put something else into it."""
    for pattern in ("part-*.npy", ".part-*.partial.npy", MANIFEST, f".{MANIFEST}.*.partial.json"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    if folder.is_dir() and not os.listdir(folder):
        folder.rmdir()
