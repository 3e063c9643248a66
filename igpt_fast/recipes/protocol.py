"""What the paper's protocols on labelled pictures share: a checkpoint, its tokens of them, the probe, a report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt_fast import files
from igpt_fast.checks import whole_number
from igpt_fast.image import quantize
from igpt_fast.image.folders import find_images
from igpt_fast.learning.classifiers import need_sklearn
from igpt_fast.learning.extraction import check_layers
from igpt_fast.learning.probe import probe
from igpt_fast.learning.probe_result import need_matplotlib
from igpt_fast.pipeline import Pipeline

_CHUNK = 1024  # images whose colours become tokens at once


@dataclass(frozen=True)
class Pictures:
    """Pictures (N, H, W, 3) uint8 and their labels (N,) int64."""

    pixels: np.ndarray
    labels: np.ndarray


def read_classes(
    folder: Path, side: int, read: Callable[[Path, int], np.ndarray], per_class: int | None = None
) -> tuple[Pictures, list[str]]:
    """The pictures below a folder whose sub-directories are the classes, in the order of their names, and these.

    Args:
        folder: With ``CLASS/`` and images in it, at any depth.
        side: Height and width that ``read`` makes.
        read: From a file and its number to (side, side, 3) uint8.
        per_class: So many of each class, the first by name; all if not given.

    Raises:
        OSError: A picture, or the folder, cannot be read.
        ValueError: No pictures, one outside of a class, or a damaged one; the message names it.
    """
    paths = find_images(folder)
    names = [path.relative_to(folder).parts[0] for path in paths]
    if loose := [path for path in paths if path.parent == folder]:
        raise ValueError(f"{loose[0]}: lies in no class; those are the sub-directories of {folder}")
    if not paths:
        raise ValueError(f"{folder}: no images in it")
    classes = sorted(set(names))
    seen = dict.fromkeys(classes, 0)
    chosen: list[tuple[Path, int]] = []
    for path, name in zip(paths, names, strict=True):
        if per_class is None or seen[name] < per_class:
            chosen.append((path, classes.index(name)))
        seen[name] += 1
    pixels = np.empty((len(chosen), side, side, 3), np.uint8)
    with ThreadPoolExecutor() as pool:  # Pillow decodes without Python's lock
        for i, picture in enumerate(pool.map(read, [path for path, _ in chosen], range(len(chosen)))):
            pixels[i] = picture
    return Pictures(pixels, np.array([label for _, label in chosen], np.int64)), classes


def read_split(
    folder: Path, parts: tuple[str, str], side: int, reads: tuple[Any, Any], per_class: int | None = None
) -> tuple[Pictures, Pictures]:
    """Train and test, below ``folder`` by the names ``parts``; ``per_class`` bounds train. See ``read_classes``.

    Raises:
        OSError, ValueError: As ``read_classes``; or classes that the two do not share.
    """
    train, names = read_classes(folder / parts[0], side, reads[0], per_class)
    test, test_names = read_classes(folder / parts[1], side, reads[1])
    if differing := set(names) ^ set(test_names):
        which = files.listed(sorted(differing))
        raise ValueError(f"{folder}: {parts[0]} and {parts[1]} do not share the classes {which}")
    return train, test


def parser(description: str | None, layers: str) -> argparse.ArgumentParser:
    """What the commands of all protocols take."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("data", type=Path, help="where the pictures are")
    found.add_argument("--model", required=True, help="a checkpoint: a folder, or a name on the hub")
    found.add_argument("--layers", default=layers, help="the paper's numbers, with commas between, or 'all'")
    found.add_argument("--concat", type=int, default=0, help="so many layers that follow each other as one feature")
    found.add_argument("--device", help="cuda where torch has it, else cpu, if not given")
    found.add_argument("--batch-size", type=int, default=64)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--out", type=Path, required=True, help="folder for results.json, results.md and layers.png")
    return found


def load(args: argparse.Namespace, side: int) -> Pipeline:
    """The checkpoint, on its device; before the pictures are read, which takes longer, all that can be wrong is asked.

    Raises:
        FileNotFoundError, ValueError: No such checkpoint, one of another size or without these layers; a number out of
            its range.
        ImportError: What the report needs is not installed.
    """
    need_sklearn("the probe")
    need_matplotlib()
    whole_number("--batch-size", args.batch_size, 1, 1 << 16)
    whole_number("--seed", args.seed, 0, (1 << 32) - 1)
    files.check_writable(args.out)
    pipeline = Pipeline.from_pretrained(args.model, device=args.device)
    if pipeline.model.config.n_positions != side * side:
        positions = pipeline.model.config.n_positions
        raise ValueError(f"{args.model}: has {positions} positions; images of {side}x{side} have {side * side}")
    layers = check_layers(args.layers, pipeline.model.config.n_layer)
    if whole_number("--concat", args.concat, 0, len(layers)) == 1:
        raise ValueError("--concat is 1; want 2 layers or more, or 0 for none")
    return pipeline


def tokens_of(pixels: np.ndarray, clusters: np.ndarray) -> torch.Tensor:
    """(N, H W) int16 tokens of pixels (N, H, W, 3)."""
    parts = [quantize(pixels[at : at + _CHUNK], clusters).astype(np.int16) for at in range(0, len(pixels), _CHUNK)]
    return torch.from_numpy(np.concatenate(parts).reshape(len(pixels), -1))


def measure(
    pipeline: Pipeline, train: Pictures, test: Pictures, args: argparse.Namespace, expected: Sequence[str]
) -> dict[str, Any]:
    """Probes the checkpoint, writes the report, and returns what ``results.json`` holds.

    Args:
        expected: What the paper says, to be read beside the table.

    Raises:
        OSError: A result cannot be written.
        ValueError: Pictures and labels that ``probe`` refuses.
    """
    clusters = pipeline.processor.clusters
    if clusters is None:
        raise ValueError(f"{args.model}: its preprocessor_config.json has no clusters")
    known, asked = ((tokens_of(part.pixels, clusters), torch.from_numpy(part.labels)) for part in (train, test))
    how: dict[str, Any] = {"concat": args.concat, "batch_size": args.batch_size, "seed": args.seed, "shots": []}
    result = probe(known, asked, pipeline.model, clusters, layers=args.layers, progress=say, **how)
    args.out.mkdir(parents=True, exist_ok=True)
    found = {"checkpoint": str(args.model), "expected": list(expected), **result.to_dict()}
    text = "\n".join(["```", result.table(), "```", "", *(f"- expected: {line}" for line in expected), ""])
    for name, content in (("results.json", json.dumps(found, indent=2) + "\n"), ("results.md", text)):
        with files.replacing(args.out / name) as partial:
            partial.write_text(content, encoding="utf-8")
    result.plot(args.out / "layers.png")
    print(text)
    return found


def say(what: str, done: int, total: int) -> None:
    """A line of progress on stderr, where a part is whole."""
    if done == total:
        print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)


def command(main: Callable[[], Any]) -> None:
    """Runs a script; what is wrong with its input, or too large for it, is a line on stderr and exit code 1."""
    try:
        main()
    except (OSError, ValueError, ImportError, FloatingPointError, RuntimeError, MemoryError) as error:
        print(f"error: {files.first_line(error)}", file=sys.stderr)
        raise SystemExit(1) from error
