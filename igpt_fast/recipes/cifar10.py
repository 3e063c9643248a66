"""The paper's linear probe on CIFAR-10, for a checkpoint. Written to its protocol; not run: see docs/recipes.md.

    python -m igpt_fast.recipes.cifar10 cifar-10-binary.tar.gz --model openai/imagegpt-large --out runs/cifar10

The pictures are the archive of https://www.cs.toronto.edu/~kriz/cifar.html in its binary version (the Python version
is pickles, which nothing here reads), or a directory with ``train/CLASS/`` and ``test/CLASS/`` of images. They are
32x32 as iGPT's own, so nothing is resized. Features are the mean over positions of layer l behind the norm that comes
next, SOS fed; a logistic regression by L-BFGS reads the classes.

Source: "Generative Pretraining from Pixels" (Chen et al., 2020), sections 2.3 and 4.2.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from igpt_fast import files
from igpt_fast.image.reading import read_square
from igpt_fast.recipes.protocol import Pictures, command, load, measure, parser, read_split

SIDE = 32
RECORD = 1 + 3 * SIDE * SIDE  # a label, then the red, green and blue planes
TRAIN, TEST = [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]
MAX_CONTENT = 200 << 20  # bytes that the archive may unpack to; it is 176 MiB
N_CLASSES = 10
EXPECTED = (
    "iGPT-L, the best of its 48 layers, 50,000 labels: 96.3 % (paper)",
    "iGPT-S, last layer's raw hidden states, no SOS, not standardised: 78.6 % (a notebook for transformers)",
)


def read_archive(path: Path) -> tuple[Pictures, Pictures]:
    """Train and test of the binary version.

    Raises:
        OSError: It cannot be read.
        ValueError: Not such an archive, damaged, or more than ``MAX_CONTENT``; the message names it.
    """
    try:
        with files.open_input(path) as file, gzip.open(file) as unpacked:
            content = unpacked.read(MAX_CONTENT + 1)
        if len(content) > MAX_CONTENT:
            raise ValueError(f"unpacks to more than {MAX_CONTENT} bytes")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            members = {Path(member.name).name: member for member in archive}
            return _records(archive, members, TRAIN), _records(archive, members, TEST)
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError, ValueError) as error:
        raise ValueError(f"{path}: not CIFAR-10's binary version: {files.first_line(error)}") from error


def _records(archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo], names: Sequence[str]) -> Pictures:
    parts = []
    for name in names:
        if (member := members.get(name)) is None:
            raise ValueError(f"has no {name}")
        # A sparse one is as large as it claims, however little is here; another is no larger than this is.
        file = archive.extractfile(member) if member.isreg() and not member.issparse() else None
        if file is None:
            raise ValueError(f"{name} is no plain file")
        content = file.read()
        if not content or len(content) % RECORD:
            raise ValueError(f"{name} has {len(content)} bytes; want records of {RECORD}")
        parts.append(np.frombuffer(content, np.uint8).reshape(-1, RECORD))
    records = np.concatenate(parts)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= N_CLASSES:
        raise ValueError(f"label {labels.max()} is not in 0..{N_CLASSES - 1}")
    planes = records[:, 1:].reshape(-1, 3, SIDE, SIDE)
    return Pictures(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line of the script."""
    args = parser(__doc__, "all").parse_args(arguments)
    pipeline = load(args, SIDE)
    if args.data.is_dir():
        train, test = read_split(args.data, ("train", "test"), SIDE, (_square, _square))
    else:
        train, test = read_archive(args.data)
    return measure(pipeline, train, test, args, EXPECTED)


def _square(path: Path, number: int) -> np.ndarray:
    return read_square(path, SIDE)


if __name__ == "__main__":
    command(main)
