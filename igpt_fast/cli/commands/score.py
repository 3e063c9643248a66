"""``igpt score``: how unusual a model finds images."""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional

from igpt_fast import processes
from igpt_fast import world as world_module
from igpt_fast.checks import whole_number
from igpt_fast.cli import checks, terminal
from igpt_fast.cli.checks import UsageError
from igpt_fast.cli.draw import options
from igpt_fast.cli.score_files import Results
from igpt_fast.interrupts import delayed_interrupt

if TYPE_CHECKING:
    from torch import Tensor

    from igpt_fast.learning.tokenizers import Tokenizer
    from igpt_fast.pipeline import Pipeline, Scores
    from igpt_fast.world import World

ORDERS = {"nats": "nats_per_pixel", "ood": "ood"}


@dataclass(frozen=True)
class ScoreOptions:
    """How images are scored.

    Args:
        model: Directory or hub id of a checkpoint; the bundled emoji model if not given.
        label: Class that the images are said to be of, for a model that has classes: a number or a name of its
            config.json, or several with commas between, which are repeated until every image has one.
        batch_size: Images computed together; chosen by memory if not given.
        device: cpu, cuda, cuda:N or mps; cuda if torch has it, if not given. Under torchrun, cuda is the GPU
            LOCAL_RANK.
        dtype: float32, bfloat16, float16, or auto for what the checkpoint is stored in; int8 rounds weights and
            activations to 8 bits, on the CPU.
        backend: auto, reference, cpu or cuda; see igpt env.
    """

    model: str | None = None
    label: str | None = None
    batch_size: int | None = None
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "auto", "int8"] = "float32"
    backend: checks.Backend = "auto"

    def __post_init__(self) -> None:
        checks.check_device_name(self.device)
        if self.batch_size is not None:
            whole_number("batch_size", self.batch_size)

    def pipeline(self) -> Pipeline:
        """The one that they ask for."""
        checks.choose_backend(self.backend)
        device = checks.choose_device(self.device, processes.local_rank())
        from igpt_fast.pipeline import Pipeline

        return Pipeline.from_pretrained(self.model, device=device, dtype="float32" if self.rounded else self.dtype)

    @property
    def rounded(self) -> str | None:
        """The dtype of the computation, where weights are not stored in it."""
        return self.dtype if self.dtype == "int8" else None


def score(
    images: Positional[tuple[Path, ...]] = (),
    split: Literal["heldout", "train", "all"] = "heldout",
    reference: Path | None = None,
    by: Literal["nats", "ood"] = "nats",
    show: int = 20,
    results: OmitArgPrefixes[Results] = Results(),  # noqa: B008 - a frozen value
    how: OmitArgPrefixes[ScoreOptions] = ScoreOptions(),
    skip_unreadable: bool = False,
    json: bool = False,
) -> None:
    """Score images by their likelihood, the most unusual first; under torchrun, with all its processes.

    Example: igpt score pictures/ --grid unusual.png

    Every figure is higher for what is more unusual: nats and bits a pixel over the model's palette; the complexity,
    bits of the compressed tokens; and ood, bits less complexity (Serra et al., 2020), which tells strange images from
    merely detailed ones. Neither sees that an image is upside down.

    Args:
        images: Image files, directories that are searched for them, or a token file (.npz with tokens, clusters,
            heldout); the bundled emoji if not given. The middle is cut out in the model's aspect and resized.
        split: Which images of a token file: heldout, train or all.
        reference: Images that are usual: a directory, a token file or what --npz has written; prints the AUROC by which
            the scores tell the others from them.
        by: The order of the images: nats or ood.
        show: How many are listed; --csv, --npz and --json have all.
        results: What is written.
        how: How they are scored.
        skip_unreadable: Leave out files that are not readable images, instead of failing.
        json: Print one JSON object.
    """
    checks.check_range("--show", show, 0, 1 << 30)
    with world_module.world() as world:
        if world.first:
            results.check()
        sets = _read_sets(images, reference, split, how)
        pictures = [path for found in sets if isinstance(found, _Set) and not found.tokenizer for path in found.items]
        if results.maps is not None and results.maps.resolve() in {path.parent.resolve() for path in pictures}:
            raise UsageError("--maps is a directory of images that are scored; give another one")
        job = _Job(*sets, how.pipeline(), world, how, skip_unreadable)
        job.check()
        _run(job, results, ORDERS[by], show, json)


@dataclass(frozen=True)
class _Set:
    """Images by their names: paths, or (N, T) tokens with their tokenizer. ``source`` is what errors call them."""

    source: str
    names: list[str]
    items: Any
    tokenizer: Tokenizer | None = None

    @property
    def unreadable(self) -> ValueError:
        """The error that none of them can be read."""
        return ValueError(f"{self.source}: none of its {len(self.names)} images can be read")

    def part(self, start: int, stop: int) -> list[Any]:
        """Some of the items; where the numbers are below 0 there are none."""
        return list(self.items[max(0, start) : max(0, stop)])


