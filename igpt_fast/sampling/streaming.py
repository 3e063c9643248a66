"""Streaming: images drawn batch after batch, row by row, with fewer at a time where memory does not suffice."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from igpt_fast.checks import dtype_name
from igpt_fast.engines.network import Model
from igpt_fast.image import ImageGPTImageProcessor, open_image
from igpt_fast.image.reading import fitted
from igpt_fast.interrupts import delayed_interrupt
from igpt_fast.sampling.batches import Batches
from igpt_fast.sampling.decoding import blank, decoding
from igpt_fast.sampling.inpainting import following, resample
from igpt_fast.sampling.request import Request
from igpt_fast.sampling.results import Generation, InterruptedGeneration, NotFiniteError, kept_per_step
from igpt_fast.sampling.rules import Guidance, RandomStreams, stream_uniforms

Progress = Callable[[int, int], None]
CANDIDATE = 24  # the bit of a random stream's number at which a candidate's begins
INPUT_EDGE = 1024  # pixels; larger inputs of completions are kept at this size, for the grid


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


class Pictures(NamedTuple):
    """Finished images, in order: tokens (N, T), logprobs (N, T) of all pixels but the primer's, (N,) sizes."""

    tokens: Tensor
    logprobs: Tensor
    sizes: Tensor  # effective sample sizes of the candidates


