"""Makes a directory of token shards of any source: decoded in processes, resumable, whole or not at all.

A shard is the same stretch of the source whoever makes it, and has its name once it and the note beside it
(``00000.json``: images, held-out ones, what was left out) are whole. ``plan.json`` says what the directory is made of
until the manifest takes its place; who goes on must mean the same.
"""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import dataclasses
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt_fast import files
from igpt_fast.checks import whole_number
from igpt_fast.files import printable, shown
from igpt_fast.image.clusters import fit_clusters
from igpt_fast.image.reading import center_crop, read_middle, resize
from igpt_fast.learning.data import check_tokens
from igpt_fast.learning.folders import held_out
from igpt_fast.learning.shards import (
    CLUSTERS,
    HELDOUT,
    LABELS,
    MANIFEST,
    PLAN,
    SKIPPED,
    Manifest,
    Shard,
    own_files,
    read_manifest,
    sha256_of,
    shard_name,
    write_npy,
)
from igpt_fast.learning.sources.opening import open_source
from igpt_fast.learning.sources.protocol import Content, Source
from igpt_fast.learning.tokenizers import CodeTokenizer, ColourTokenizer, Tokenizer, tokenizer_of

SAMPLE = 4096  # images that a palette is fitted to
_EACH = 1024  # pixels of each of them
_DECODED = 256  # images whose pixels a process holds at once
_SHARD_IMAGES, _SHARD_BYTES = 8192, 64 << 20  # of a shard, at most
_MAX_SHARDS = 100_000
_MAX_REASON = 300

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Taking:
    """How a source becomes tokens.

    Args:
        height, width: Of the images, in pixels: the middle of each is cut out and resized; of an array its own, else
            32, if not given. Of tokens: the rows and columns of (N, T) ones; a square if not given.
        clusters: (K, 3) floats in [-1, 1] to use instead of fitting some.
        n_clusters: How many colours are fitted.
        vocabulary: The source holds tokens, and these are below it.
        classes: Keep the classes of the images.
        holdout: Expected fraction of the images that is held out, in [0, 1); see ``held_out``.
        shard_size: Images of a shard; 8,192, or as many as have 64 MiB, if not given.
        seed: Of the colours' fit.

    Raises:
        ValueError: A value out of its range.
    """

    height: int | None = None
    width: int | None = None
    clusters: np.ndarray | None = None
    n_clusters: int = 512
    vocabulary: int | None = None
    classes: bool = False
    holdout: float = 0.1
    shard_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.holdout < 1.0:
            raise ValueError(f"holdout is {self.holdout}; want a fraction in [0, 1)")
        if self.shard_size is not None:
            whole_number("shard_size", self.shard_size, 1, 1 << 24)
        if self.vocabulary is not None and self.clusters is not None:
            raise ValueError("a vocabulary is of tokens, clusters are for pictures; give one of them")

    def sized(self, source: Source) -> Taking:
        """With the size that is meant where none is given."""
        if self.height is not None and self.width is not None:
            return self
        shape = getattr(source, "array", np.zeros((1, 32, 32))).shape
        if len(shape) == 2:
            side = round(shape[1] ** 0.5)
            if side * side != shape[1]:
                raise ValueError(f"{source.path}: {shape[1]} tokens are not a square; give --size HEIGHTxWIDTH")
            shape = (0, side, side)
        return dataclasses.replace(self, height=shape[1], width=shape[2])

    def colours(self) -> str:
        """What the colours are, in words that tell them apart."""
        if self.clusters is not None:
            return ColourTokenizer(self.clusters, 1, 1).digest()
        return f"codes {self.vocabulary}" if self.vocabulary else f"{self.n_clusters} fitted with seed {self.seed}"