@dataclass(frozen=True)
class _Job:
    images: _Set
    reference: _Set | Scores | None
    pipeline: Pipeline
    world: World
    how: ScoreOptions
    skip_unreadable: bool

    def check(self) -> None:
        """Fails before the work is done where tokens, a reference or a label are not the model's, or processes differ
        in what they find.
        """
        from igpt_fast.likelihood.scoring import nothing

        for found in (self.images, self.reference):
            if isinstance(found, _Set) and found.tokenizer is not None:
                _check_tokenizer(self.pipeline, found)
        with checks.as_usage():
            self.pipeline.checked_labels(self.labels, len(self.names), "images")
        if self.reference is not None and not isinstance(self.reference, _Set):
            own = nothing(self.pipeline.model, self.pipeline.processor, self.how.label is not None)
            own.check_comparable(self.reference)
        mine = zlib.crc32("\0".join(self.names).encode(errors="backslashreplace"))
        if self.world.agree("images", mine) != mine:
            found_here = f"{len(self.names)}, from {self.names[0]} to {self.names[-1]}"
            raise ValueError(f"finds other images than the first process: {found_here}")

    @cached_property
    def labels(self) -> list[int] | None:
        """The class of each of ``names``."""
        return options.labels(self.how.label, len(self.names), self.how.model)

    @cached_property
    def names(self) -> list[str]:
        """Of all that is scored: the images, then those of the reference."""
        return self.images.names + (self.reference.names if isinstance(self.reference, _Set) else [])

    def items(self, share: range) -> list[Any]:
        """Of some of them."""
        count, others = len(self.images.names), self.reference
        found = self.images.part(share.start, share.stop)
        return found + (others.part(share.start - count, share.stop - count) if isinstance(others, _Set) else [])


def _read_sets(
    images: Sequence[Path], reference: Path | None, split: str, how: ScoreOptions
) -> tuple[_Set, _Set | Scores | None]:
    from igpt_fast.files import BUNDLED

    files = list(images) or [BUNDLED.parent / "emoji16.npz"]
    for path in [*files, *([] if reference is None else [reference])]:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or directory")
    if any(path.suffix == ".npz" and not path.is_dir() for path in files):
        if len(files) > 1:
            raise UsageError("a token file is scored alone, without other images")
        found = _token_set(files[0], split, "; --split all takes them all")
    else:
        if split != "heldout":
            raise UsageError("--split: only of a token file")
        found = _picture_set(files)
    if reference is None:
        return found, None
    if how.label is not None and "," in how.label:
        raise UsageError("--label with several numbers says nothing of the images of --reference; give one")
    if reference.is_dir():
        return found, _picture_set([reference])
    return found, _reference_file(reference)


def _picture_set(places: Sequence[Path]) -> _Set:
    from igpt_fast.image.folders import find_images

    found: list[Path] = []
    for place in places:
        inside = find_images(place) if place.is_dir() else [place]
        if not inside:
            raise ValueError(f"{place}: no images in it")
        found += inside
    return _Set(str(places[0]), [str(path) for path in found], found)


def _token_set(path: Path, split: str, advice: str) -> _Set:
    import torch

    from igpt_fast.learning.data import load_tokens

    data = load_tokens(path)
    chosen = {"heldout": data.heldout, "train": ~data.heldout, "all": torch.ones_like(data.heldout)}[split]
    numbers = chosen.nonzero()[:, 0].tolist()
    if not numbers:
        raise ValueError(f"{path}: has no held-out image{advice}")
    return _Set(f"{path}, {split}", [f"{path.name}[{i}]" for i in numbers], data.tokens[chosen], data.tokenizer)


def _reference_file(path: Path) -> _Set | Scores:
    """Scores that were saved, or the held-out images of a token file."""
    from igpt_fast.pipeline import Scores

    try:
        return Scores.load(path)
    except ValueError as error:
        if "has no array 'nats'" not in str(error):
            raise
    return _token_set(path, "heldout", ", which a reference is made of")


