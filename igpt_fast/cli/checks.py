"""What the commands check before the work."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from igpt_fast import processes
from igpt_fast.cli import terminal
from igpt_fast.files import check_writable, shown

if TYPE_CHECKING:
    import torch

    from igpt_fast.image import ImageGPTImageProcessor

Paths = Positional[tuple[Path, ...]]
Backend = Literal["auto", "reference", "cpu", "cuda"]
Floats = Literal["float32", "bfloat16", "float16"]
FloatsOrStored = Literal["float32", "bfloat16", "float16", "auto"]

GRID_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ANIMATION_SUFFIXES = (".gif", ".apng")


class UsageError(Exception):
    """The command line asks for something that makes no sense; exit code 2."""


class DeviceUnavailableError(Exception):
    """The requested device is not there; exit code 3."""


def check_output(path: Path | None, force: bool, suffixes: Sequence[str], made: Path | None = None) -> None:
    """Fails before the work is done if a result could not be written; ``made`` is a directory that the work makes."""
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{path}: the name must end in {', '.join(suffixes)}")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a directory")
    if not path.parent.exists() and path.parent == made:
        return
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such directory")
    if (path.exists() or path.is_symlink()) and not force:
        raise FileExistsError(f"{path}: exists already; pass --force to overwrite it")
    if path.is_symlink():
        terminal.say(f"igpt: {path}: is a link, which is replaced; {os.readlink(path)} stays as it is")
    check_writable(path.parent)


def choose_device(name: str | None, local_rank: int | None = None) -> torch.device:
    """The device of a name; of several processes, each takes the GPU of its number on its machine."""
    check_device_name(name)
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "mps" and (device.index or not torch.backends.mps.is_available()):
        sees = "one" if torch.backends.mps.is_available() else "none"
        why = f"torch sees {sees}" if torch.backends.mps.is_built() else "this torch is a build without MPS"
        raise DeviceUnavailableError(f"device {name} is not available: {why}")
    if device.type == "cuda" and device.index is None and local_rank is not None:
        device = torch.device("cuda", local_rank)
        name = f"{device} of LOCAL_RANK (--device cuda:0 lets all processes share one)"
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceUnavailableError(f"device {name} is not available: torch sees {torch.cuda.device_count()}")
    return device


def check_device_name(name: str | None) -> None:
    """Fails, as a mistake of usage, where no device is called so; without torch, at once."""
    if name is not None and not re.fullmatch(r"cpu|mps|mps:\d{1,3}|cuda|cuda:\d{1,3}", name, re.ASCII):
        raise UsageError(f"--device is {shown(name)}; want cpu, cuda, cuda:N or mps")


def choose_backend(name: Backend) -> None:
    """The one that all ops take from now on; auto leaves what IGPT_FAST_BACKEND chose."""
    if name != "auto":
        from igpt_fast import backend

        backend.set_backend(name)


@contextlib.contextmanager
def as_usage() -> Iterator[None]:
    """Makes a value out of its range a mistake of usage."""
    try:
        yield
    except ValueError as error:
        raise UsageError(of_options(str(error))) from error


def of_options(text: str) -> str:
    """A message of the library as one that names the option and not the argument."""
    text = text.replace("labels are given", "label is given")
    match = re.match(r"(?:sample: )?(\w+) (?=is|has|\d)", text)
    if match:
        text = f"{'-' if match[1] == 'n' else '--'}{match[1].replace('_', '-')} {text[match.end() :]}"
    return text.replace("--labels", "--label").replace("without labels", "without --label")


def check_range(option: str, value: int | None, least: int, most: int) -> None:
    if value is not None and not least <= value <= most:
        raise UsageError(f"{option} is {value}; want {least}..{most}")


def check_clusters(count: int | None) -> None:
    """Fails early where scikit-learn or the format of tokens would fail late."""
    check_range("--n-clusters", count, 2, 1 << 16)


def find_pictures(places: Sequence[Path]) -> list[Path]:
    """The files of a command line, those of directories among it, and the standard input for ``-``; whether they are
    there is said early, and what they are when their turn comes.
    """
    if not places:
        raise UsageError("give at least one image file or directory, or - for the standard input")
    if (count := list(map(str, places)).count("-")) and (count > 1 or processes.size() > 1):
        raise UsageError("- is the standard input, which one process reads once")
    for path in places:
        if str(path) != "-" and not path.exists():
            raise FileNotFoundError(f"{path}: no such file or directory")
    found: list[Path] = []
    for path in places:
        if path.is_dir():
            from igpt_fast.image.folders import find_images

            inside = find_images(path)
            if not inside:
                raise ValueError(f"{path}: no images in it")
            found += inside
        else:
            found.append(Path("/dev/stdin") if str(path) == "-" else path)
    return found


def model_name(model: str | None) -> str:
    """Of a model, or of the bundled one."""
    from igpt_fast.files import BUNDLED

    return str(BUNDLED) if model is None else model


def is_bundled_data(path: Path) -> bool:
    """Whether a token file is that of the bundled emoji, or a copy of it."""
    from igpt_fast.files import BUNDLED

    bundled = BUNDLED.parent / "emoji16.npz"
    return path.stat().st_size == bundled.stat().st_size and path.read_bytes() == bundled.read_bytes()


def read_processor(model: str | None) -> ImageGPTImageProcessor:
    """Of a model, or of the bundled one."""
    from igpt_fast.image import ImageGPTImageProcessor

    return ImageGPTImageProcessor.from_pretrained(model_name(model))


def read_palette(clusters: Path | None, model: str | None) -> tuple[Any, int]:
    """Colours, and the edge of the images that they are for."""
    from igpt_fast.image import load_clusters

    if clusters is not None:
        return load_clusters(clusters), 32
    processor = read_processor(model)
    if processor.clusters is None:
        raise ValueError(f"{model}: its preprocessor_config.json has no clusters")
    return processor.clusters, processor.height
