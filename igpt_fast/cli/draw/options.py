"""Options that ``igpt sample`` and ``igpt complete`` share, and what their words mean."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from igpt_fast.checks import whole_number
from igpt_fast.cli.checks import Backend, UsageError, check_device_name, model_name
from igpt_fast.cli.signature import nearest
from igpt_fast.draws import PLAIN, Sampling, check_scale, check_seed
from igpt_fast.files import listed, shown

if TYPE_CHECKING:
    import numpy as np

    from igpt_fast.world import World

ROUNDED = ("int8", "fp8_values", "fp8_cache")  # dtypes of decoders that weights are not stored in
Dtype = Literal["float32", "bfloat16", "float16", "int8", "fp8_values", "fp8_cache", "auto"]


@dataclass(frozen=True)
class DrawOptions:
    """How images are drawn.

    Args:
        model: Directory or hub id of a checkpoint; the bundled emoji model if not given.
        seed: The same seed gives the same images; drawn at random, and reported, if not given.
        sampling: How colours are drawn.
        label: Class of the images, for a model that has classes: a number or a name of its config.json, or several
            with commas between, which are repeated until every image (every input of complete) has one.
        cfg_scale: Scale of classifier-free guidance towards the class; 1 is none, above follows it more closely.
        batch_size: Images computed together; chosen by memory if not given.
        device: cpu, cuda, cuda:N or mps; cuda if torch has it, if not given. Under torchrun, cuda is the GPU
            LOCAL_RANK.
        dtype: float32, bfloat16, float16, or auto for what the checkpoint is stored in; int8 draws with weights and
            cache rounded to 8 bits, on the CPU; fp8_values in bfloat16 with cached values of 8 bits, and
            fp8_cache with keys as well, on a GPU.
        speculate: Pixels of an image that is drawn alone are guessed ahead on the CPU, in float32 and int8, which
            changes none.
        backend: auto, reference, cpu or cuda; see igpt env.
        preview: Show the images in the terminal while they are drawn (stderr; 24-bit colours, grey characters with
            NO_COLOR); where stderr is no terminal, once when they are finished.

    Raises:
        ValueError: A value is out of its range.
    """

    model: str | None = None
    seed: int | None = None
    sampling: Annotated[Sampling, arg(name="")] = PLAIN
    label: str | None = None
    cfg_scale: float = 1.0
    batch_size: int | None = None
    device: str | None = None
    dtype: Dtype = "float32"
    speculate: bool = True
    backend: Backend = "auto"
    preview: bool = False

    def __post_init__(self) -> None:
        check_device_name(self.device)
        if check_scale("cfg_scale", self.cfg_scale) != 1.0 and self.label is None:
            raise UsageError("--cfg-scale has no effect without --label: there is no class to be guided to")
        if self.seed is not None:
            check_seed(self.seed)
        if self.batch_size is not None:
            whole_number("batch_size", self.batch_size)

    def requested(self, world: World) -> dict[str, Any]:
        """The keywords of ``Pipeline.request``, but for the labels. A seed that is not given is drawn, one for all."""
        seed = world.agree("seed", secrets.randbits(62) if self.seed is None else self.seed)
        shared = {"batch_size": self.batch_size, "sampling": self.sampling, "cfg_scale": self.cfg_scale}
        shared |= {"speculate": self.speculate}
        return shared | {"seed": seed, "dtype": self.dtype if self.dtype in ROUNDED else None}


@dataclass(frozen=True)
class Files:
    """What is written.

    Args:
        grid: The grid; left out of its own accord where it would have more than 1,024 images, unless --out names it.
        gif: Also write the grid being drawn; .gif or .apng.
        singles: Also write every image by itself into this directory: 00000.png and so on; of complete 00000-00.png,
            the numbers of input and completion. The directory may not have other files that are numbered so.
        tokens: Also write tokens and log-probabilities; .npz.
        sidecar: Also write how the images were made: seed, settings, hash of the weights, engine, images a second;
            .json.
        upscale: Edge of a pixel in grid, animation and single images, which are enlarged by nearest neighbour. If not
            given, a grid's images are enlarged to 128 pixels and single ones stay as they are.
        number: Where one of the files is there already, give all of them the next free number: samples-2.png.
        force: Overwrite files; a link is replaced by the file.
    """

    grid: bool = True
    gif: Path | None = None
    singles: Path | None = None
    tokens: Path | None = None
    sidecar: Path | None = None
    upscale: Annotated[int | None, arg(aliases=["--scale"])] = None
    number: bool = False
    force: bool = False


def labels(text: str | None, count: int, model: str | None) -> list[int] | None:
    """The classes of ``count`` images: the numbers, or names, of a list like ``0,3,dog``, repeated.

    Raises:
        UsageError: No class of the model, of which config.json alone is read, or more classes than images.
    """
    if text is None:
        return None
    from igpt_fast.config import ImageGPTConfig

    config = ImageGPTConfig.from_pretrained(model_name(model))
    if not config.n_classes:
        raise UsageError("--label is given, but the model has no classes")
    names = config.id2label or {}
    names = {name: number for number, name in names.items()} if len(names) == config.n_classes else {}
    numbers = [_label(word.strip(), config.n_classes, names) for word in text.split(",")]
    if len(numbers) > count:
        raise UsageError(f"--label has {len(numbers)} classes for {count} images")
    return [numbers[i % len(numbers)] for i in range(count)]


def _label(word: str, n_classes: int, names: dict[str, int]) -> int:
    if re.fullmatch(r"\d{1,9}", word, re.ASCII):
        if int(word) >= n_classes:
            raise UsageError(f"--label {word} is not in 0..{n_classes - 1}")
        return int(word)
    if word in names:
        return names[word]
    wanted = f"0..{n_classes - 1}" + (f", or a name: {listed(names)}" if names else "")
    raise UsageError(f"--label is {shown(word)}; want {wanted}{nearest(word, names)}")


def kept(text: str | None, mask: Path | None, height: int, width: int, fit: str = "crop") -> float | int | np.ndarray:
    """What ``--keep`` and ``--mask`` say is given, as ``Pipeline.complete`` takes it: half of the rows by default."""
    from igpt_fast.sampling.inpainting import kept_rows

    if mask is not None:
        if text is not None:
            raise UsageError("give --keep or --mask, not both")
        from igpt_fast.image.reading import read_mask

        return read_mask(mask, height, width, fit)
    text = "0.5" if text is None else text.strip()
    rows = re.fullmatch(r"(\d{1,9}) ?rows?", text, re.ASCII)
    try:
        keep = int(rows[1]) if rows else float(text)
        kept_rows(keep, height)
    except ValueError:
        wanted = f"a fraction of the rows like 0.5, or rows like 12rows, and some left of {height}"
        raise UsageError(f"--keep is {text!r}; want {wanted}") from None
    return keep