def _run(job: _Job, results: Results, by: str, show: int, json: bool) -> None:
    """Scores, with the other processes if there are some; the first one writes and reports.

    Raises:
        KeyboardInterrupt: On Ctrl-C, after what was finished has been saved.
        Exception: What ended the work, after the same.
    """
    from igpt_fast.likelihood.scores import without_processor

    start = time.perf_counter()
    world, share = job.world, job.world.share(len(job.names))
    with contextlib.closing(_Bar(world, len(job.names))) as bar:
        which, part, skipped, error = _score_share(job, share, bar)
        interrupted = isinstance(error, KeyboardInterrupt)
        why = "interrupted" if interrupted else "" if error is None else terminal.reason(error)
        parts = world.gather((which, without_processor(part), skipped, interrupted, why), interrupted, bar.show)
    if parts is None:  # the first process says what has failed
        if interrupted:
            raise KeyboardInterrupt
        return
    words = [(rank, said) for rank, (*_, said) in enumerate(parts) if said]
    reasons = [said if rank == world.rank else f"rank {rank}: {said}" for rank, said in words]
    interrupted = any(stopped for *_, stopped, _ in parts)
    values: dict[str, Any] = {"skipped": sum(count for _, _, count, *_ in parts), "interrupted": interrupted}
    values |= {"processes": world.size, "seconds": round(time.perf_counter() - start, 3)}
    values |= {"error": reasons[0]} if reasons and not interrupted else {}
    with delayed_interrupt():
        finished = [(numbers, found) for numbers, found, *_ in parts if found is not None]
        scores, compared = _joined(job, finished, whole=not reasons)
        if scores is not None:
            _finish(_Report(job, scores, compared, values, by, show, json), results)
        elif reasons:
            terminal.say("igpt: no image is scored, nothing is saved")
        else:
            raise job.images.unreadable
    if interrupted:
        raise KeyboardInterrupt
    if error is not None:
        raise error
    if reasons:
        raise RuntimeError(reasons[0])
    if compared is None and isinstance(job.reference, _Set):
        raise job.reference.unreadable


def _score_share(job: _Job, share: range, bar: _Bar) -> tuple[list[int], Scores | None, int, BaseException | None]:
    """Which of this process's images are scored, their scores, how many were left out, and what ended it too early.

    Raises:
        Exception: Nothing was begun.
        PeerGoneError: Another process is gone.
    """
    import torch

    if not share:
        return [], None, 0, None
    try:
        which, tokens = _read(job, share, bar)
    except KeyboardInterrupt as error:
        return [], None, 0, error
    left_out = len(share) - len(which)
    bar.begin("scoring", len(job.names))
    bar.scored(left_out)
    if not which:
        return [], None, left_out, None
    names, every = [job.names[i] for i in which], job.labels
    labels = None if every is None else [every[i] for i in which]
    try:
        scores = job.pipeline.score_tokens(
            torch.stack(tokens),
            labels,
            job.how.batch_size,
            lambda done, _: bar.scored(left_out + done),
            names=names,
            dtype=job.how.rounded,
        )
        return which, scores, left_out, None
    except world_module.PeerGoneError:
        raise
    except (KeyboardInterrupt, Exception) as error:
        partial = getattr(error, "partial", None)
        return which[: len(partial or ())], partial, left_out, error


def _read(job: _Job, share: range, bar: _Bar) -> tuple[list[int], list[Tensor]]:
    """Which of a share's images can be read, and their (T,) tokens."""
    import torch

    from igpt_fast.likelihood.scoring import read_images

    items = job.items(share)
    pictures = [item for item in items if not isinstance(item, torch.Tensor)]
    if pictures:
        bar.begin("reading", len(pictures))
    read = iter(read_images(pictures, job.pipeline.processor, bar.read))
    found_tokens = [item if isinstance(item, torch.Tensor) else next(read) for item in items]
    failures = [str(item) or type(item).__name__ for item in found_tokens if isinstance(item, Exception)]
    if failures and not job.skip_unreadable:
        listed = "; ".join(failures[:3]) + ("; ..." if len(failures) > 3 else "")
        raise ValueError(f"{len(failures)} of {len(items)} images cannot be read (--skip-unreadable): {listed}")
    for failure in failures:
        terminal.say(f"left out: {failure}")
    kept = [(i, item) for i, item in zip(share, found_tokens, strict=True) if isinstance(item, torch.Tensor)]
    return [i for i, _ in kept], [item.long() for _, item in kept]


def _check_tokenizer(pipeline: Pipeline, found: _Set) -> None:
    """Tokens mean nothing in another palette than their own, nor in rows of another length."""
    import numpy as np

    from igpt_fast.learning.tokenizers import ColourTokenizer

    processor, tokens = pipeline.processor, found.tokenizer
    own = np.asarray(processor.clusters)
    if not isinstance(tokens, ColourTokenizer):
        raise ValueError(f"{found.source}: its tokens are codes of a vocabulary, the model's are colours")
    if own.shape != tokens.clusters.shape or not np.allclose(own, tokens.clusters, atol=1e-5):
        got, want = f"{len(tokens.clusters)} colours", f"{len(own)}"
        raise ValueError(f"{found.source}: its tokens are of another palette ({got}) than the model's ({want})")
    if (tokens.height, tokens.width) != (processor.height, processor.width):
        got, want = f"{tokens.height}x{tokens.width}", f"{processor.height}x{processor.width}"
        raise ValueError(f"{found.source}: its images are of {got} pixels, the model's of {want}")