class Stream:
    """An iterator of ``RowEvent``, which draws as it is asked for the next; after its end, ``result`` has the images.

    ``Pipeline.stream`` and ``Pipeline.stream_complete`` make it. One that is not followed to its end can simply be
    dropped, and what it held of memory is free.
    """

    def __init__(
        self,
        model: Model,
        processor: ImageGPTImageProcessor,
        request: Request,
        batch_size: int,
        progress: Progress | None = None,
    ) -> None:
        self._model, self._processor, self._request = model, processor, request
        known = torch.full((1, 1), -1, device="cpu").expand(len(request), request.height * request.width)
        if request.images is not None:
            self._inputs, self._originals = _read(request, processor)
            known = self._originals.masked_fill(~request.given, -1)
        self._run = _Run(model, request, known, batch_size, progress)
        self._events = self._run.events()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> RowEvent:
        """Draws until a row is finished.

        Raises:
            InterruptedGeneration: On Ctrl-C.
            NotFiniteError: The model's logits are not finite.
        """
        try:
            return next(self._events)
        except FloatingPointError as error:
            raise NotFiniteError(str(error), self.partial) from error
        except KeyboardInterrupt as error:
            with delayed_interrupt():  # a second one, or a third
                raise InterruptedGeneration(self.partial) from error

    @property
    def engine(self) -> str | None:
        """Name of the decoder, when it has been chosen."""
        return self._run.engine

    @property
    def batch_size(self) -> int:
        """Sequences computed together at most; halved where memory does not suffice."""
        return self._run.batches.size

    @property
    def total(self) -> int:
        """Pixels that are computed in all; see ``RowEvent``."""
        return self._run.total

    @property
    def result(self) -> Generation:
        """All images.

        Raises:
            RuntimeError: The iterator has not come to its end.
        """
        if not self._run.ended:
            raise RuntimeError("the stream has not come to its end; iterate over it first")
        return self._generation(_joined(self._run.finished))

    @property
    def partial(self) -> Generation | None:
        """What is finished so far, or ``None``: whole batches. The last input may have fewer completions than ``n``."""
        return self._generation(_joined(self._run.finished)) if self._run.finished else None

    def drained(self) -> Generation:
        """``result``, after what is left of the iterator."""
        for _ in self:
            pass
        return self.result

    def _generation(self, drawn: Pictures) -> Generation:
        request, tokens, logprobs = self._request, drawn.tokens, drawn.logprobs
        each = torch.arange(len(tokens), device="cpu") // request.n
        labels = None if request.labels is None else request.labels[each]
        generation = Generation(tokens, logprobs, self._processor, request.seed, self._settings(), labels=labels)
        generation.guessed = self._run.guessed
        if request.images is None:
            return generation
        inputs = -(-len(tokens) // request.n)
        given = request.given[:inputs]
        return replace(
            generation,
            logprobs=logprobs.masked_fill(given[each], torch.nan),
            inputs=self._inputs[:inputs],
            counts=each.bincount(minlength=inputs).tolist(),
            originals=self._originals[:inputs],
            given=request.primer,
            known=given,
            known_logprobs=logprobs.masked_fill(~following(given)[each], torch.nan),
            effective_sample_size=drawn.sizes if request.candidates > 1 else None,
        )

    def _settings(self) -> dict[str, object]:
        """How images were drawn, as plain values."""
        settings = self._request.described() | {"batch_size": self.batch_size, "device": str(self._model.device)}
        settings |= {"engine": self.engine, "dtype": self._request.dtype or dtype_name(self._model.dtype)}
        settings |= kept_per_step(*self._run.guessed)
        reason = self._run.engine_reason
        return settings if reason is None else settings | {"engine_reason": reason}


def _read(request: Request, processor: ImageGPTImageProcessor) -> tuple[list[Image.Image], Tensor]:
    """Inputs of completions, in the model's aspect, and their (M, T) tokens."""
    crops, tokens = [], []
    for item in request.images or ():
        opened = open_image(item) if isinstance(item, str | os.PathLike) else item
        crop = fitted(opened, request.width / request.height, request.fit)
        tokens.append(processor(crop, return_tensors="pt")["input_ids"])
        crop.thumbnail((INPUT_EDGE, INPUT_EDGE))
        crops.append(crop)
    return crops, torch.cat(tokens)


class _Run:
    """What a stream has drawn. Apart from it, for ``run`` holds this and the stream holds ``run``: a stream that held
    itself, and with it a decoder, would wait for the collector.
    """

    def __init__(self, model: Model, request: Request, known: Tensor, size: int, progress: Progress | None) -> None:
        self.engine: str | None = None
        self.engine_reason: str | None = None
        self.guessed = 0, 0  # see ``Generation``
        self.batches = Batches(len(known) * request.copies, request.copies, size)
        self.finished: list[Pictures] = []
        self.ended = False
        self._model, self._request, self._known, self._progress = model, request, known, progress
        self._decoded = known.shape[1] - request.primer
        self._done, self.total = 0, self.batches.count * self._decoded
        self._candidates: tuple[Tensor, Tensor] | None = None  # of images that have not all of theirs
        # What stands before the first pixel: behind the colours stand the classes, behind these SOS.
        sos = torch.full((1,), model.config.sos_token_id, device="cpu").expand(len(known))
        self._begins = sos if request.labels is None else request.labels + model.config.n_colours

    def events(self) -> Iterator[RowEvent]:
        yield from self.batches.run(self._batch)
        self.ended = True

    def _batch(self, start: int, stop: int, together: int) -> Iterator[RowEvent]:
        """Draws sequences start .. stop - 1, of which ``together`` that follow each other have one primer."""
        request, device, width = self._request, self._model.device, self._request.width
        sequence = torch.arange(start, stop, device="cpu")
        image, candidate = sequence // request.candidates, sequence % request.candidates
        source = image // request.n
        tokens, first = self._known[source], request.primer
        context = torch.cat([self._begins[source][:, None], tokens[:, :first]], dim=1)[::together].to(device)
        guidance = None
        if request.scale != 1.0:
            without = context.clone()
            without[:, 0] = self._model.config.sos_token_id
            guidance = Guidance(request.scale, without)
        # The first candidate is what is drawn without any.
        streams = request.streams[image] + (candidate << CANDIDATE)
        numbers = RandomStreams(request.seed, streams, first, self._decoded)
        known = tokens[:, first:].to(device) if bool((tokens[:, first:] >= 0).any()) else None
        number = request.first * request.copies + start  # of the whole request
        drawn = blank(*numbers.shape, device, number, request.candidates)
        if request.candidates == 1:
            yield from self._rows(start, tokens, 0, first // width)
        how = request.sampling, request.dtype
        options: dict[str, Any] = {"known": known, "guidance": guidance, "width": width if request.speculate else 0}
        steps = decoding(drawn, self._model, context, numbers, *how, **options)
        with closing(steps):  # also where somebody keeps an error of what is below
            for t in steps:
                self.engine, self.engine_reason = drawn.engine, drawn.reason
                self._advance(start * self._decoded + (t + 1) * len(sequence))
                end = first + t + 1
                if request.candidates == 1 and end % width == 0:
                    begin = max(first, end - width)
                    drawn.check(begin - first, end - first)
                    tokens[:, begin:end] = drawn.tokens[:, begin - first : end - first].cpu()
                    yield from self._rows(start, tokens, end // width - 1, end // width)
        if drawn.steps:
            self.guessed = self.guessed[0] + drawn.steps, self.guessed[1] + self._decoded
        tokens[:, first:] = drawn.tokens.cpu()
        before = torch.full((len(tokens), first), torch.nan, dtype=torch.float32, device="cpu")
        logprobs = torch.cat([before, drawn.logprobs.cpu()], dim=1)
        if request.candidates == 1:
            self.finished.append(Pictures(tokens, logprobs, torch.ones(len(tokens), dtype=torch.float32, device="cpu")))
        else:
            yield from self._choose(stop, tokens, logprobs)

    def _choose(self, stop: int, tokens: Tensor, logprobs: Tensor) -> Iterator[RowEvent]:
        """Takes one of each image's candidates, when they are all there; up to sequence ``stop`` they are drawn."""
        request, m = self._request, self._request.candidates
        if self._candidates is not None:
            tokens = torch.cat([self._candidates[0], tokens])
            logprobs = torch.cat([self._candidates[1], logprobs])
        first, last = (stop - len(tokens)) // m, stop // m
        count = (last - first) * m
        rest = tokens[count:], logprobs[count:]
        if count == 0:
            self._candidates = rest
            return
        image = torch.arange(first, last, device="cpu")
        follows = following(request.given[image // request.n]).repeat_interleave(m, dim=0)
        weights = logprobs[:count].double().masked_fill(~follows, 0.0).sum(dim=1).view(-1, m)
        # Of an image's own stream, the number behind those of its pixels.
        numbers = stream_uniforms(request.seed, request.streams[image], tokens.shape[1], 1, torch.device("cpu"))
        taken, sizes = resample(weights, numbers[:, 0])
        taken = torch.arange(len(image), device="cpu") * m + taken
        chosen = Pictures(tokens[taken], logprobs[taken], sizes)
        events = list(self._rows(first, chosen.tokens, 0, tokens.shape[1] // request.width))
        # Only now: where memory does not suffice for any of it, the batch is drawn again.
        self._candidates = rest
        self.finished.append(chosen)
        yield from events

    def _rows(self, first: int, tokens: Tensor, begin: int, end: int) -> Iterator[RowEvent]:
        for row in range(begin, end):
            part = tokens[:, row * self._request.width : (row + 1) * self._request.width].clone()
            yield RowEvent(first, row, part, self._done, self.total)

    def _advance(self, done: int) -> None:
        self._done = max(done, self._done)  # a batch that is drawn again, in parts, does not take anything back
        if self._progress is not None:
            self._progress(self._done, self.total)


def _joined(parts: list[Pictures]) -> Pictures:
    return Pictures(*(torch.cat(column) for column in zip(*parts, strict=True)))
