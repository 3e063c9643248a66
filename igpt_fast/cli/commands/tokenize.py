"""``igpt tokenize``: pictures of any source to shards that a run maps into memory."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from igpt_fast import processes
from igpt_fast.cli import checks, terminal

_MOST = 32  # processes, unless more are asked for: each holds a shard, and reads from the same disk


def tokenize(
    source: Positional[Path],
    out: Path = Path("shards"),
    size: str | None = None,
    clusters: Path | None = None,
    model: str | None = None,
    n_clusters: Annotated[int | None, arg(aliases=["-k"])] = None,
    vocabulary: int | None = None,
    classes: bool = False,
    holdout: float = 0.1,
    workers: int | None = None,
    shard_size: int | None = None,
    seed: int = 0,
    resume: bool = False,
    json: bool = False,
    force: bool = False,
) -> None:
    """Turn a data set of any size into token shards, which igpt train reads as it goes.

    Example: igpt tokenize pictures.tar --size 32 -k 512 --out shards

    Args:
        source: A directory of images, .zip, .tar (as WebDataset's), .parquet, a directory of these or of
            datasets.save_to_disk, .npy or .npz.
        out: Directory for the shards, manifest.json, and skipped.jsonl, which lists what could not be read.
        size: HEIGHTxWIDTH, or the edge of a square, in pixels; an array's own, the model's, else 32 if not given.
        clusters: Colours to use: a .npy file of (K, 3) floats in [-1, 1], or a preprocessor_config.json.
        model: Directory or hub id whose colours and size to use.
        n_clusters: How many colours are fitted, to a sample, where none are given; 512 if not given.
        vocabulary: The source is a .npy or .npz of tokens, such as a VQ-VAE's codes, that are below this.
        classes: Keep the classes: sub-directories, .cls or .json files of an archive, or a column of labels.
        holdout: Fraction of the images that is held out for evaluation.
        workers: Processes that decode; one for each processor, at most 32, if not given; 0: none but this one.
        shard_size: Images of a shard; 8192, or as many as have 64 MiB, if not given.
        seed: Of the fit.
        resume: Go on with what was interrupted; source and settings must be the same.
        json: Print one JSON object.
        force: Start afresh in a directory that holds shards.
    """
    if (count := processes.size()) > 1:
        raise checks.UsageError(f"{count} processes would write the same files; start one, which has --workers")
    if resume and force:
        raise checks.UsageError("--resume goes on with what is there, --force starts afresh; give one of them")
    given = {"clusters": clusters, "model": model, "n-clusters": n_clusters, "vocabulary": vocabulary}
    if len(two := [f"--{name}" for name, value in given.items() if value is not None]) > 1:
        raise checks.UsageError(f"{' and '.join(two)} exclude each other; give one of them")
    checks.check_clusters(n_clusters)
    checks.check_range("--vocabulary", vocabulary, 2, 1 << 16)
    checks.check_range("--workers", workers, 0, 1024)
    checks.check_range("--shard-size", shard_size, 1, 1 << 24)
    checks.check_range("--seed", seed, 0, (1 << 32) - 1)
    if not 0.0 <= holdout < 1.0:
        raise checks.UsageError(f"--holdout is {holdout}; want a fraction in [0, 1)")
    edges = _size(size)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or directory")
    from igpt_fast.learning.taking import Taking
    from igpt_fast.learning.tokenize import tokenize as make

    palette = None
    if clusters is not None or model is not None:
        palette, side = checks.read_palette(clusters, model)
        edges = edges or ((side, side) if model is not None else None)
    height, width = edges or (None, None)
    taking = Taking(height, width, palette, n_clusters or 512, vocabulary, classes, holdout, shard_size, seed)
    decoding = _processors() if workers is None else workers
    values = make(source, out, taking, workers=decoding, resume=resume, overwrite=force, progress=_progress)
    size_ = f"{values['height']}x{values['width']}"
    text = f"{out}: {values['images']} images of {size_} tokens in {values['shards']} shards"
    text += f", {values['heldout_images']} held out, {values['skipped']} skipped"
    terminal.report(json, values, f"{text}, {values['vocabulary']} {'codes' if vocabulary else 'colours'}")


def _processors() -> int:
    """That this process may use, where the system says so; all of them elsewhere."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, _MOST)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if match is None:
        wanted = "HEIGHTxWIDTH, such as 32x32, or the edge of a square, of 1..4096 pixels"
        raise checks.UsageError(f"--size is {text!r}; want {wanted}")
    height, width = int(match[1]), int(match[2] or match[1])
    for edge in (height, width):
        checks.check_range("--size", edge, 1, 4096)
    return height, width


def _progress(record: dict[str, Any]) -> None:
    text = f"tokenized {record['images']} of {record['of']} images, {record['skipped']} skipped"
    terminal.note(f"{text}, {record['seconds']:.1f} s")
