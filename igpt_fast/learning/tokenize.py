"""Makes a directory of token shards of any source: decoded in processes, resumable, whole or not at all.

A shard is the same stretch of the source whoever makes it, and has its name once it and the note beside it
(``shard-00000.json``: images, held-out ones, what was left out) are whole. ``plan.json`` says what the directory is
made of until the manifest takes its place; who goes on must mean the same.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt_fast import files
from igpt_fast.checks import whole_number
from igpt_fast.files import printable, shown
from igpt_fast.learning.data import check_classes, check_tokens
from igpt_fast.learning.folders import held_out
from igpt_fast.learning.pool import given_up, in_processes
from igpt_fast.learning.shards import (
    CLUSTERS,
    FORMAT,
    HELDOUT,
    LABELS,
    MANIFEST,
    PLAN,
    SKIPPED,
    Manifest,
    Shard,
    ShardData,
    is_own,
    note_name,
    own_files,
    read_manifest,
    sha256_of,
    shard_name,
    write_npy,
)
from igpt_fast.learning.sources.opening import open_source
from igpt_fast.learning.sources.protocol import Content, Source
from igpt_fast.learning.taking import Taking, fit_palette, pixels_of
from igpt_fast.learning.tokenizers import CodeTokenizer, ColourTokenizer, Tokenizer, tokenizer_of

_DECODED = 256  # images whose pixels a process holds at once
_SHARD_IMAGES, _SHARD_BYTES = 8192, 64 << 20  # of a shard, at most
_MAX_SHARDS = 100_000
_MAX_REASON = 300

Progress = Callable[[dict[str, Any]], None]


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
        out: The directory; made if it does not exist. Files in it that this did not write are left alone.
        taking: How.
        workers: Processes that decode; 0: this one. Where they are some, ``__main__`` must be safe to import.
        resume: Go on with what is in ``out``.
        overwrite: Start afresh where ``out`` holds shards.
        progress: Called with a record for each shard that is done.

    Returns:
        What was made: counts, sizes and seconds.

    Raises:
        FileExistsError: ``out`` holds shards, with neither ``resume`` nor ``overwrite``; or another file of a name that
            is needed.
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
    if resume and is_own(out / MANIFEST):
        manifest = read_manifest(out)
        _compare(out / MANIFEST, manifest.source, made.identity)
        ShardData(out, classes=taking.classes).verify()
        made.tidy()
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
    there = [name for name in (MANIFEST, PLAN) if is_own(out / name)]
    if there and not (resume or overwrite):
        raise FileExistsError(f"{out}: holds shards already ({there[0]}); resume them or overwrite them")
    if resume and not there:
        raise FileNotFoundError(f"{out}: has neither {MANIFEST} nor {PLAN} of shards; there is nothing to resume")


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


def _remove(own: Sequence[Path]) -> None:
    """The files of a directory of shards; those last by which they are known as such."""
    for path in sorted(own, key=lambda path: path.name in (MANIFEST, PLAN)):
        path.unlink()


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
        self.count = -(-len(source) // self.size)
        heldout = np.array([held_out(name, taking.holdout) for name in source.names])
        self._check_trainable(heldout, self.classes.labels if self.classes is not None else None)
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
                match = re.fullmatch(r"\.(.+)\.[0-9a-f]{16}\.partial(\.\w+)?", left.name)
                if match is not None and match[1] in self._names():
                    left.unlink(missing_ok=True)  # from a process that was killed while it wrote
            return self._planned(values)
        own = own_files(self.out)
        self._check_others(set(own))
        tokenizer = self._tokenizer()
        self.out.mkdir(parents=True, exist_ok=True)
        if overwrite:
            _remove(own)
        names = [CLUSTERS, PLAN] if tokenizer.clusters is not None else [PLAN]
        with files.replacing_together([self.out / name for name in names]) as partials:
            if tokenizer.clusters is not None:
                write_npy(partials[0], tokenizer.clusters)
            plan_ = {"format": FORMAT, "shards": self.count, "files": self._small()}
            partials[-1].write_text(json.dumps(plan_ | {"source": self.identity, "tokenizer": tokenizer.entry()}))
        return tokenizer

    def _small(self) -> list[str]:
        """The files that will stand beside the shards and the manifest."""
        classes, colours = self.classes is not None, self.taking.vocabulary is None
        return [SKIPPED, HELDOUT, *([LABELS] if classes else ()), *([CLUSTERS] if colours else ())]

    def _names(self) -> list[str]:
        """All files that are written, for a time or for good."""
        shards = [shard_name(number) for number in range(self.count)]
        return [MANIFEST, PLAN, *self._small(), *shards, *map(note_name, shards)]

    def _check_others(self, own: set[Path]) -> None:
        """Refuses to overwrite what is someone else's."""
        there = {entry.name for entry in os.scandir(self.out)} if self.out.is_dir() else set()
        if other := [name for name in self._names() if name in there and self.out / name not in own]:
            raise FileExistsError(
                f"{self.out / other[0]}: exists, and was not written by igpt tokenize; choose another directory"
            )
        if self.source.path.resolve() in {path.resolve() for path in own}:
            raise ValueError(f"{self.source.path}: would be overwritten, being the source; choose another directory")

    def _check_trainable(self, heldout: np.ndarray, labels: np.ndarray | None) -> None:
        """Refuses what no run would take: before the work, and after it, when it is known what can be read."""
        path, count = self.source.path, len(heldout)
        if heldout.all():
            raise ValueError(f"{path}: holdout {self.taking.holdout} leaves none of the {count} images to train on")
        if self.classes is not None:
            try:
                check_classes(torch.from_numpy(labels), self.classes.names, torch.from_numpy(heldout))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error

    def tidy(self) -> None:
        """Removes what the manifest has taken the place of; the plan last, by which the others are known."""
        for path in [*map(self._note, range(self.count)), self.out / PLAN] if is_own(self.out / PLAN) else ():
            path.unlink(missing_ok=True)

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
        missing = [number for number in range(self.count) if not self._is_whole(number)]
        jobs = (
            (self.out, number, self.source.part(self._places(number)), tokenizer, self.taking.holdout)
            for number in missing
        )
        done = min(len(self.source), (self.count - len(missing)) * self.size)
        skipped, start = 0, time.perf_counter()
        for images, left_out in in_processes(_make_shard, jobs, self.workers):
            done, skipped = done + images + left_out, skipped + left_out
            if self.progress is not None:
                seconds = round(time.perf_counter() - start, 2)
                record = {"images": done, "of": len(self.source), "skipped": skipped, "seconds": seconds}
                self.progress(record)
        return [self._read_note(number) for number in range(self.count)]

    def _is_whole(self, number: int) -> bool:
        """Whether a shard is there, as its note says."""
        try:
            return sha256_of(self.out / shard_name(number)) == self._read_note(number)["sha256"]
        except (OSError, ValueError):
            return False

    def _places(self, number: int) -> np.ndarray:
        return np.arange(number * self.size, min((number + 1) * self.size, len(self.source)))

    def _note(self, number: int) -> Path:
        return self.out / note_name(shard_name(number))

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
            _remove(own_files(self.out))
            reason = f"{printable(skipped[0][0])}: {skipped[0][1]}"
            raise ValueError(f"{self.source.path}: none of its {len(skipped)} images can be read: {reason}")
        heldout = np.concatenate([np.isin(np.arange(note["images"]), note["heldout"]) for note in notes])
        arrays, labels = {HELDOUT: heldout}, None
        if self.classes is not None:
            wrong = [
                number * self.size + note_place
                for number, note in enumerate(notes)
                for note_place, *_ in note["skipped"]
            ]
            labels = np.delete(self.classes.labels, wrong)
            arrays[LABELS] = labels.astype(np.int32)
        self._check_trainable(heldout, labels)
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
        self.tidy()
        return manifest


def _make_shard(out: Path, number: int, part: Source, tokenizer: Tokenizer, holdout: float) -> tuple[int, int]:
    """Writes a shard and its note; returns how many images it has, and how many were left out."""
    rows, chunk, heldout, skipped = [np.zeros((0, tokenizer.length), tokenizer.dtype)], [], [], []
    images = 0
    for place, (name, content) in enumerate(part.pictures()):
        if given_up():
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
    with files.replacing_together([path, out / note_name(path.name)]) as (tokens, note):
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
