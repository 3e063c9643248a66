"""Which kind of source a path is."""

from __future__ import annotations

from pathlib import Path

from igpt_fast.files import listed
from igpt_fast.learning.sources.archives import Archive
from igpt_fast.learning.sources.arrays import Arrays
from igpt_fast.learning.sources.folder import Folder
from igpt_fast.learning.sources.protocol import Source
from igpt_fast.learning.sources.tables import Table

_ARCHIVES, _ARRAYS, _TABLES = (".zip", ".tar"), (".npy", ".npz"), (".parquet", ".arrow")
KINDS = "a directory of images, .zip, .tar, .parquet, a directory of these or of datasets.save_to_disk, .npy or .npz"


def open_source(path: Path, tokens: bool = False) -> Source:
    """The pictures at a path, in their order.

    Args:
        path: A file, by its suffix; or a directory: of archives, of tables, or of pictures.
        tokens: It holds tokens, in a .npy or .npz.

    Raises:
        FileNotFoundError, ValueError: No such path, no such kind, damaged, or without a picture.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")
    suffix = path.suffix.lower()
    if path.is_dir():
        if tokens:
            raise ValueError(f"{path}: is a directory; tokens are read from a .npy or .npz file")
        source: Source = _directory(path)
    elif suffix in _ARRAYS:
        source = Arrays.open(path, tokens)
    elif tokens or suffix not in _ARCHIVES + _TABLES:
        raise ValueError(f"{path}: want {'a .npy or .npz file of tokens' if tokens else KINDS}")
    else:
        source = Archive.open(path, [path]) if suffix in _ARCHIVES else Table.open(path, [path])
    if not len(source):
        raise ValueError(f"{path}: no images in it")
    return source


def _directory(path: Path) -> Source:
    """Of Hugging Face's, the parquet files may lie deeper, as in ``data/train-00000-of-00002.parquet``."""
    if (path / "dataset_dict.json").is_file():
        splits = [part.name for part in path.iterdir() if part.is_dir()]
        raise ValueError(f"{path}: has several splits; give one of them: {listed(splits)}")
    here = sorted(part for part in path.iterdir() if part.is_file() and not part.name.startswith("."))
    for suffix in _ARCHIVES + _TABLES:
        found = [part for part in here if part.suffix.lower() == suffix]
        if (path / "state.json").is_file():  # of save_to_disk, beside which map() keeps its caches
            found = [part for part in found if part.name.startswith("data-")]
        if suffix == ".parquet" and not found:
            found = sorted(part for part in path.glob("data/*.parquet") if part.is_file())
        if found:
            _one_split(path, found)
            return Archive.open(path, found) if suffix in _ARCHIVES else Table.open(path, found)
    return Folder.open(path)


def _one_split(path: Path, found: list[Path]) -> None:
    """Hub repositories have train-00000-of-00002 beside test-00000-of-00001: these are not one data set."""
    splits = {part.name.partition("-")[0] for part in found if "-of-" in part.name}
    if len(splits) > 1:
        raise ValueError(f"{path}: holds several splits, {listed(splits)}; put the files of one into a directory")
