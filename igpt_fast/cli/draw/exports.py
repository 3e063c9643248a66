"""What ``igpt sample`` and ``igpt complete`` leave: grid, animation, single images, tokens, and how they were made.

All names are checked before the work; all files are whole before the first one gets its name.
"""

from __future__ import annotations

import hashlib
import json as json_module
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igpt_fast.cli.checks import ANIMATION_SUFFIXES, GRID_SUFFIXES, UsageError, check_output
from igpt_fast.cli.draw.options import Files
from igpt_fast.cli.terminal import reason
from igpt_fast.files import check_writable, replacing, replacing_together

if TYPE_CHECKING:
    from torch import nn

    from igpt_fast.image import ImageGPTImageProcessor
    from igpt_fast.sampling.results import Generation

_NUMBERED = re.compile(r"(\d{5}|[1-9]\d{5,})(-(\d\d|[1-9]\d{2,}))?\.png", re.ASCII)  # names of single images


@dataclass(frozen=True)
class Exports:
    """The names of what a command writes."""

    grid: Path
    files: Files  # the rest
    names: Sequence[str]  # of the single images, in their order; of no use where there are none
    columns: int | None = None  # images in a row of the grid

    def check(self) -> None:
        """Fails before the work is done if a result could not be written, or would replace something."""
        files = self.files
        for option, value, most in (("--upscale", files.upscale, 64), ("--columns", self.columns, 1 << 30)):
            if value is not None and not 1 <= value <= most:
                raise UsageError(f"{option} is {value}; want an integer in 1..{most}")
        check_output(self.grid, files.force, GRID_SUFFIXES)
        check_output(files.gif, files.force, ANIMATION_SUFFIXES)
        check_output(files.tokens, files.force, (".npz",))
        check_output(files.sidecar, files.force, (".json",))
        if files.singles is not None:
            self._check_singles(files.singles)

    def _check_singles(self, folder: Path) -> None:
        for path in (self.grid, self.files.gif, self.files.tokens, self.files.sidecar):
            if path is not None and path.resolve() == folder.resolve():
                raise UsageError(f"{path}: is also the directory of --singles; choose another name")
        if not folder.exists():
            if not folder.parent.is_dir():
                raise FileNotFoundError(f"{folder.parent}: no such directory")
            return check_writable(folder.parent)
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder}: is not a directory")
        check_writable(folder)
        names = set(self.names)
        if self.grid.parent.resolve() == folder.resolve() and self.grid.name in names:
            raise UsageError(f"{self.grid}: is also the name of a single image; choose another --out or --singles")
        there = {path.name: path for path in folder.iterdir()}
        for name in sorted(names.intersection(there)):
            if there[name].is_dir():
                raise IsADirectoryError(f"{there[name]}: is a directory")
            if not self.files.force:
                raise FileExistsError(f"{there[name]}: exists already; pass --force to overwrite it")
        if others := [path for path in self._numbered(folder) if path.name not in names]:
            raise FileExistsError(
                f"{others[0]}: is not among this run's images, one of {len(others)}; choose an empty directory"
            )

    def _numbered(self, folder: Path) -> list[Path]:
        """The files that are there and called like single images of this command, whatever their numbers."""
        pairs = bool(self.names) and "-" in self.names[0]
        found = [(path, _NUMBERED.fullmatch(path.name)) for path in sorted(folder.iterdir())]
        return [path for path, match in found if match and bool(match[2]) == pairs and not path.is_dir()]

    def check_size(self, processor: ImageGPTImageProcessor, count: int, inputs: int = 0) -> None:
        """Fails, as a mistake of usage, where ``count`` images, or as many completions of ``inputs``, make too large a
        grid or animation.
        """
        from igpt_fast.image import check_animation
        from igpt_fast.image.writing import check_image
        from igpt_fast.sampling.results import grid_pixels

        try:
            size = grid_pixels(processor, count, inputs, self.columns, self.files.upscale)
            if self.files.gif is not None:
                check_animation(self.files.gif, *size, processor.height + 1)
            check_image(self.grid, *size)
        except ValueError as error:
            raise UsageError(f"{error}; make the grid's images smaller with --upscale 1, or draw fewer") from error

    def write(self, generation: Generation, which: Sequence[int], values: dict[str, Any]) -> dict[str, Any]:
        """Writes everything: the images, whose names have the places ``which`` in ``names``, and ``values`` into the
        sidecar. Returns the names of the files, for the report.
        """
        from igpt_fast.sampling.results import save_tokens

        files, singles = self.files, self.files.singles
        paths = {"out": self.grid, "gif": files.gif, "tokens": files.tokens, "sidecar": files.sidecar}
        shown = {name: None if path is None else str(path) for name, path in paths.items()}
        shown["singles"] = None if singles is None else str(singles)
        pictures = [] if singles is None else [singles / self.names[i] for i in which]
        targets = [path for path in paths.values() if path is not None] + pictures
        made = singles is not None and not singles.exists()
        try:
            if singles is not None:
                singles.mkdir(exist_ok=True)
            with replacing_together(targets, overwrite=files.force) as partials:
                at = dict(zip(targets, partials, strict=True))
                generation.save_grid(at[self.grid], columns=self.columns, scale=files.upscale)
                if files.gif is not None:
                    generation.save_gif(at[files.gif], columns=self.columns, scale=files.upscale)
                if files.tokens is not None:
                    save_tokens(generation, at[files.tokens])
                if files.sidecar is not None:
                    listed = shown | {"singles": list(map(str, pictures)) or None}
                    text = json_module.dumps(values | {"files": listed}, indent=2)
                    at[files.sidecar].write_text(text + "\n", "utf-8")
                for picture, image in zip(pictures, generation.images if pictures else [], strict=True):
                    self._save_single(image, at[picture])
        except BaseException:
            if made and singles is not None and singles.is_dir() and not any(singles.iterdir()):
                singles.rmdir()
            raise
        return shown

    def _save_single(self, image: Any, path: Path) -> None:
        from PIL import Image

        scale = self.files.upscale or 1
        image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path, format="PNG")

    def rescue(self, generation: Generation) -> str:
        """Where ``write`` has failed: saves the tokens alone, beside the grid under a new name, and says so."""
        from igpt_fast.sampling.results import save_tokens

        path = self.grid.with_name(f"{self.grid.stem[:200]}.{secrets.token_hex(4)}.npz")
        try:
            with replacing(path, overwrite=False) as partial:
                save_tokens(generation, partial)
        except Exception as error:
            return f"the tokens alone cannot be saved either: {reason(error)}"
        return f"the tokens alone are saved in {path}"


def file_hash(path: Path) -> str | None:
    """SHA-256 of a file; ``None`` of a pipe, from which nothing can be read twice."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of a model's weights as they are in memory, after conversion to the dtype that draws.

    Hashed are, for every tensor of the state dict in the order of their names, the line ``name dtype shape`` and the
    bytes of its values, row-major.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
