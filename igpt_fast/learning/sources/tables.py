"""Pictures in a column of parquet files, or of the Arrow files that ``datasets.save_to_disk`` writes.

A cell is the file's bytes, or Hugging Face's struct of bytes and path, of which the path is never opened. Names of
classes stand in the schema, where Hugging Face has put its features.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from igpt_fast import files
from igpt_fast.files import listed, printable, shown
from igpt_fast.learning.sources.protocol import (
    MAX_FILE,
    Classes,
    Content,
    check_labels,
    classes_of_values,
    digest_of,
    look_of,
)

if TYPE_CHECKING:
    import pyarrow

_IMAGES, _LABELS = ("image", "img", "jpg", "png", "webp"), ("label", "labels", "cls", "class", "fine_label")
_BATCH = 64  # rows that are decoded at once
_MAX_GROUP = 4 << 30  # bytes that the column of a row group may claim to unpack to
_MAX_FEATURES = 16 << 20  # bytes of Hugging Face's part of the schema


@dataclass(frozen=True)
class Table:
    """See ``Source``; the names are the numbers of the rows.

    Args:
        path: What was asked for.
        tables: The files.
        counts: Their rows.
        places: Which of all rows.
    """

    path: Path
    tables: list[Path]
    counts: list[int]
    places: np.ndarray
    block: ClassVar[int] = 64

    @classmethod
    def open(cls, path: Path, tables: list[Path]) -> Table:
        """All rows of the files, in the order given.

        Raises:
            ImportError: pyarrow is not installed.
            FileNotFoundError, ValueError: No such file, damaged, or without pictures.
        """
        _parquet.cache_clear()  # the files may be other ones now
        _schema.cache_clear()
        counts = [_rows(table) for table in tables]
        for table in tables:
            _image_column(table)
        return cls(path, tables, counts, np.arange(sum(counts)))

    @property
    def names(self) -> list[str]:
        return [str(place) for place in self.places]

    def __len__(self) -> int:
        return len(self.places)

    def part(self, places: np.ndarray) -> Table:
        return Table(self.path, self.tables, self.counts, self.places[places])

    def pictures(self) -> Iterator[tuple[str, Content]]:
        start = 0
        for table, count in zip(self.tables, self.counts, strict=True):
            wanted = self.places[np.searchsorted(self.places, start) : np.searchsorted(self.places, start + count)]
            if len(wanted):
                for place, cell in zip(wanted, _cells(table, _image_column(table), wanted - start), strict=True):
                    yield str(place), _content(cell)
            start += count

    def fingerprint(self) -> str:
        return digest_of([f"{table.name}\0{look_of(table)}" for table in self.tables])

    def classes(self) -> Classes:
        values: list[Any] = []
        meant: dict[Path, tuple[str, list[str]]] = {}
        for table, count in zip(self.tables, self.counts, strict=True):
            if count:
                cells, column, names = _labels(table, count)
                values += cells
                meant[table] = column, names
        first, *others = meant
        for table in others:
            if meant[table] != meant[first]:
                column, names = meant[table]
                told = f"column {printable(column)} with {listed(names) if names else 'no names'}"
                raise ValueError(f"{table}: has other classes than {first.name}: {told}")
        found = classes_of_values(self.path, values, [str(place) for place in range(len(values))])
        return check_labels(self.path, Classes(found.labels, meant[first][1] or found.names))


def _labels(table: Path, count: int) -> tuple[list[Any], str, list[str]]:
    """The cells of the column of labels, its name, and the names of the classes, if the cells are their numbers."""
    schema = _schema(table)
    features = _features(schema)
    own = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    column = next((name for name in (*own, *_LABELS) if name in schema.names), None)
    if column is None:
        raise ValueError(f"{table}: has no labels: its columns are {listed(schema.names)}")
    cells = list(_cells(table, column, np.arange(count)))
    given = features.get(column, {}).get("names")
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given) or isinstance(cells[0], str):
        given = []
    return cells, column, given


def _content(cell: Any) -> Content:
    if isinstance(cell, dict):
        cell = cell.get("bytes")
    if not isinstance(cell, bytes):
        return ValueError("has no bytes (a path to a file is not followed)" if cell is None else "holds no bytes")
    if len(cell) > MAX_FILE:
        return ValueError(f"has {len(cell)} bytes; at most {MAX_FILE} are read")
    return cell


def _image_column(table: Path) -> str:
    """Hugging Face's feature of that type; a column with a usual name; the only one of bytes."""
    schema = _schema(table)
    good = [field.name for field in schema if _holds_bytes(field.type)]
    own = [name for name, feature in _features(schema).items() if feature.get("_type") == "Image"]
    chosen = [name for name in (*own, *_IMAGES) if name in good] or good[:1]
    if not chosen:
        raise ValueError(f"{table}: no column holds pictures: {listed(schema.names)}")
    return chosen[0]


