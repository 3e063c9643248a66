"""Pipeline: a model and its colours - sampling, completion of images given in part, and scores of whole ones."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import fields
from numbers import Integral
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from igpt_fast.checks import dtype_name, true_or_false, whole_number
from igpt_fast.draws import MAX_IMAGES, PLAIN, Sampling, check_scale, check_seed
from igpt_fast.engines.decoder import check_dtype
from igpt_fast.engines.memory import cache_bytes, most_images
from igpt_fast.files import BUNDLED, listed, shown
from igpt_fast.image import ImageGPTImageProcessor
from igpt_fast.image.reading import FITS
from igpt_fast.likelihood.scores import InterruptedScoring as InterruptedScoring
from igpt_fast.likelihood.scores import Scores as Scores
from igpt_fast.likelihood.scoring import read_images, score_tokens
from igpt_fast.model import ImageGPTForCausalImageModeling
from igpt_fast.sampling.inpainting import following, given_pixels
from igpt_fast.sampling.inpainting import kept_rows as kept_rows
from igpt_fast.sampling.request import MAX_CANDIDATES, MAX_FIRST, Request
from igpt_fast.sampling.results import Generation as Generation
from igpt_fast.sampling.results import InterruptedGeneration as InterruptedGeneration
from igpt_fast.sampling.results import NotFiniteError as NotFiniteError
from igpt_fast.sampling.streaming import Progress, Stream
from igpt_fast.sampling.streaming import RowEvent as RowEvent

CACHE_BUDGET = 1 << 30  # bytes of key/value cache that the default batch size may take

Labels = int | Sequence[int] | Tensor | None


class Options(TypedDict, total=False):
    """What ``Pipeline.sample`` and its siblings all take, as keywords; described at ``sample``."""

    seed: int | None
    batch_size: int | None
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    labels: Labels
    cfg_scale: float
    dtype: str | None
    speculate: bool
    progress: Progress | None


class Pipeline:
    """A model with its colours, ready to make pictures.

    Args:
        model: The model.
        processor: Colours and size; they must be the model's.

    Raises:
        TypeError: Something else than these; names are for ``from_pretrained``.
        ValueError: The processor has another number of colours or pixels than the model, or the model is bidirectional.
    """

    def __init__(self, model: ImageGPTForCausalImageModeling, processor: ImageGPTImageProcessor) -> None:
        if not (isinstance(model, torch.nn.Module) and isinstance(processor, ImageGPTImageProcessor)):
            got = f"{type(model).__name__} and {type(processor).__name__}"
            load = f"Pipeline.from_pretrained({shown(model) if isinstance(model, str) else 'NAME_OR_DIRECTORY'})"
            raise TypeError(f"Pipeline takes a model and its ImageGPTImageProcessor, got {got}; {load} loads both")
        if model.newly_initialized:
            raise ValueError(f"the checkpoint has no {', '.join(model.newly_initialized)}: it cannot predict colours")
        model.config.check_causal("Pipeline")
        colours = 0 if processor.clusters is None else len(processor.clusters)
        pixels = processor.height * processor.width
        if colours != model.config.n_colours:
            raise ValueError(f"the processor has {colours} colours, the model {model.config.n_colours}")
        if pixels != model.config.n_positions:
            size = f"{processor.height}x{processor.width} = {pixels} pixels"
            raise ValueError(f"the processor's images have {size}, the model {model.config.n_positions}")
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
        dtype = torch.float32 if dtype is None else dtype
        model = ImageGPTForCausalImageModeling.from_pretrained(source, device=device, dtype=dtype, **options)
        processor = ImageGPTImageProcessor.from_pretrained(source, **options)
        try:
            return cls(model, processor)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    def __repr__(self) -> str:
        config, size = self.model.config, f"{self.processor.height}x{self.processor.width}"
        classes = f", {config.n_classes} classes" if config.n_classes else ""
        parameters = f"{self.model.num_parameters() / 1e6:.2f} M parameters"
        where = f"{dtype_name(self.model.dtype)} on {self.device}"
        return f"Pipeline({size} pixels of {config.n_colours} colours{classes}; {parameters}, {where})"

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    def default_batch_size(
        self, dtype: str | None = None, primer: int = 0, copies: int = 1, guided: bool = False
    ) -> int:
        """How many images are computed together: as many as the memory of a CUDA device has room for; elsewhere as many
        as have their key/value caches in 1 GiB, 64 at most.

        Args:
            dtype, primer, copies: As in ``engines.memory.cache_bytes``.
            guided: Whether each has a second cache, of the context without a class.
        """
        room = most_images(self.model, dtype, max(primer, 1), copies)
        if room is not None:
            return max(1, room // 2 if guided else room)
        room = CACHE_BUDGET // cache_bytes(self.model, dtype, primer, copies)
        return min(64, max(1, room // 2 if guided else room))

    def sample(self, n: int = 1, *, first: int = 0, **options: Unpack[Options]) -> Generation:
        """Draws images.

        Image i is drawn from a stream of its own, made of (seed, first + i): the batch size changes which images are
        computed together, not the numbers they are drawn with. With the cpu engine, in float32, it changes nothing: the
        images are the same bit for bit. Elsewhere it can change the rounding of the logits, and a draw differs when its
        number falls into that rounding: in bfloat16 between one image at a time and several, in int8 on processors
        without VNNI, on a GPU, and wherever a primer of completions is read, by a matrix product that rounds by its
        size.

        Args:
            n: How many.
            first: Index of the first image: ``sample(4)`` is ``sample(2)`` and then ``sample(2, first=2)``.
            seed: 0..2^64-1; ``None`` draws one from torch's global generator. The result tells it.
            batch_size: Images computed together at most; ``None`` see ``default_batch_size``. Where memory does not
                suffice it is halved, with a warning.
            temperature, top_k, top_p, min_p: See ``Sampling``.
            labels: The class of all images, or of each, for a model that has classes; ``None`` draws without.
            cfg_scale: Scale of classifier-free guidance, see ``Guidance``; needs labels. 1 is none; above, images
                are more like their class and less like each other, at twice the work.
            dtype: ``"int8"`` draws with weights and cache rounded to 8 bits, faster and a little less exact (on the
                CPU; see ``CpuDecoder``); ``"fp8_values"`` with cached values of 8 bits, ``"fp8_cache"`` with keys as
                well (on a GPU, of models in bfloat16 or float16; see ``CudaDecoder``). ``None`` draws in the model's
                own dtype.
            speculate: Whether an image that is drawn alone is guessed ahead: the same image, sooner where pixels can be
                foreseen, up to 8 % later where none can; see ``sampling.speculation``. On the CPU, in float32 and
                int8; ``settings["kept_per_step"]`` of the result has the pixels that a step gave.
            progress: Called with the number of pixels drawn so far and in all.

        Raises:
            BackendUnavailableError: Nothing here decodes this model in ``dtype``.
            NotFiniteError: A FloatingPointError: the model's logits are not finite, of NaN or infinity in its weights
                or an overflow. Its ``partial`` has the images that were finished, or ``None``.
            MemoryError, RuntimeError: Memory does not suffice for a single image.
            TypeError: Labels that are not integers, or a keyword that is none.
            ValueError: A value out of its range, or labels for a model without classes.
            InterruptedGeneration: On Ctrl-C.
        """
        return self.stream(n, first=first, **options).drained()

    def stream(self, n: int = 1, *, first: int = 0, **options: Unpack[Options]) -> Stream:
        """``sample``, row by row: an iterator of ``RowEvent``, whose ``result`` is what ``sample`` returns.

        Args:
            n, first, options: As of ``sample``.

        Raises:
            TypeError, ValueError: As ``sample``, here already; what else it raises, the iterator does.
        """
        return self._begun(options, n=n, first=first)

    def complete(
        self,
        images: Any,
        *,
        keep: Any = 0.5,
        n: int = 4,
        candidates: int = 1,
        fit: str = "crop",
        first_input: int = 0,
        **options: Unpack[Options],
    ) -> Generation:
        """Draws the pixels of images that are not kept: what is below their upper part, or where a mask says so.

        Args:
            images: An image or several, of any size and kind that ``to_rgb`` takes, or paths of files; brought to the
                model's aspect as ``fit`` says, then resized to its size.
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
            fit: ``"crop"`` takes the middle of an image, ``"pad"`` all of it with white around, ``"stretch"`` all of
                it, squeezed.
            labels: The class of all images, or one for each of ``images``.
            first_input: Index of the first image, as ``first`` of ``sample``.
            seed, batch_size, temperature, top_k, top_p, min_p, cfg_scale, dtype, speculate, progress: As in
                ``sample``.

        Returns:
            ``len(images) * n`` images, those of the first input first.

        Raises:
            BackendUnavailableError, NotFiniteError, MemoryError, RuntimeError, InterruptedGeneration: As ``sample``.
            TypeError, ValueError: Something that is not an image, a value out of its range, or candidates where no
                given pixel follows a drawn one, or that are all the same as of temperature 0.
        """
        given: dict[str, Any] = {"keep": keep, "n": n, "candidates": candidates, "fit": fit, "first_input": first_input}
        return self.stream_complete(images, **given, **options).drained()

    def stream_complete(
        self,
        images: Any,
        *,
        keep: Any = 0.5,
        n: int = 4,
        candidates: int = 1,
        fit: str = "crop",
        first_input: int = 0,
        **options: Unpack[Options],
    ) -> Stream:
        """``complete``, row by row: an iterator of ``RowEvent``, whose ``result`` is what ``complete`` returns.

        Rows that are given come first, without work. Of candidates the rows come when one of them has been taken.

        Args:
            images, keep, n, candidates, fit, first_input, options: As of ``complete``.

        Raises:
            TypeError, ValueError: As ``complete``, here already; what else it raises, the iterator does.
        """
        inputs = _as_list(images)
        given: dict[str, Any] = {"keep": keep, "n": n, "candidates": candidates, "fit": fit, "first": first_input}
        return self._begun(options, images=inputs, **given)

    def score(
        self,
        images: Any,
        labels: Labels = None,
        batch_size: int | None = None,
        progress: Progress | None = None,
        *,
        names: Sequence[str] | None = None,
        dtype: str | None = None,
    ) -> Scores:
        """How unusual the model finds images: the nats of every pixel, and what follows from them.

        Args:
            images: As ``complete`` takes them; the middle is cut out in the model's aspect, then resized to its size.
            labels: The class of all images, or of each, for a model that has classes; ``None`` scores without.
            batch_size: Images computed together; ``None`` see ``scoring.default_batch_size``. Halved where memory does
                not suffice, with a warning.
            progress: Called with the number of images scored so far and in all.
            names: What the images are called; paths have their own, others are numbered.
            dtype: ``"int8"`` computes the network in 8 bits, faster and a little less exact, on the CPU; see
                ``engines.cpu.forward``. ``None`` in the model's dtype.

        Raises:
            BackendUnavailableError: Nothing here computes this model in ``dtype``.
            NotFiniteError: The model's logits are not finite; its ``partial`` has the scores of finished batches.
            MemoryError, RuntimeError: Memory does not suffice for a single image.
            OSError, TypeError, ValueError: Something that is not an image, or a value out of its range.
            InterruptedScoring: On Ctrl-C; its ``partial`` has the same.
        """
        inputs = _as_list(images)
        self._check_scoring(len(inputs), labels, batch_size, names)
        read = read_images(inputs, self.processor)
        for item in read:
            if isinstance(item, Exception):
                raise item
        if names is None:
            paths = isinstance(inputs, list) and all(isinstance(item, str | os.PathLike) for item in inputs)
            names = [os.fspath(item) if paths else str(i) for i, item in enumerate(inputs)]
        tokens = torch.stack([item for item in read if isinstance(item, Tensor)])
        return self.score_tokens(tokens, labels, batch_size, progress, names=names, dtype=dtype)

    def score_tokens(
        self,
        tokens: Tensor,
        labels: Labels = None,
        batch_size: int | None = None,
        progress: Progress | None = None,
        *,
        names: Sequence[str] | None = None,
        dtype: str | None = None,
    ) -> Scores:
        """``score`` of images that are tokens already: (N, T) integers in 0..K-1, of the pipeline's palette."""
        config = self.model.config
        if not isinstance(tokens, Tensor):
            raise TypeError(f"tokens must be a tensor, got {type(tokens).__name__}")
        numbers = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
        if tokens.ndim != 2 or tokens.shape[1] != config.n_positions or not numbers or not len(tokens):
            got = f"{tuple(tokens.shape)} {tokens.dtype}"
            raise ValueError(f"tokens must be (N, {config.n_positions}) integers, got {got}")
        tokens = tokens.long().cpu()  # first: torch compares no uint16
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= config.n_colours:
            raise ValueError(f"token {low if low < 0 else high} is not in 0..{config.n_colours - 1}")
        names = [str(i) for i in range(len(tokens))] if names is None else names
        classes = self._check_scoring(len(tokens), labels, batch_size, names)
        return score_tokens(self.model, self.processor, tokens, names, classes, batch_size, progress, dtype)

    def _check_scoring(
        self, count: int, labels: Labels, batch_size: int | None, names: Sequence[str] | None
    ) -> Tensor | None:
        """The classes of ``count`` images; fails where ``score`` cannot do with what it is given beside them."""
        if names is not None and len(names) != count:
            raise ValueError(f"{len(names)} names for {count} images")
        if batch_size is not None:
            whole_number("batch_size", batch_size)
        return self.checked_labels(labels, count, "images")

    def request(
        self,
        n: int = 1,
        *,
        images: Sequence[Any] | None = None,
        keep: Any = 0.5,
        candidates: int = 1,
        first: int = 0,
        labels: Labels = None,
        seed: int | None = None,
        batch_size: int | None = None,
        sampling: Sampling = PLAIN,
        cfg_scale: float = 1.0,
        dtype: str | None = None,
        speculate: bool = True,
        fit: str = "crop",
    ) -> Request:
        """What ``sample`` is to draw, or, of ``images``, ``complete``: checked, and no image read.

        Args:
            n, keep, candidates, labels, seed, batch_size, cfg_scale, dtype, speculate, fit: As of those.
            images: Each one an image or a path.
            first: Index of the first image, or input.
            sampling: How colours are drawn.

        Raises:
            TypeError, ValueError: As those.
        """
        n = whole_number("n", n, 1, MAX_IMAGES)
        candidates = whole_number("candidates", candidates, 1, MAX_CANDIDATES)
        first = whole_number("first" if images is None else "first_input", first, 0, MAX_FIRST)
        batch_size = None if batch_size is None else whole_number("batch_size", batch_size)
        check_dtype(dtype)
        if fit not in FITS:
            raise ValueError(f"fit is {shown(fit)}; want one of {', '.join(FITS)}")
        scale = check_scale("cfg_scale", cfg_scale)
        height, width = self.processor.height, self.processor.width
        given = torch.zeros((1, 1), dtype=torch.bool, device="cpu").expand(n, height * width)
        if images is not None:
            given = given_pixels(keep, len(images), height, width)
        if candidates > 1 and not bool(following(given).any()):
            why = "no given pixel follows a drawn one, by which to choose among them"
            raise ValueError(f"candidates is {candidates}, but {why}")
        if candidates > 1 and sampling.temperature == 0.0:
            raise ValueError(f"candidates is {candidates}, but at temperature 0 they are all the same")
        if scale != 1.0 and labels is None:
            raise ValueError("cfg_scale has no effect without labels: there is no class to be guided to")
        classes = self.checked_labels(labels, len(given), "n" if images is None else "images")
        seed = int(torch.randint(0, 1 << 62, (), device="cpu")) if seed is None else check_seed(seed)
        kept = None  # of a mask
        if not isinstance(keep, np.ndarray | Tensor | list):
            kept = int(keep) if isinstance(keep, Integral) else float(keep)
        each = 1 if images is None else n
        return Request(
            *(height, width, given, images, kept, classes, each, candidates, first),
            *(seed, sampling, scale, batch_size, dtype, true_or_false("speculate", speculate), fit),
        )

    def start(self, request: Request, progress: Progress | None = None) -> Stream:
        """Reads the images of a request of this pipeline, if it has some; draws as the stream is followed.

        Raises:
            OSError, TypeError, ValueError: Something that is not an image.
        """
        size = request.batch_size
        if size is None:
            size = self.default_batch_size(request.dtype, request.primer + 1, request.copies, request.scale != 1.0)
        return Stream(self.model, self.processor, request, size, progress)

    def _begun(self, options: Options, **request: Any) -> Stream:
        """The stream of a call: its keywords, of which those of the draw become one object."""
        if unknown := options.keys() - Options.__annotations__.keys():
            raise TypeError(f"unexpected keyword {listed(unknown)}; want some of {', '.join(Options.__annotations__)}")
        rest: dict[str, Any] = dict(options)
        progress = rest.pop("progress", None)
        draw = {field.name: rest.pop(field.name) for field in fields(Sampling) if field.name in rest}
        return self.start(self.request(sampling=Sampling(**draw), **request, **rest), progress)

    def checked_labels(self, labels: Labels, count: int, what: str) -> Tensor | None:
        """(count,) int64 classes; TypeError or ValueError where they are none of the model's."""
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
        return torch.tensor(each, dtype=torch.int64, device="cpu")


def _as_list(images: Any) -> Sequence[Any]:
    """Images as a sequence of single ones."""
    single = isinstance(images, Image.Image | str | os.PathLike)
    if single or (isinstance(images, np.ndarray | Tensor) and images.ndim <= 3):
        return [images]
    items = list(images)
    if not items:
        raise ValueError("images is empty; want at least one")
    return items
