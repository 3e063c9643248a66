"""Pipeline: from a model and its colours to pictures - sampling, and completion of images given in part."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from igpt_fast import image as images_module
from igpt_fast.checks import check_count
from igpt_fast.draws import Sampling
from igpt_fast.engines.decoder import check_dtype
from igpt_fast.engines.memory import cache_bytes, most_images
from igpt_fast.files import BUNDLED
from igpt_fast.image import ImageGPTImageProcessor
from igpt_fast.model import ImageGPTForCausalImageModeling
from igpt_fast.sampling.inpainting import following, given_pixels
from igpt_fast.sampling.inpainting import kept_rows as kept_rows
from igpt_fast.sampling.results import Generation as Generation
from igpt_fast.sampling.results import InterruptedGeneration as InterruptedGeneration
from igpt_fast.sampling.rules import check_scale, check_seed
from igpt_fast.sampling.streaming import MAX_CANDIDATES, Pictures, Progress, Stream, Task
from igpt_fast.sampling.streaming import RowEvent as RowEvent

CACHE_BUDGET = 1 << 30  # bytes of key/value cache that the default batch size may take
MAX_IMAGES = 1 << 24  # of one call
MAX_FIRST = 1 << 30  # index of its first one
INPUT_EDGE = 1024  # pixels; larger inputs of completions are kept at this size, for the grid

Labels = int | Sequence[int] | Tensor | None


class Options(TypedDict, total=False):
    """What ``Pipeline.sample`` and its siblings all take; described there."""

    seed: int | None
    batch_size: int | None
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    labels: Labels
    cfg_scale: float
    dtype: str | None
    progress: Progress | None


class Pipeline:
    """A model with its colours, ready to make pictures.

    Args:
        model: The model.
        processor: Colours and size; they must be the model's.

    Raises:
        ValueError: The processor has another number of colours or pixels than the model.
    """

    def __init__(self, model: ImageGPTForCausalImageModeling, processor: ImageGPTImageProcessor) -> None:
        if model.newly_initialized:
            raise ValueError(f"the checkpoint has no {', '.join(model.newly_initialized)}: it cannot predict colours")
        colours = 0 if processor.clusters is None else len(processor.clusters)
        pixels = processor.height * processor.width
        if colours != model.config.n_colours:
            raise ValueError(f"the processor has {colours} colours, the model {model.config.n_colours}")
        if pixels != model.config.n_positions:
            raise ValueError(
                f"the processor's images have {processor.height}x{processor.width} = {pixels} pixels,"
                f" the model {model.config.n_positions}"
            )
        # Settings that leave no tokens of this size, or none that can be turned back, show on a single image.
        probe = processor(Image.new("RGB", (3, 2)), return_tensors="pt")
        if "input_ids" not in probe or probe["input_ids"].shape != (1, pixels):
            raise ValueError("the processor's settings do not turn every image into the model's tokens")
        processor.decode(probe["input_ids"])
        self.model = model.eval()
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> Pipeline:
        """Loads a model and its processor.

        Args:
            name_or_dir: A directory or a hub id; ``None`` is the bundled model, 16x16 emoji in 128 colours.
            device: ``None`` takes ``cuda`` where torch has it, else ``cpu``.
            dtype: ``None`` is float32, whatever the checkpoint is stored in; ``"auto"`` is that.
            options: ``revision``, ``cache_dir``, ``local_files_only``, ``token``, ``subfolder``, as in
                ``ImageGPTForCausalImageModeling.from_pretrained``.

        Raises:
            FileNotFoundError, ValueError: As that; or a checkpoint without a head, or a processor that does not fit.
        """
        source = BUNDLED if name_or_dir is None else name_or_dir
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = ImageGPTForCausalImageModeling.from_pretrained(
            source, device=device, dtype=torch.float32 if dtype is None else dtype, **options
        )
        processor = ImageGPTImageProcessor.from_pretrained(source, **options)
        try:
            return cls(model, processor)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    def default_batch_size(
        self, dtype: str | None = None, primer: int = 0, copies: int = 1, guided: bool = False
    ) -> int:
        """How many images are computed together: as many as the memory of a CUDA device has room for, 256 at most;
        elsewhere as many as have their key/value caches in 1 GiB, 64 at most.

        Args:
            dtype, primer, copies: As in ``decoders.cache_bytes``.
            guided: Whether each has a second cache, of the context without a class.
        """
        room, most = most_images(self.model, dtype, max(primer, 1), copies), 256
        if room is None:
            room, most = CACHE_BUDGET // cache_bytes(self.model, dtype, primer, copies), 64
        return min(most, max(1, room // 2 if guided else room))

    def sample(
        self,
        n: int = 1,
        *,
        seed: int | None = None,
        batch_size: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        labels: Labels = None,
        cfg_scale: float = 1.0,
        first: int = 0,
        dtype: str | None = None,
        progress: Progress | None = None,
    ) -> Generation:
        """Draws images.

        Image i is drawn from a stream of its own, made of (seed, first + i): the batch size changes which images are
        computed together, not the numbers they are drawn with. With the cpu engine, in float32, it changes nothing: the
        images are the same bit for bit. Elsewhere it can change the rounding of the logits, and a draw differs when its
        number falls into that rounding: in bfloat16 between one image at a time and several, in int8 on processors
        without VNNI, on a GPU, and wherever a primer of completions is read, by a matrix product that rounds by its
        size.

        Args:
            n: How many.
            seed: 0..2^64-1; ``None`` draws one from torch's global generator. The result tells it.
            batch_size: Images computed together at most; ``None`` see ``default_batch_size``. Where memory does not
                suffice it is halved, with a warning.
            temperature, top_k, top_p, min_p: See ``Sampling``.
            labels: The class of all images, or of each, for a model that has classes; ``None`` draws without.
            cfg_scale: Scale of classifier-free guidance, see ``Guidance``; needs labels. 1 is none; above, images
                are more like their class and less like each other, at twice the work.
            first: Index of the first image: ``sample(4)`` is ``sample(2)`` and then ``sample(2, first=2)``.
            dtype: ``"int8"`` draws with weights and cache rounded to 8 bits, faster and a little less exact (on the
                CPU; see ``decoders.CpuDecoder``); ``"fp8_values"`` with cached values of 8 bits (on a GPU, of models in
                bfloat16 or float16; see ``decoders.CudaDecoder``). ``None`` draws in the model's own dtype.
            progress: Called with the number of pixels drawn so far and in all.

        Raises:
            BackendUnavailableError: Nothing here decodes this model in ``dtype``.
            FloatingPointError: The model's logits are not finite: NaN or infinity in its weights, or an overflow.
            MemoryError, RuntimeError: Memory does not suffice for a single image.
            TypeError: Labels that are not integers.
            ValueError: A value out of its range, or labels for a model without classes.
            InterruptedGeneration: On Ctrl-C.
        """
        options = Options(
            seed=seed,
            batch_size=batch_size,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            labels=labels,
            cfg_scale=cfg_scale,
            dtype=dtype,
            progress=progress,
        )
        return _drained(self.stream(n, first=first, **options))

    def stream(self, n: int = 1, *, first: int = 0, **options: Unpack[Options]) -> Stream:
        """``sample``, row by row: an iterator of ``RowEvent``, whose ``result`` is what ``sample`` returns.

        Args:
            n, first, options: As of ``sample``.

        Raises:
            TypeError, ValueError: As ``sample``, here already; what else it raises, the iterator does.
        """
        check_count("n", n, MAX_IMAGES)
        check_count("first", first, MAX_FIRST, least=0)
        known = torch.full((1, 1), -1).expand(n, self.model.config.n_positions)
        labels = self._labels(options.get("labels"), n, "n")
        task = self._task(known, labels, 1, torch.arange(first, first + n), 1, options)
        settings = {"first": first} if first else {}

        def collect(drawn: Pictures, stream: Stream) -> Generation:
            count = len(drawn.tokens)
            return Generation(
                drawn.tokens,
                drawn.logprobs,
                self.processor,
                task.seed,
                self._settings(task, stream, settings),
                labels=None if labels is None else labels[:count],
            )

        return self._stream(task, collect, options)

    def complete(
        self,
        images: Any,
        *,
        keep: Any = 0.5,
        n: int = 4,
        candidates: int = 1,
        seed: int | None = None,
        batch_size: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        labels: Labels = None,
        cfg_scale: float = 1.0,
        first_input: int = 0,
        dtype: str | None = None,
        progress: Progress | None = None,
    ) -> Generation:
        """Draws the pixels of images that are not kept: what is below their upper part, or where a mask says so.

        Args:
            images: An image or several, of any size and kind that ``to_rgb`` takes, or paths of files; the middle is
                cut out in the model's aspect, then resized to its size.
            keep: What is given. A float in [0, 1): this fraction of the rows, rounded to whole ones. An integer: so
                many rows. A bool array, (height, width) or one such for each image, at the model's size: the pixels
                where it is true, anywhere. Images are drawn in raster order with these clamped; what is drawn does
                not know of given pixels that follow, unless there are ``candidates``.
            n: Completions of each image; completion j of image i has a stream made of (seed, first_input + i, j).
                Those that are computed together share what is computed of the primer, the pixels that all images
                have given before the first drawn one.
            candidates: Draws so many for each completion and takes one by the likelihood of the given pixels that
                follow, 1..256; see ``inpainting`` for what this approximates, and how well
                (``Generation.effective_sample_size``). The work is so many times as much.
            labels: The class of all images, or one for each of ``images``.
            first_input: Index of the first image, as ``first`` of ``sample``.
            seed, batch_size, temperature, top_k, top_p, min_p, cfg_scale, dtype, progress: As in ``sample``.

        Returns:
            ``len(images) * n`` images, those of the first input first.

        Raises:
            BackendUnavailableError: Nothing here decodes this model in ``dtype``.
            FloatingPointError: The model's logits are not finite: NaN or infinity in its weights, or an overflow.
            MemoryError, RuntimeError: Memory does not suffice for a single image.
            TypeError, ValueError: Something that is not an image, a value out of its range, or candidates where no
                given pixel follows a drawn one, or that are all the same as of temperature 0.
            InterruptedGeneration: On Ctrl-C.
        """
        options = Options(
            seed=seed,
            batch_size=batch_size,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            labels=labels,
            cfg_scale=cfg_scale,
            dtype=dtype,
            progress=progress,
        )
        stream = self.stream_complete(images, keep=keep, n=n, candidates=candidates, first_input=first_input, **options)
        return _drained(stream)

    def stream_complete(
        self,
        images: Any,
        *,
        keep: Any = 0.5,
        n: int = 4,
        candidates: int = 1,
        first_input: int = 0,
        **options: Unpack[Options],
    ) -> Stream:
        """``complete``, row by row: an iterator of ``RowEvent``, whose ``result`` is what ``complete`` returns.

        Rows that are given come first, without work. Of candidates the rows come when one of them has been taken.

        Args:
            images, keep, n, candidates, first_input, options: As of ``complete``.

        Raises:
            TypeError, ValueError: As ``complete``, here already; what else it raises, the iterator does.
        """
        check_count("n", n, MAX_IMAGES)
        check_count("candidates", candidates, MAX_CANDIDATES)
        check_count("first_input", first_input, MAX_FIRST, least=0)
        height, width = self.processor.height, self.processor.width
        items = _as_list(images)
        given = given_pixels(keep, len(items), height, width)
        _check_candidates(candidates, given, options.get("temperature", 1.0))
        labels = self._labels(options.get("labels"), len(items), "images")
        crops, originals = self._read(items)
        # From 1 on: completion j of the first image is not drawn with the numbers of sample j.
        streams = (torch.arange(1, len(crops) + 1)[:, None] + first_input << 32) + torch.arange(n)
        known = originals.masked_fill(~given, -1)
        task = self._task(known, labels, n, streams.flatten(), candidates, options)
        settings: dict[str, Any] = {"n": n} if isinstance(keep, int | float) else {"keep": "mask", "n": n}
        if isinstance(keep, int | float):
            settings = {"keep": keep, "rows": task.primer // width, "n": n}
        if candidates > 1:
            settings["candidates"] = candidates
        if first_input:
            settings["first_input"] = first_input

        def collect(drawn: Pictures, stream: Stream) -> Generation:
            count = len(drawn.tokens)
            each = torch.arange(count) // n
            return Generation(
                drawn.tokens,
                drawn.logprobs.masked_fill(given[each], torch.nan),
                self.processor,
                task.seed,
                self._settings(task, stream, settings),
                inputs=crops[: count // n],
                originals=originals[: count // n],
                given=task.primer,
                known=given[: count // n],
                known_logprobs=drawn.logprobs.masked_fill(~following(given)[each], torch.nan),
                effective_sample_size=drawn.sizes if candidates > 1 else None,
                labels=None if labels is None else labels[each],
            )

        return self._stream(task, collect, options)

    def _read(self, items: Sequence[Any]) -> tuple[list[Image.Image], Tensor]:
        """Inputs of completions, cropped to the model's aspect, and their (M, T) tokens."""
        crops, tokens = [], []
        for item in items:
            opened = images_module.open_image(item) if isinstance(item, str | os.PathLike) else item
            crop = images_module.center_crop(opened, self.processor.width / self.processor.height)
            tokens.append(self.processor(crop, return_tensors="pt")["input_ids"])
            crop.thumbnail((INPUT_EDGE, INPUT_EDGE))
            crops.append(crop)
        return crops, torch.cat(tokens)

    def _labels(self, labels: Labels, count: int, what: str) -> Tensor | None:
        """(count,) int64 classes."""
        if labels is None:
            return None
        n_classes = self.model.config.n_classes
        if n_classes == 0:
            raise ValueError("labels are given, but the model has no classes")
        single = isinstance(labels, int | np.integer) or (isinstance(labels, Tensor) and labels.ndim == 0)
        try:
            each = [operator.index(label) for label in ([labels] * count if single else labels)]  # type: ignore
        except TypeError as error:
            raise TypeError(f"labels is {labels!r}; want an integer, or one for each of {what}") from error
        if len(each) != count:
            raise ValueError(f"labels has {len(each)} entries; want an integer, or one for each of {count} {what}")
        if wrong := [label for label in each if not 0 <= label < n_classes]:
            raise ValueError(f"label {wrong[0]} is not in 0..{n_classes - 1}")
        return torch.tensor(each, dtype=torch.int64)

    def _task(
        self, known: Tensor, labels: Tensor | None, n: int, streams: Tensor, candidates: int, options: Options
    ) -> Task:
        """The options checked, and with their defaults."""
        seed, dtype, scale = options.get("seed"), options.get("dtype"), options.get("cfg_scale", 1.0)
        check_dtype(dtype)
        check_scale("cfg_scale", scale)
        if scale != 1.0 and labels is None:
            raise ValueError("cfg_scale has no effect without labels: there is no class to be guided to")
        config = self.model.config
        # Behind the colours stand the classes, behind these SOS.
        begins = torch.full((1,), config.sos_token_id).expand(len(known))
        if labels is not None:
            begins = labels + self.model.config.n_colours
        sampling = Sampling(
            options.get("temperature", 1.0), options.get("top_k"), options.get("top_p"), options.get("min_p")
        )
        return Task(
            known,
            begins,
            n,
            streams,
            int(torch.randint(0, 1 << 62, ())) if seed is None else check_seed(seed),
            sampling,
            candidates,
            scale,
            dtype,
            self.processor.width,
        )

    def _stream(self, task: Task, collect: Callable[[Pictures, Stream], Generation], options: Options) -> Stream:
        batch_size = options.get("batch_size")
        if batch_size is None:
            batch_size = self.default_batch_size(task.dtype, task.primer + 1, task.copies, task.scale != 1.0)
        check_count("batch_size", batch_size)
        return Stream(self.model, task, batch_size, collect, options.get("progress"))

    def _settings(self, task: Task, stream: Stream, more: dict[str, Any]) -> dict[str, Any]:
        """How images were drawn, as plain values."""
        return {
            **more,
            "temperature": task.sampling.temperature,
            "top_k": task.sampling.top_k,
            "top_p": task.sampling.top_p,
            "min_p": task.sampling.min_p,
            "cfg_scale": task.scale,
            "batch_size": stream.batch_size,
            "device": str(self.device),
            "engine": stream.engine,
            **({} if stream.engine_reason is None else {"engine_reason": stream.engine_reason}),
            "dtype": task.dtype or str(self.model.dtype).removeprefix("torch."),
        }


def _drained(stream: Stream) -> Generation:
    for _ in stream:
        pass
    return stream.result


def _check_candidates(candidates: int, given: Tensor, temperature: float) -> None:
    if candidates == 1:
        return
    if not bool(following(given).any()):
        raise ValueError(
            f"candidates is {candidates}, but no given pixel follows a drawn one, by which to choose among them"
        )
    if temperature == 0.0:
        raise ValueError(f"candidates is {candidates}, but at temperature 0 they are all the same")


def _as_list(images: Any) -> Sequence[Any]:
    """Images as a sequence of single ones."""
    single = isinstance(images, Image.Image | str | os.PathLike)
    if single or (isinstance(images, np.ndarray | Tensor) and images.ndim <= 3):
        return [images]
    items = list(images)
    if not items:
        raise ValueError("images is empty; want at least one")
    return items
