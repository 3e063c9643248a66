"""Scoring: pictures read by several threads, then their likelihoods, fewer at a time where memory does not suffice."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from igpt_fast.image import ImageGPTImageProcessor, center_crop, open_image
from igpt_fast.interrupts import delayed_interrupt
from igpt_fast.likelihood.nats import evaluating, image_nats
from igpt_fast.likelihood.scores import InterruptedScoring, Scores, model_hash, select
from igpt_fast.likelihood.transfer import Arriving, one_ahead, sent
from igpt_fast.model import ImageGPTForCausalImageModeling
from igpt_fast.sampling.batches import Batches
from igpt_fast.sampling.results import NotFiniteError

Progress = Callable[[int, int], None]
BUDGET = 1 << 30  # bytes of activations that the default batch size may take
_READ_AT_ONCE = 256  # pictures that are given to the threads together; Ctrl-C waits for them
_THREADS = 4


def read_images(
    images: Sequence[Any], processor: ImageGPTImageProcessor, tick: Callable[[int], None] | None = None
) -> list[Tensor | Exception]:
    """The (T,) int64 tokens of each image, or why it is none: the middle is cut out in the model's aspect, and resized.

    ``tick`` is called with how many have been read.
    """
    aspect = processor.width / processor.height

    def read(item: Any) -> Tensor | Exception:
        try:
            opened = open_image(item) if isinstance(item, str | os.PathLike) else item
            return processor(center_crop(opened, aspect), return_tensors="pt")["input_ids"][0]
        except (OSError, TypeError, ValueError) as error:
            return error

    found: list[Tensor | Exception] = []
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for start in range(0, len(images), _READ_AT_ONCE):
            found += pool.map(read, images[start : start + _READ_AT_ONCE])
            if tick is not None:
                tick(len(found))
    return found


def default_batch_size(model: ImageGPTForCausalImageModeling) -> int:
    """How many images are computed together: as many as have their activations in 1 GiB, 64 at most."""
    config = model.config
    pixel = max(model.dtype.itemsize, 2) * (12 * config.n_embd + 2 * config.inner)  # bytes, generously
    return max(1, min(64, BUDGET // (pixel * config.n_positions)))


def score_tokens(
    model: ImageGPTForCausalImageModeling,
    processor: ImageGPTImageProcessor,
    tokens: Tensor,
    names: Sequence[str],
    labels: Tensor | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    dtype: str | None = None,
) -> Scores:
    """Scores of (N, T) tokens; ``labels``: (N,) int64; see ``Pipeline.score``."""
    nats = torch.empty(tokens.shape, dtype=torch.float32, device="cpu")
    scores = Scores(nats, tokens, processor, list(names), model_hash(model), labels)
    batches = Batches(len(tokens), 1, batch_size or default_batch_size(model))
    coming: list[tuple[int, int, Arriving]] = []
    done = 0

    def work(start: int, stop: int, _: int) -> Iterator[None]:
        given = None if labels is None else sent(labels[start:stop], model.device)
        found = image_nats(model, sent(tokens[start:stop], model.device), given, dtype)
        coming.append((start, stop, Arriving(found)))
        yield

    def take() -> None:
        nonlocal done
        start, stop, part = coming[0]
        nats[start:stop] = part.get()
        _check_finite(scores, start, stop)
        done = stop
        del coming[0]

    try:
        with evaluating(model), torch.inference_mode():
            for _ in one_ahead(batches.run(work), model.device):
                take()
                if progress is not None:
                    progress(done, len(tokens))
    except KeyboardInterrupt as error:
        with delayed_interrupt():  # a second one, or a third
            while coming:  # what the device has been given already
                take()
            raise InterruptedScoring(_first(scores, done)) from error
    return scores


def nothing(model: ImageGPTForCausalImageModeling, processor: ImageGPTImageProcessor, classes: bool = False) -> Scores:
    """The scores of no images, given ``classes`` or not, by which others can be known to be of this model."""
    none = torch.empty(0, processor.height * processor.width, dtype=torch.float32, device="cpu")
    labels = torch.empty(0, dtype=torch.int64, device="cpu") if classes else None
    return Scores(none, none.long(), processor, [], model_hash(model), labels)


def _check_finite(scores: Scores, start: int, stop: int) -> None:
    wrong = ~scores.nats[start:stop].isfinite()
    if bool(wrong.any()):
        row, t = wrong.nonzero()[0].tolist()
        what = "the model's weights, or what it computes in its dtype, hold NaN or infinity"
        where = f"{scores.names[start + row]}, pixel {t}"
        raise NotFiniteError(f"the logits are not finite ({where}): {what}", _first(scores, start))


def _first(scores: Scores, count: int) -> Scores | None:
    """Those of the first images; ``None`` of none."""
    return select(scores, range(count)) if count else None
