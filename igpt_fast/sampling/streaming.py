"""Streaming: images drawn batch after batch, row by row, with fewer at a time where memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from igpt_fast.draws import Sampling
from igpt_fast.engines.network import Model
from igpt_fast.sampling.batches import Batches
from igpt_fast.sampling.decoding import blank, decoding
from igpt_fast.sampling.inpainting import following, primer_lengths, resample
from igpt_fast.sampling.results import Generation, InterruptedGeneration
from igpt_fast.sampling.rules import Guidance, Streams, stream_uniforms

Progress = Callable[[int, int], None]
CANDIDATE = 24  # the bit of a stream's number at which a candidate's begins; see Task
MAX_CANDIDATES = 256


@dataclass(frozen=True)
class Task:
    """What is to be drawn: n images of each of M inputs, the n of the first input first.

    Args:
        known: (M, T) int64: given colours, -1 where one is drawn.
        begins: (M,) int64: what stands before the first pixel, SOS or a class.
        n: Images of each input.
        streams: (M n,) int64: of each image. Candidate c of an image draws from stream ``image + (c << 24)``, so the
            first one is what is drawn without candidates. Number T of an image's own stream takes one of them.
        seed: Of the streams.
        sampling: How colours are drawn.
        candidates: Drawn for each image; one of them is taken, see ``inpainting``.
        scale: Of the guidance away from no class.
        dtype: As in ``decoders.make_decoder``.
        width: Pixels of a row.
    """

    known: Tensor
    begins: Tensor
    n: int
    streams: Tensor
    seed: int
    sampling: Sampling
    candidates: int
    scale: float
    dtype: str | None
    width: int
    primer: int = field(init=False)  # pixels that all inputs have given first

    def __post_init__(self) -> None:
        object.__setattr__(self, "primer", int(primer_lengths(self.known >= 0).min()))

    @property
    def copies(self) -> int:
        """Sequences that share a primer."""
        return self.n * self.candidates


@dataclass(frozen=True)
class RowEvent:
    """A row of pixels of the images ``first .. first + b - 1`` is finished.

    Args:
        first: Index of the first of the images in the result.
        row: Which row, from the top. Each comes once for each image; where memory did not suffice, what was drawn of
            that batch comes again, the same.
        tokens: (b, width) int64 on the CPU, given pixels included.
        done: Pixels computed so far, those of candidates and clamped ones behind the primer included.
        total: Of so many.
    """

    first: int
    row: int
    tokens: Tensor
    done: int
    total: int


@dataclass
class Pictures:
    """Finished images, in order: tokens (N, T), logprobs (N, T) of all pixels but the primer's, (N,) sizes."""

    tokens: Tensor
    logprobs: Tensor
    sizes: Tensor  # effective sample sizes of the candidates


Collect = Callable[[Pictures, "Stream"], Generation]


class Stream:
    """An iterator of ``RowEvent``, which draws as it is asked for the next; after its end, ``result`` has the images.

    ``Pipeline.stream`` and ``Pipeline.stream_complete`` make it. One that is not followed to its end can simply be
    dropped, and what it held of memory is free.
    """

    def __init__(
        self,
        model: Model,
        task: Task,
        batch_size: int,
        collect: Collect,
        progress: Progress | None,
    ) -> None:
        self._n, self._collect = task.n, collect
        self._drawing = _Drawing(model, task, batch_size, progress)
        self._events = self._drawing.run()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> RowEvent:
        """Draws until a row is finished.

        Raises:
            InterruptedGeneration: On Ctrl-C.
        """
        try:
            return next(self._events)
        except KeyboardInterrupt as error:
            raise InterruptedGeneration(self.partial) from error

    @property
    def engine(self) -> str | None:
        """Name of the decoder, when it has been chosen."""
        return self._drawing.engine

    @property
    def engine_reason(self) -> str | None:
        """Why it is no faster one, where it is none."""
        return self._drawing.engine_reason

    @property
    def batch_size(self) -> int:
        """Sequences computed together at most; halved where memory does not suffice."""
        return self._drawing.batches.size

    @property
    def total(self) -> int:
        """Pixels that are computed in all; see ``RowEvent``."""
        return self._drawing.total

    @property
    def result(self) -> Generation:
        """All images.

        Raises:
            RuntimeError: The iterator has not come to its end.
        """
        if not self._drawing.ended:
            raise RuntimeError("the stream has not come to its end; iterate over it first")
        return self._collect(_joined(self._drawing.finished), self)

    @property
    def partial(self) -> Generation | None:
        """What is finished so far: whole batches, and of completions the inputs that have all theirs. Or ``None``."""
        drawn = _joined(self._drawing.finished) if self._drawing.finished else None
        n = self._n
        count = 0 if drawn is None else len(drawn.tokens) // n * n
        if drawn is None or count == 0:
            return None
        return self._collect(Pictures(drawn.tokens[:count], drawn.logprobs[:count], drawn.sizes[:count]), self)