def _holds_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _features(schema: pyarrow.Schema) -> dict[str, dict[str, Any]]:
    """Hugging Face's, by column; none where the schema has none that can be read."""
    text = (schema.metadata or {}).get(b"huggingface", b"")
    try:
        features = json.loads(text)["info"]["features"] if 0 < len(text) <= _MAX_FEATURES else {}
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    pairs = features.items() if isinstance(features, dict) else ()
    return {name: feature for name, feature in pairs if isinstance(feature, dict)}


def _is_arrow(table: Path) -> bool:
    return table.suffix.lower() == ".arrow"


def _named(table: Path, error: BaseException) -> ValueError:
    return ValueError(f"{table}: not a usable {table.suffix[1:]} file: {files.first_line(error)}")


@functools.lru_cache(maxsize=4)
def _parquet(table: Path) -> Any:
    files.open_input(table).close()  # says what is wrong with a folder or a device
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('parquet and Arrow files need pyarrow: pip install "igpt_fast[train]"') from error
    try:
        return pyarrow.parquet.ParquetFile(table)
    except Exception as error:  # pyarrow's errors have no common class
        raise _named(table, error) from error


def _stream(table: Path) -> Any:
    files.open_input(table).close()
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError('parquet and Arrow files need pyarrow: pip install "igpt_fast[train]"') from error
    try:
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(table)))
    except Exception as error:
        raise _named(table, error) from error


@functools.lru_cache(maxsize=256)
def _schema(table: Path) -> pyarrow.Schema:
    return _stream(table).schema if _is_arrow(table) else _parquet(table).schema_arrow


def _rows(table: Path) -> int:
    if not _is_arrow(table):
        return int(_parquet(table).metadata.num_rows)
    try:
        return sum(batch.num_rows for batch in _stream(table))
    except Exception as error:
        raise _named(table, error) from error


def _cells(table: Path, column: str, places: np.ndarray) -> Iterator[Any]:
    """The cells of these rows of a file, in order, as Python has them."""
    done = 0
    try:
        for first, values in _batches(table, column, places):
            until = int(np.searchsorted(places, first + len(values)))
            for place in places[done:until]:
                yield values[int(place) - first].as_py()
            done = max(done, until)
        if done != len(places):
            raise ValueError(f"ends before row {shown(int(places[done]))}")
    except MemoryError:
        raise
    except Exception as error:
        raise _named(table, error) from error


def _batches(table: Path, column: str, places: np.ndarray) -> Iterator[tuple[int, pyarrow.Array]]:
    """Stretches of a column that hold the rows, each with the number of its first row."""
    first = 0
    if _is_arrow(table):
        for batch in _stream(table):
            if np.searchsorted(places, first) < np.searchsorted(places, first + batch.num_rows):
                values = batch.column(column)
                values.validate(full=True)  # its offsets come from the file
                yield first, values
            first += batch.num_rows
        return
    opened = _parquet(table)
    for number in range(opened.num_row_groups):
        group = opened.metadata.row_group(number)
        own = places[np.searchsorted(places, first) : np.searchsorted(places, first + group.num_rows)] - first
        if len(own):
            claimed = sum(
                part.total_uncompressed_size
                for part in map(group.column, range(group.num_columns))
                if part.path_in_schema.split(".")[0] == column
            )
            if claimed > _MAX_GROUP:
                raise ValueError(f"row group {number} claims {claimed} bytes; at most {_MAX_GROUP} are read")
            at = first
            for batch in opened.iter_batches(_BATCH, row_groups=[number], columns=[column], use_threads=False):
                yield at, batch.column(0)
                at += batch.num_rows
                if at > first + own[-1]:
                    break
        first += group.num_rows
