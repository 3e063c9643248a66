"""Options that ``igpt sample`` and ``igpt complete`` share, and what their words mean."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from igpt_fast.checks import whole_number
from igpt_fast.cli.checks import Backend, UsageError, check_device_name
from igpt_fast.draws import PLAIN, Sampling, check_scale, check_seed

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
        label: Class of the images, for a model that has classes: a number, or several with commas between, which are
            repeated until every image (every input of complete) has one.
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
    """What is written beside the grid.

    Args:
        gif: Also write the grid being drawn; .gif or .apng.
        singles: Also write every image by itself into this directory: 00000.png and so on; of complete 00000-00.png,
            the numbers of input and completion. The directory may not have other files that are numbered so.
        tokens: Also write tokens and log-probabilities; .npz.
        sidecar: Also write how the images were made: seed, settings, hash of the weights, engine, images a second;
            .json.
        upscale: Edge of a pixel in grid, animation and single images, which are enlarged by nearest neighbour. If not
            given, a grid's images are enlarged to 128 pixels and single ones stay as they are.
        force: Overwrite files.
    """

    gif: Path | None = None
    singles: Path | None = None
    tokens: Path | None = None
    sidecar: Path | None = None
    upscale: Annotated[int | None, arg(aliases=["--scale"])] = None
    force: bool = False


def labels(text: str | None, count: int) -> list[int] | None:
    """The classes of ``count`` images: the numbers of a list like ``0,3,7``, repeated."""
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text.strip(), re.ASCII):
        raise UsageError(f"--label is {text!r}; want a number, or several like 0,3,7")
    numbers = [int(word) for word in text.split(",")]
    if len(numbers) > count:
        raise UsageError(f"--label has {len(numbers)} numbers for {count} images")
    return [numbers[i % len(numbers)] for i in range(count)]


def kept(text: str | None, mask: Path | None, height: int, width: int) -> float | int | np.ndarray:
    """What ``--keep`` and ``--mask`` say is given, as ``Pipeline.complete`` takes it: half of the rows by default."""
    from igpt_fast.sampling.inpainting import kept_rows

    if mask is not None:
        if text is not None:
            raise UsageError("give --keep or --mask, not both")
        from igpt_fast.image.reading import read_mask

        return read_mask(mask, height, width)
    text = "0.5" if text is None else text.strip()
    rows = re.fullmatch(r"(\d{1,9}) ?rows?", text, re.ASCII)
    try:
        keep = int(rows[1]) if rows else float(text)
        kept_rows(keep, height)
    except ValueError:
        wanted = f"a fraction of the rows like 0.5, or rows like 12rows, and some left of {height}"
        raise UsageError(f"--keep is {text!r}; want {wanted}") from None
    return keep
