"""What ``igpt sample`` and ``igpt complete`` leave: grid, animation, single images, tokens, and how they were made.

All names are checked before the work; all files are whole before the first one gets its name.
"""

from __future__ import annotations

import hashlib
import json as json_module
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
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

MOST_IN_GRID = 1024  # images, of which a grid is made without being asked for
_NUMBERED = re.compile(r"(\d{5}|[1-9]\d{5,})(-(\d\d|[1-9]\d{2,}))?\.png", re.ASCII)  # names of single images


@dataclass(frozen=True)
class Exports:
    """The names of what a command writes."""

    grid: Path | None
    files: Files  # the rest
    names: Sequence[str]  # of the single images, in their order; of no use where there are none
    columns: int | None = None  # images in a row of the grid
    labels: bool = True  # whether the columns of completions are named

    @classmethod
    def of(cls, out: Path | None, usual: str, files: Files, count: int, **more: Any) -> Exports:
        """Those of ``count`` images, whose grid is ``out``, or has the usual name, or is none.

        Raises:
            UsageError: Nothing would be written, or a grid that is named and not wanted.
        """
        if out is not None and not files.grid:
            raise UsageError("--out names the grid, --no-grid leaves it out; give one of them")
        wanted = files.grid and (out is not None or count <= MOST_IN_GRID)
        if not wanted and files.singles is files.tokens is files.gif is None:
            most = f"of {count} images no grid is made unless --out names it" if files.grid else "--no-grid"
            raise UsageError(f"{most}: give --tokens, --singles or --gif as well, or nothing is written")
        exports = cls((out or Path(usual)) if wanted else None, files, **more)
        return exports._numbered_anew() if files.number else exports

    def _numbered_anew(self) -> Exports:
        """The same with the least number from 2 on behind each name, if one of them is there already."""
        if self.files.force:
            raise UsageError("--number leaves files as they are, --force overwrites them; give one of them")
        exports, number = self, 1
        while any(os.path.lexists(path) for path in exports._paths()):
            number += 1
            named = {name: getattr(self.files, name) for name in ("gif", "singles", "tokens", "sidecar")}
            named = {k: p and p.with_name(f"{p.stem}-{number}{p.suffix}") for k, p in named.items()}
            grid = self.grid and self.grid.with_name(f"{self.grid.stem}-{number}{self.grid.suffix}")
            exports = replace(self, grid=grid, files=replace(self.files, **named))
        return exports

    def _paths(self) -> list[Path]:
        """Of all that is written."""
        files = self.files
        paths = (self.grid, files.gif, files.tokens, files.sidecar, files.singles)
        return [path for path in paths if path is not None]

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
        for path in self._paths()[:-1]:
            if path.resolve() == folder.resolve():
                raise UsageError(f"{path}: is also the directory of --singles; choose another name")
        if not folder.exists():
            if not folder.parent.is_dir():
                raise FileNotFoundError(f"{folder.parent}: no such directory")
            return check_writable(folder.parent)
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder}: is not a directory")
        check_writable(folder)
        names = set(self.names)
        if self.grid is not None and self.grid.parent.resolve() == folder.resolve() and self.grid.name in names:
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

        if self.grid is self.files.gif is None:
            return
        try:
            size = grid_pixels(processor, count, inputs, self.columns, self.files.upscale, self.labels)
            if self.files.gif is not None:
                check_animation(self.files.gif, *size, processor.height + 1)
            if self.grid is not None:
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
                look: dict[str, Any] = {"columns": self.columns, "scale": files.upscale, "labels": self.labels}
                if self.grid is not None:
                    generation.save_grid(at[self.grid], **look)
                if files.gif is not None:
                    generation.save_gif(at[files.gif], **look)
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
        """Where ``write`` has failed: saves the tokens alone, beside the first file under a new name, and says so."""
        from igpt_fast.sampling.results import save_tokens

        beside = self._paths()[0]
        path = beside.with_name(f"{beside.stem[:200]}.{secrets.token_hex(4)}.npz")
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