def tokenize(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    taking: Taking,
    *,
    workers: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Turns a source into a directory of token shards, which ``ShardData`` reads.

    Ctrl-C and a kill leave whole shards alone behind, with which ``resume`` goes on.

    Args:
        path: See ``open_source``.
        out: The directory; made if it does not exist. Files of other names in it are left alone.
        taking: How.
        workers: Processes that decode; 0: this one. Where they are some, ``__main__`` must be safe to import.
        resume: Go on with what is in ``out``.
        overwrite: Start afresh where ``out`` holds shards.
        progress: Called with a record for each shard that is done.

    Returns:
        What was made: counts, sizes and seconds.

    Raises:
        FileExistsError: ``out`` holds shards, with neither ``resume`` nor ``overwrite``.
        FileNotFoundError, ValueError: As ``open_source``; no picture can be read; none is left to train on; a label or
            a token out of range; ``resume`` with another source or other settings. The message names the file.
        OSError: A file cannot be written.
        RuntimeError: A process was killed.
    """
    out, start = Path(out), time.perf_counter()
    _check_out(out, resume, overwrite)
    source = open_source(Path(path), taking.vocabulary is not None)
    taking = taking.sized(source)
    made = _Making(source, taking, out, workers, progress)
    if resume and (out / MANIFEST).is_file():
        manifest = read_manifest(out)
        _compare(out / MANIFEST, manifest.source, made.identity)
    else:
        tokenizer = made.begin(resume, overwrite)
        manifest = made.finish(tokenizer, made.shards(tokenizer))
    seconds = time.perf_counter() - start
    size = manifest.tokenizer
    return {
        "out": str(out),
        "images": manifest.images,
        "heldout_images": manifest.heldout,
        "skipped": manifest.skipped,
        "classes": len(manifest.classes),
        "height": size["height"],
        "width": size["width"],
        "vocabulary": size["vocabulary"],
        "shards": len(manifest.shards),
        "palette_seconds": round(made.palette_seconds, 2),
        "seconds": round(seconds, 2),
    }


def _check_out(out: Path, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other")
    files.check_writable(out)
    there = [name for name in (MANIFEST, PLAN) if (out / name).is_file()]
    if there and not (resume or overwrite):
        raise FileExistsError(f"{out}: holds shards already ({there[0]}); resume them or overwrite them")
    if resume and not there:
        raise FileNotFoundError(f"{out}: has neither {MANIFEST} nor {PLAN}; there is nothing to resume")


def _compare(path: Path, theirs: Any, ours: dict[str, Any]) -> None:
    """Refuses to go on with another source or other settings."""
    if not isinstance(theirs, dict):
        raise ValueError(f"{path}: not usable: it does not say what it is made of")
    words = [
        "the source differs" if name == "fingerprint" else f"{name} was {shown(theirs.get(name))}, is {shown(value)}"
        for name, value in ours.items()
        if name != "name" and theirs.get(name) != value
    ]
    if words:
        raise ValueError(f"{path}: made of something else: {'; '.join(words)}")


class _Making:
    """A directory in the making."""

    def __init__(self, source: Source, taking: Taking, out: Path, workers: int, progress: Progress | None) -> None:
        self.source, self.taking, self.out, self.workers, self.progress = source, taking, out, workers, progress
        self.classes = source.classes() if taking.classes else None
        length = (taking.height or 0) * (taking.width or 0)
        usual = min(_SHARD_IMAGES, max(64, _SHARD_BYTES // (2 * length)))
        self.size = taking.shard_size or usual
        if len(source) > _MAX_SHARDS * self.size:
            raise ValueError(f"shard_size is {self.size}; of {len(source)} images there would be too many shards")
        self.palette_seconds = 0.0
        self.identity = {
            "name": source.path.name,
            "fingerprint": source.fingerprint(),
            "images": len(source),
            "height": taking.height,
            "width": taking.width,
            "colours": taking.colours(),
            "holdout": taking.holdout,
            "classes": taking.classes,
            "shard_size": self.size,
        }

    def begin(self, resume: bool, overwrite: bool) -> Tokenizer:
        """The tokenizer, new or of the plan; afterwards there is a plan."""
        plan = self.out / PLAN
        if resume:
            values = files.read_json(plan)
            _compare(plan, values.get("source"), self.identity)
            for left in self.out.glob(".*.partial*"):
                left.unlink(missing_ok=True)  # from a process that was killed while it wrote
            return self._planned(values)
        tokenizer = self._tokenizer()
        self.out.mkdir(parents=True, exist_ok=True)
        for path in own_files(self.out) if overwrite else ():
            path.unlink()
        names = [CLUSTERS, PLAN] if tokenizer.clusters is not None else [PLAN]
        with files.replacing_together([self.out / name for name in names]) as partials:
            if tokenizer.clusters is not None:
                write_npy(partials[0], tokenizer.clusters)
            partials[-1].write_text(json.dumps({"source": self.identity, "tokenizer": tokenizer.entry()}))
        return tokenizer

    def _planned(self, values: dict[str, Any]) -> Tokenizer:
        clusters = self.out / CLUSTERS
        try:
            palette = None
            if self.taking.vocabulary is None:
                with files.open_input(clusters) as file:
                    palette = files.read_npy(file, clusters.stat().st_size)
            return tokenizer_of(values.get("tokenizer"), palette)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{clusters if self.taking.vocabulary is None else self.out / PLAN}: {error}") from error

    def _tokenizer(self) -> Tokenizer:
        taking, height, width = self.taking, self.taking.height or 0, self.taking.width or 0
        if taking.vocabulary is not None:
            return CodeTokenizer(taking.vocabulary, height, width)
        start = time.perf_counter()
        palette = taking.clusters
        if palette is None:
            palette = fit_palette(self.source, taking, self.workers)
        self.palette_seconds = time.perf_counter() - start
        return ColourTokenizer(palette, height, width)

    def shards(self, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        """The notes of all shards, those made of which were missing."""
        count = -(-len(self.source) // self.size)
        missing = [number for number in range(count) if not self._note(number).is_file()]
        jobs = (
            (self.out, number, self.source.part(self._places(number)), tokenizer, self.taking.holdout)
            for number in missing
        )
        done = min(len(self.source), (count - len(missing)) * self.size)
        skipped, start = 0, time.perf_counter()
        for images, left_out in _in_processes(_make_shard, jobs, self.workers):
            done, skipped = done + images + left_out, skipped + left_out
            if self.progress is not None:
                seconds = round(time.perf_counter() - start, 2)
                record = {"images": done, "of": len(self.source), "skipped": skipped, "seconds": seconds}
                self.progress(record)
        return [self._read_note(number) for number in range(count)]

    def _places(self, number: int) -> np.ndarray:
        return np.arange(number * self.size, min((number + 1) * self.size, len(self.source)))

    def _note(self, number: int) -> Path:
        return (self.out / shard_name(number)).with_suffix(".json")

    def _read_note(self, number: int) -> dict[str, Any]:
        path = self._note(number)
        note = files.read_json(path)
        try:
            images = whole_number("images", note.get("images"), 0, self.size)
            for row in note["heldout"]:
                whole_number("a held-out row", row, 0, images - 1)
            for place, name, reason in note["skipped"]:
                whole_number("a place", place, 0, self.size - 1)
                if not isinstance(name, str) or not isinstance(reason, str):
                    raise ValueError("skipped has no name or no reason")
            if images + len(note["skipped"]) != len(self._places(number)) or not isinstance(note["sha256"], str):
                raise ValueError("does not count as many images as the shard is of")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a usable note of a shard: {files.first_line(error)}; remove it") from error
        return note

    def finish(self, tokenizer: Tokenizer, notes: list[dict[str, Any]]) -> Manifest:
        """Writes what stands beside the shards, the manifest last."""
        images = sum(note["images"] for note in notes)
        skipped = [(name, reason) for note in notes for _, name, reason in note["skipped"]]
        if not images:
            for path in own_files(self.out):
                path.unlink()
            reason = f"{printable(skipped[0][0])}: {skipped[0][1]}"
            raise ValueError(f"{self.source.path}: none of its {len(skipped)} images can be read: {reason}")
        heldout = np.concatenate([np.isin(np.arange(note["images"]), note["heldout"]) for note in notes])
        arrays = {HELDOUT: heldout}
        if self.classes is not None:
            wrong = [
                number * self.size + note_place
                for number, note in enumerate(notes)
                for note_place, *_ in note["skipped"]
            ]
            arrays[LABELS] = np.delete(self.classes.labels, wrong).astype(np.int32)
        names = [SKIPPED, *arrays, MANIFEST]
        with files.replacing_together([self.out / name for name in names]) as partials:
            lines = [json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in skipped]
            partials[0].write_text("".join(lines), encoding="utf-8")
            hashes = {name: write_npy(path, arrays[name]) for name, path in zip(arrays, partials[1:], strict=False)}
            if tokenizer.clusters is not None:
                hashes[CLUSTERS] = sha256_of(self.out / CLUSTERS)
            shards = [Shard(shard_name(i), note["images"], note["sha256"]) for i, note in enumerate(notes)]
            classes = self.classes.names if self.classes is not None else []
            counts = (int(heldout.sum()), len(skipped))
            manifest = Manifest(tokenizer.entry(), shards, hashes, classes, *counts, self.identity)
            partials[-1].write_text(manifest.text(), encoding="utf-8")
        for path in [self.out / PLAN, *map(self._note, range(len(notes)))]:
            path.unlink(missing_ok=True)
        return manifest


def fit_palette(source: Source, taking: Taking, workers: int = 0) -> np.ndarray:
    """Colours of a sample: of at most 4,096 pictures that are trained on, and 1,024 pixels of each.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: None of them can be read, or they have too few colours; the message names the source.
    """
    places = _sampled(len(source), source.block, taking.seed)
    pieces = np.array_split(places, max(1, len(places) // 64))
    jobs = ((i, source.part(piece), taking) for i, piece in enumerate(pieces))
    found, reasons = [], []
    for number, pixels, reason in _in_processes(_sample_pixels, jobs, workers):
        found.append((number, pixels))
        reasons += [(number, reason)] if reason else []
    pixels = np.concatenate([pixels for _, pixels in sorted(found, key=lambda pair: pair[0])])
    if not len(pixels):
        if not reasons:
            raise ValueError(
                f"{source.path}: holdout {taking.holdout} leaves none of the {len(source)} images to train on"
            )
        raise ValueError(f"{source.path}: none of the {len(places)} images tried can be read: {min(reasons)[1]}")
    try:
        return fit_clusters(pixels, taking.n_clusters, seed=taking.seed)
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from error


def _sampled(count: int, block: int, seed: int) -> np.ndarray:
    """At most 4,096 ascending places, in stretches of ``block``, one of each of as many equal parts."""
    if count <= SAMPLE:
        return np.arange(count)
    stretches = SAMPLE // block
    parts = np.arange(stretches) + np.random.default_rng(seed).random(stretches) * (1 - block * stretches / count)
    return (np.floor(parts * (count / stretches)).astype(np.int64)[:, None] + np.arange(block)).ravel()


def _sample_pixels(number: int, part: Source, taking: Taking) -> tuple[int, np.ndarray, str]:
    """(n, 3) colours of a part of the sample, and why its first picture that cannot be read cannot be."""
    found, why = [np.zeros((0, 3), np.uint8)], ""
    rng = np.random.default_rng((taking.seed, number))
    for name, content in part.pictures():
        if held_out(name, taking.holdout):
            continue
        try:
            pixels = pixels_of(content, taking.height or 0, taking.width or 0).reshape(-1, 3)
        except (OSError, ValueError) as error:
            why = why or f"{printable(name)}: {files.first_line(error)}"
            continue
        found.append(pixels if len(pixels) <= _EACH else pixels[rng.choice(len(pixels), _EACH, replace=False)])
    return number, np.concatenate(found), why


def pixels_of(content: Content, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8 of the middle of a picture.

    Raises:
        OSError, ValueError: It cannot be read.
    """
    if isinstance(content, ValueError):
        raise content
    if not isinstance(content, np.ndarray):
        return read_middle(content, height, width)
    if content.ndim == 2:
        content = np.repeat(content[..., None], 3, axis=2)
    if content.shape[:2] == (height, width):
        return content
    return np.asarray(resize(center_crop(content, width / height), width, height))


def _make_shard(out: Path, number: int, part: Source, tokenizer: Tokenizer, holdout: float) -> tuple[int, int]:
    """Writes a shard and its note; returns how many images it has, and how many were left out."""
    rows, chunk, heldout, skipped = [np.zeros((0, tokenizer.length), tokenizer.dtype)], [], [], []
    images = 0
    for place, (name, content) in enumerate(part.pictures()):
        if _stop is not None and _stop.is_set():
            raise KeyboardInterrupt
        try:
            chunk.append(_taken(content, tokenizer))
        except (OSError, ValueError) as error:
            skipped.append((place, name.encode("utf-8", "replace").decode(), files.first_line(error)[:_MAX_REASON]))
            continue
        if held_out(name, holdout):
            heldout.append(images)
        images += 1
        if len(chunk) == _DECODED:
            rows.append(_encoded(chunk, tokenizer, part.path, images))
            chunk = []
    if chunk:
        rows.append(_encoded(chunk, tokenizer, part.path, images))
    path = out / shard_name(number)
    with files.replacing_together([path, path.with_suffix(".json")]) as (tokens, note):
        digest = write_npy(tokens, np.concatenate(rows))
        note.write_text(json.dumps({"images": images, "sha256": digest, "heldout": heldout, "skipped": skipped}))
    return images, len(skipped)


def _taken(content: Content, tokenizer: Tokenizer) -> np.ndarray:
    """The pixels of a picture, or the (T,) tokens of one."""
    if tokenizer.clusters is not None:
        return pixels_of(content, tokenizer.height, tokenizer.width)
    assert isinstance(content, np.ndarray)  # nothing else is a source of tokens
    if content.shape not in ((tokenizer.length,), (tokenizer.height, tokenizer.width)):
        wanted = f"{tokenizer.height} x {tokenizer.width}"
        raise ValueError(f"tokens have the shape {content.shape}; want {wanted}")
    return content.reshape(-1)


def _encoded(chunk: list[np.ndarray], tokenizer: Tokenizer, path: Path, until: int) -> np.ndarray:
    stacked = np.stack(chunk)
    if isinstance(tokenizer, ColourTokenizer):
        return tokenizer.encode(stacked)
    try:
        check_tokens(stacked, tokenizer.vocabulary)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return stacked.astype(tokenizer.dtype)


# ---- processes ----------------------------------------------------------------------------------------------

_stop: Any = None  # in a process that decodes: set where the work is given up


def _begin(stop: Any) -> None:
    """Ctrl-C is the business of the process that began this one, and so is the end of it."""
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_processes(function: Callable[..., Any], jobs: Iterator[tuple[Any, ...]], workers: int) -> Iterator[Any]:
    """The results of all jobs, as they are done. Few jobs wait at a time, as each holds a part of the source."""
    if not workers:
        for job in jobs:
            yield function(*job)
        return
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload([__name__])  # so that the imports are made, and held, once
    stop = context.Event()
    with concurrent.futures.ProcessPoolExecutor(workers, context, _begin, (stop,)) as pool:
        waiting: set[concurrent.futures.Future[Any]] = set()
        try:
            for job in jobs:
                waiting.add(pool.submit(function, *job))
                if len(waiting) >= 2 * workers:
                    done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            for future in concurrent.futures.as_completed(waiting):
                yield future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise RuntimeError("a process that decodes was killed, perhaps for want of memory; resume") from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