def _joined(job: _Job, parts: Sequence[tuple[list[int], Scores]], whole: bool) -> tuple[Scores | None, Scores | None]:
    """The scores of the images, and those of the reference where everything is finished; ``None`` of no image."""
    from igpt_fast.likelihood.scores import merge, select

    compared = job.reference if whole and not isinstance(job.reference, _Set) else None
    if not parts:
        return None, compared
    numbers, count = [number for some, _ in parts for number in some], len(job.images.names)
    scores = merge([found for _, found in parts], job.pipeline.processor)
    own, others = ([at for at, i in enumerate(numbers) if (i < count) == mine] for mine in (True, False))
    if others and whole:
        compared = select(scores, others)
    return (select(scores, own) if own else None), compared


@dataclass(frozen=True)
class _Report:
    """What is said of scores."""

    job: _Job
    scores: Scores
    reference: Scores | None
    values: dict[str, Any]
    by: str
    show: int
    json: bool

    def aurocs(self) -> dict[str, float]:
        """By each measure."""
        if self.reference is None:
            return {}
        return {by: self.scores.compare(self.reference, by) for by in ORDERS.values()}

    def say(self, aurocs: dict[str, float], files: dict[str, str | None]) -> None:
        """On stdout."""
        scores, processor = self.scores, self.scores.processor
        figures = ("nats_per_pixel", "bits_per_pixel", "bits", "complexity", "ood")
        columns = {name: getattr(scores, name).tolist() for name in figures}
        means = {name: sum(column) / len(scores) for name, column in columns.items()}
        about = {"images": len(scores), "size": [processor.height, processor.width], "palette": scores.palette}
        about |= {"model": self.job.how.model or "bundled", "model_hash": scores.model}
        order = scores.order(self.by)
        if not self.json:
            if shown_now := order[: self.show]:
                terminal.lines([_HEAD, *(_row(scores.names[i], columns, i) for i in shown_now)])
            more = f" ({len(order) - self.show} more are not listed)" if len(order) > self.show > 0 else ""
            terminal.report(False, {}, _summary(scores, means, self.values["seconds"]) + more)
            if aurocs:
                text = ", ".join(f"{value:.3f} by {name}" for name, value in aurocs.items())
                terminal.report(False, {}, f"AUROC against {len(self.reference or ())} images of the reference: {text}")
            return
        labels = [None] * len(scores) if scores.labels is None else scores.labels.tolist()
        about_each = ({"number": i, "image": scores.names[i], "label": labels[i]} for i in order)
        rows = [each | {n: c[each["number"]] for n, c in columns.items()} for each in about_each]
        terminal.report(True, about | means | self.values | {"auroc": aurocs or None, **files, "scores": rows}, "")


_HEAD = "nats/pixel bits/pixel complexity      ood  image"


def _row(name: str, columns: dict[str, list[float]], i: int) -> str:
    nats, bits, complexity, ood = (columns[key][i] for key in ("nats_per_pixel", "bits_per_pixel", "complexity", "ood"))
    return f"{nats:10.4f} {bits:10.4f} {complexity:10.0f} {ood:8.0f}  {terminal.plain(name)}"


def _summary(scores: Scores, means: dict[str, float], seconds: float) -> str:
    size = f"{scores.processor.height}x{scores.processor.width}"
    nats, bits = means["nats_per_pixel"], means["bits_per_pixel"]
    text = f"{len(scores)} images of {size}: {nats:.4f} nats/pixel, {bits:.4f} bits/pixel over {scores.palette}"
    return f"{text}; ood {means['ood']:.0f} bits; {seconds:.1f} s"


def _finish(report: _Report, results: Results) -> None:
    """Writes and reports; what cannot be written is said all the same."""
    paths = {"csv": results.csv, "npz": results.npz, "maps": results.maps, "grid": results.grid}
    aurocs, written = report.aurocs(), dict.fromkeys(paths)
    try:
        results.write(report.scores, report.by)
        written = {name: None if path is None else str(path) for name, path in paths.items()}
    finally:
        report.say(aurocs, written)


class _Bar:
    """On a terminal's stderr: how many of its images this process has read, then how many all processes have scored."""

    def __init__(self, world: World, total: int) -> None:
        self._world = world
        self._bar = terminal.bar("scoring", total, "images", world.first)
        self.close = self._bar.close

    def begin(self, what: str, total: int) -> None:
        self._bar.set_description(what, refresh=False)
        self._bar.reset(total)

    def read(self, done: int) -> None:
        """This process has read so many."""
        self._world.progress(0.0)
        self.show(done)

    def scored(self, done: int) -> None:
        """This process has scored or left out so many."""
        self.show(self._world.progress(done))

    def show(self, done: float) -> None:
        self._bar.update(round(done) - self._bar.n)
