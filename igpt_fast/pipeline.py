"""Pipeline: from a model and its colours to pictures - sampling, and completion of images given in part."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from igpt_fast import image as images_module
from igpt_fast.decoders import cache_bytes, check_dtype
from igpt_fast.generation import Drawn, Sampling, check_count, check_seed, decode, stream_uniforms
from igpt_fast.image import ImageGPTImageProcessor
from igpt_fast.model import ImageGPTForCausalImageModeling

BUNDLED = Path(__file__).parent / "assets" / "emoji16"
CACHE_BUDGET = 1 << 30  # bytes of key/value cache that the default batch size may take
MAX_IMAGES = 1 << 24  # of one call
INPUT_EDGE = 1024  # pixels; larger inputs of completions are kept at this size, for the grid

Progress = Callable[[int, int], None]


@dataclass
class Generation:
    """Generated images, image-major: for completions, the ``n`` of the first input come first.

    Args:
        tokens: (N, T) int64 on the CPU, the given pixels included.
        logprobs: (N, T) float32 on the CPU, nats per pixel under the model itself, before temperature, top-k and
            top-p; NaN where the pixel was given.
        processor: Knows the colours and the size.
        seed: What the streams were made of.
        settings: Temperature and so on, as plain values.
        inputs: For completions, the (M) inputs as RGB images, cropped to the model's aspect.
        originals: For completions, (M, T) int64, the tokens of the whole inputs.
        given: For completions, how many pixels were given.
    """

    tokens: Tensor
    logprobs: Tensor
    processor: ImageGPTImageProcessor
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: list[Image.Image] | None = None
    originals: Tensor | None = None
    given: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def images(self) -> list[Image.Image]:
        """The N images, RGB, at the model's size."""
        return self.processor.decode(self.tokens)

    def grid(self, *, columns: int | None = None, scale: int | None = None) -> Image.Image:
        """All images in one.

        Args:
            columns: Images in a row; about square when ``None``. Completions have a row for each input instead:
                input, what was given of it, completions, and the original in the model's colours.
            scale: Edge of a pixel in the result; ``None`` makes an image 128 pixels high or wide.

        Raises:
            ValueError: A value out of its range, ``columns`` for completions, or a grid of too many pixels.
        """
        scale = self._scale(scale, columns)
        if self.inputs is None:
            return images_module.image_grid(self.images, columns, scale=scale, gap=scale)
        return self._completion_grid(self.tokens, scale)

    def save_grid(
        self,
        path: str | os.PathLike[str],
        *,
        columns: int | None = None,
        scale: int | None = None,
        overwrite: bool = True,
    ) -> None:
        """Writes ``grid`` to a file, whole or not at all; the suffix names the format.

        Raises:
            FileExistsError: The file exists and ``overwrite`` is false.
            ValueError: An unknown suffix.
        """
        images_module.save_image(self.grid(columns=columns, scale=scale), path, overwrite=overwrite)

    def save_gif(
        self,
        path: str | os.PathLike[str],
        *,
        columns: int | None = None,
        scale: int | None = None,
        frame_ms: int = 80,
        overwrite: bool = True,
    ) -> None:
        """Writes the grid being drawn, a row of pixels a frame, as ``.gif`` or ``.apng``.

        Args:
            path: The file.
            columns, scale: See ``grid``.
            frame_ms: Milliseconds a frame.
            overwrite: Whether an existing file may be replaced.

        Raises:
            FileExistsError: The file exists and ``overwrite`` is false.
            ValueError: An unknown suffix.
        """
        scale = self._scale(scale, columns)
        width = self.processor.width
        frames = []
        for drawn in range(self.given, self.tokens.shape[1] + 1, width):
            if self.inputs is None:
                cells = [self._partly(tokens, drawn) for tokens in self.tokens]
                frames.append(images_module.image_grid(cells, columns, scale=scale, gap=scale))
            else:
                frames.append(self._completion_grid(self.tokens, scale, drawn))
        images_module.save_animation(frames, path, frame_ms=frame_ms, overwrite=overwrite)

    def _scale(self, scale: int | None, columns: int | None) -> int:
        if columns is not None and self.inputs is not None:
            raise ValueError("columns is given, but completions have a row for each input")
        if scale is None:
            return max(1, 128 // max(self.processor.height, self.processor.width))
        return check_count("scale", scale, 64)

    def _partly(self, tokens: Tensor, drawn: int) -> Image.Image:
        """The image of (T,) tokens, light grey from pixel ``drawn`` on."""
        pixels = np.array(self.processor.decode(tokens[None])[0])
        pixels.reshape(-1, 3)[drawn:] = 224
        return Image.fromarray(pixels)

    def _completion_grid(self, tokens: Tensor, scale: int, drawn: int | None = None) -> Image.Image:
        assert self.inputs is not None
        assert self.originals is not None
        size = (self.processor.width * scale, self.processor.height * scale)
        per_input = len(tokens) // len(self.inputs)
        cells: list[Image.Image] = []
        for i, original in enumerate(self.originals):
            given = self._partly(original, self.given)
            completions = tokens[i * per_input : (i + 1) * per_input]
            pictures = [given]
            pictures += [self._partly(row, row.shape[0] if drawn is None else drawn) for row in completions]
            pictures += self.processor.decode(original[None])
            smaller = self.inputs[i].width <= self.processor.width  # its pixels are to be seen, as the others' are
            cells.append(self.inputs[i].resize(size, Image.Resampling.NEAREST if smaller else Image.Resampling.LANCZOS))
            cells += [picture.resize(size, Image.Resampling.NEAREST) for picture in pictures]
        return images_module.image_grid(cells, per_input + 3, gap=scale)


class InterruptedGeneration(KeyboardInterrupt):
    """Ctrl-C during a generation; ``partial`` holds the images that were finished, or ``None``."""

    def __init__(self, partial: Generation | None) -> None:
        super().__init__("interrupted")
        self.partial = partial


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

    def default_batch_size(self, dtype: str | None = None, primer: int = 0, copies: int = 1) -> int:
        """As many images as have their key/value caches in 1 GiB, 64 at most; arguments as in ``cache_bytes``."""
        return int(min(64, max(1, CACHE_BUDGET // cache_bytes(self.model, dtype, primer, copies))))

    def sample(
        self,
        n: int = 1,
        *,
        seed: int | None = None,
        batch_size: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        dtype: str | None = None,
        progress: Progress | None = None,
    ) -> Generation:
        """Draws images.

        Image i is drawn from a stream of its own, made of (seed, i): the batch size changes which images are
        computed together, not the numbers they are drawn with. (It can change the rounding of the logits: a draw
        differs when its number falls into that rounding, in float32 about one pixel in 10^6.)

        Args:
            n: How many.
            seed: 0..2^64-1; ``None`` draws one from torch's global generator. The result tells it.
            batch_size: Images computed together at most; ``None`` see ``default_batch_size``.
            temperature, top_k, top_p: See ``Sampling``.
            dtype: ``"int8"`` draws with weights and cache rounded to 8 bits, faster and a little less exact (on the
                CPU; see ``decoders.CpuDecoder``). ``None`` draws in the model's own dtype.
            progress: Called with the number of pixels drawn so far and in all.

        Raises:
            BackendUnavailableError: Nothing here decodes this model in ``dtype``.
            ValueError: A value out of its range.
            InterruptedGeneration: On Ctrl-C.
        """
        check_count("n", n, MAX_IMAGES)
        seed = _seed(seed)
        sampling = Sampling(temperature, top_k, top_p)
        given = torch.empty(n, 0, dtype=torch.int64)
        return self._run(given, torch.arange(n), seed, sampling, batch_size, dtype, progress)

    def complete(
        self,
        images: Any,
        *,
        keep: float = 0.5,
        n: int = 4,
        seed: int | None = None,
        batch_size: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        dtype: str | None = None,
        progress: Progress | None = None,
    ) -> Generation:
        """Draws what is below the upper part of images.

        Args:
            images: An image or several, of any size and kind that ``to_rgb`` takes, or paths of files; the middle is
                cut out in the model's aspect, then resized to its size.
            keep: Fraction of the rows that is given, in [0, 1); rounded to whole rows.
            n: Completions of each image; completion j of image i has a stream made of (seed, i, j). Those that are
                computed together share what is computed of the given part.
            seed, batch_size, temperature, top_k, top_p, dtype, progress: As in ``sample``.

        Returns:
            ``len(images) * n`` images, those of the first input first.

        Raises:
            BackendUnavailableError: Nothing here decodes this model in ``dtype``.
            TypeError, ValueError: Something that is not an image, or a value out of its range.
            InterruptedGeneration: On Ctrl-C.
        """
        check_count("n", n, MAX_IMAGES)
        height, width = self.processor.height, self.processor.width
        rows = kept_rows(keep, height)
        seed = _seed(seed)
        sampling = Sampling(temperature, top_k, top_p)
        crops, tokens = [], []
        for item in _as_list(images):
            opened = images_module.open_image(item) if isinstance(item, str | os.PathLike) else item
            crop = images_module.center_crop(opened, width / height)
            tokens.append(self.processor(crop, return_tensors="pt")["input_ids"])
            crop.thumbnail((INPUT_EDGE, INPUT_EDGE))
            crops.append(crop)
        originals = torch.cat(tokens)
        # From 1 on: completion j of the first image is not drawn with the numbers of sample j.
        streams = (torch.arange(1, len(crops) + 1)[:, None] << 32) + torch.arange(n)
        given = originals[:, : rows * width].repeat_interleave(n, dim=0)
        extra = {"inputs": crops, "originals": originals, "given": rows * width}
        settings = {"keep": keep, "rows": rows, "n": n}
        return self._run(given, streams.flatten(), seed, sampling, batch_size, dtype, progress, settings, extra)

    def _run(
        self,
        given: Tensor,
        streams: Tensor,
        seed: int,
        sampling: Sampling,
        batch_size: int | None,
        dtype: str | None,
        progress: Progress | None,
        settings: dict[str, Any] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Generation:
        """Draws the pixels behind the (N, T_0) given ones, batch after batch."""
        check_dtype(dtype)
        total = self.model.config.n_positions
        n, first = given.shape
        copies = settings["n"] if settings else 1
        if batch_size is None:
            batch_size = self.default_batch_size(dtype, first + 1, copies)
        check_count("batch_size", batch_size)
        settings = {
            **(settings or {}),
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "batch_size": batch_size,
            "device": str(self.device),
            "dtype": dtype or str(self.model.dtype).removeprefix("torch."),
        }
        parts: list[Drawn] = []

        def collect(inputs: int | None = None) -> Generation:
            """What has been drawn; for completions that are not finished, of the first ``inputs`` inputs."""
            rest = dict(extra or {})
            if inputs is not None:
                rest |= {"inputs": rest["inputs"][:inputs], "originals": rest["originals"][:inputs]}
            done = sum(len(part.tokens) for part in parts) if inputs is None else inputs * settings["n"]
            drawn = torch.cat([part.tokens for part in parts])[:done]
            logprobs = torch.cat([part.logprobs for part in parts])[:done]
            tokens = torch.cat([given[:done], drawn], dim=1)
            logprobs = torch.cat([torch.full((done, first), torch.nan), logprobs], dim=1)
            return Generation(tokens, logprobs, self.processor, seed, settings, **rest)

        try:
            for rows, together in _batches(n, copies, batch_size):
                context = torch.nn.functional.pad(given[rows][::together], (1, 0), value=self.model.config.sos_token_id)
                uniforms = stream_uniforms(seed, streams[rows], first, total - first, self.device)
                before = rows.start * (total - first)

                def report(step: int, tokens: Tensor, before: int = before) -> None:
                    if progress is not None:
                        progress(before + (step + 1) * len(tokens), n * (total - first))

                drawn = decode(self.model, context.to(self.device), uniforms, sampling, report, dtype)
                parts.append(Drawn(drawn.tokens.cpu(), drawn.logprobs.cpu()))
        except KeyboardInterrupt as error:
            # An input of a completion is finished when all its completions are.
            inputs = None if extra is None else sum(len(part.tokens) for part in parts) // settings["n"]
            raise InterruptedGeneration(collect(inputs) if parts and inputs != 0 else None) from error
        return collect()


def _batches(n: int, copies: int, batch_size: int) -> Iterator[tuple[slice, int]]:
    """Parts of n rows, and how many of a part's rows follow each other that are copies of one.

    A part has all copies of some rows or, when they are more than a batch, some copies of one row.
    """
    if copies <= batch_size:
        size = batch_size // copies * copies
        yield from ((slice(start, min(start + size, n)), copies) for start in range(0, n, size))
        return
    for first in range(0, n, copies):
        for start in range(first, first + copies, batch_size):
            stop = min(start + batch_size, first + copies)
            yield slice(start, stop), stop - start


def kept_rows(keep: float, height: int) -> int:
    """How many of ``height`` rows a fraction is.

    Raises:
        ValueError: Not a number in [0, 1), or none of the rows would be left to draw.
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0.0 <= keep < 1.0:
        raise ValueError(f"keep is {keep!r}; want a fraction in [0, 1)")
    rows = round(keep * height)
    if rows == height:
        raise ValueError(f"keep is {keep}; want a fraction that leaves a row of {height} to draw")
    return rows


def _seed(seed: int | None) -> int:
    return int(torch.randint(0, 1 << 62, ())) if seed is None else check_seed(seed)


def _as_list(images: Any) -> Sequence[Any]:
    """Images as a sequence of single ones."""
    single = isinstance(images, Image.Image | str | os.PathLike)
    if single or (isinstance(images, np.ndarray | Tensor) and images.ndim <= 3):
        return [images]
    items = list(images)
    if not items:
        raise ValueError("images is empty; want at least one")
    return items