class _Drawing:
    """What a stream has drawn. Apart from it, for ``run`` holds this and the stream holds ``run``: a stream that held
    itself, and with it a decoder, would wait for the collector.
    """

    def __init__(self, model: Model, task: Task, batch_size: int, progress: Progress | None) -> None:
        self.engine: str | None = None
        self.engine_reason: str | None = None
        self.batches = Batches(len(task.streams) * task.candidates, task.copies, batch_size)
        self.finished: list[Pictures] = []
        self.ended = False
        self._model, self._task, self._progress = model, task, progress
        self._decoded = task.known.shape[1] - task.primer
        self._done = 0
        self._candidates: tuple[Tensor, Tensor] | None = None  # of images that have not all of theirs

    @property
    def total(self) -> int:
        return self.batches.count * self._decoded

    def run(self) -> Iterator[RowEvent]:
        yield from self.batches.run(self._batch)
        self.ended = True

    def _batch(self, start: int, stop: int, together: int) -> Iterator[RowEvent]:
        """Draws sequences start .. stop - 1, of which ``together`` that follow each other have one primer."""
        task, device, width = self._task, self._model.device, self._task.width
        sequence = torch.arange(start, stop)
        image, candidate = sequence // task.candidates, sequence % task.candidates
        source = image // task.n
        tokens, first = task.known[source], task.primer
        context = torch.cat([task.begins[source][:, None], tokens[:, :first]], dim=1)[::together].to(device)
        guidance = None
        if task.scale != 1.0:
            without = context.clone()
            without[:, 0] = self._model.config.sos_token_id
            guidance = Guidance(task.scale, without)
        streams = task.streams[image] + (candidate << CANDIDATE)
        uniforms = stream_uniforms(task.seed, streams, first, self._decoded, device)
        known = tokens[:, first:].to(device) if bool((tokens[:, first:] >= 0).any()) else None
        drawn = blank(uniforms, start // task.candidates)
        if task.candidates == 1:
            yield from self._rows(start, tokens, 0, first // width)
        steps = decoding(
            drawn,
            self._model,
            context,
            uniforms,
            task.sampling,
            task.dtype,
            known=known,
            guidance=guidance,
            streams=Streams(task.seed, streams),
        )
        for t in steps:
            self.engine, self.engine_reason = drawn.engine, drawn.reason
            self._advance(start * self._decoded + (t + 1) * len(sequence))
            end = first + t + 1
            if task.candidates == 1 and end % width == 0:
                begin = max(first, end - width)
                drawn.check(begin - first, end - first)
                tokens[:, begin:end] = drawn.tokens[:, begin - first : end - first].cpu()
                yield from self._rows(start, tokens, end // width - 1, end // width)
        tokens[:, first:] = drawn.tokens.cpu()
        logprobs = torch.cat([torch.full((len(tokens), first), torch.nan), drawn.logprobs.cpu()], dim=1)
        if task.candidates == 1:
            self.finished.append(Pictures(tokens, logprobs, torch.ones(len(tokens))))
        else:
            yield from self._choose(stop, tokens, logprobs)

    def _choose(self, stop: int, tokens: Tensor, logprobs: Tensor) -> Iterator[RowEvent]:
        """Takes one of each image's candidates, when they are all there; up to sequence ``stop`` they are drawn."""
        task, m = self._task, self._task.candidates
        if self._candidates is not None:
            tokens = torch.cat([self._candidates[0], tokens])
            logprobs = torch.cat([self._candidates[1], logprobs])
        first, last = (stop - len(tokens)) // m, stop // m
        count = (last - first) * m
        rest = tokens[count:], logprobs[count:]
        if count == 0:
            self._candidates = rest
            return
        image = torch.arange(first, last)
        follows = following(task.known[image // task.n] >= 0).repeat_interleave(m, dim=0)
        weights = logprobs[:count].double().masked_fill(~follows, 0.0).sum(dim=1).view(-1, m)
        numbers = stream_uniforms(task.seed, task.streams[image], tokens.shape[1], 1, torch.device("cpu"))
        taken, sizes = resample(weights, numbers[:, 0])
        taken = torch.arange(len(image)) * m + taken
        chosen = Pictures(tokens[taken], logprobs[taken], sizes)
        events = list(self._rows(first, chosen.tokens, 0, tokens.shape[1] // task.width))
        # Only now: where memory does not suffice for any of it, the batch is drawn again.
        self._candidates = rest
        self.finished.append(chosen)
        yield from events

    def _rows(self, first: int, tokens: Tensor, begin: int, end: int) -> Iterator[RowEvent]:
        for row in range(begin, end):
            part = tokens[:, row * self._task.width : (row + 1) * self._task.width].clone()
            yield RowEvent(first, row, part, self._done, self.total)

    def _advance(self, done: int) -> None:
        self._done = max(done, self._done)  # a batch that is drawn again, in parts, does not take anything back
        if self._progress is not None:
            self._progress(self._done, self.total)


def _joined(parts: list[Pictures]) -> Pictures:
    columns = zip(*((part.tokens, part.logprobs, part.sizes) for part in parts), strict=True)
    return Pictures(*(torch.cat(column) for column in columns))
