"""What ``igpt sample`` and ``igpt complete`` leave: grid, animation, single images, tokens, and how they were made.

All names are checked before the work; all files are whole before the first one gets its name.
"""

from __future__ import annotations

import hashlib
import json as json_module
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igpt_fast.options import Files
from igpt_fast.terminal import ANIMATION_SUFFIXES, GRID_SUFFIXES, UsageError, check_output, check_writable

if TYPE_CHECKING:
    from torch import nn

    from igpt_fast.pipeline import Generation


@dataclass(frozen=True)
class Exports:
    """The names of what a command writes.

    Args:
        grid: The grid.
        files: The rest.
        names: Of the single images, in their order; of no use where there are none.
        columns: Images in a row of the grid.
    """

    grid: Path
    files: Files
    names: Sequence[str]
    columns: int | None = None

    def check(self) -> None:
        """Fails before the work is done if a result could not be written, or would replace something."""
        files = self.files
        check_output(self.grid, files.force, GRID_SUFFIXES)
        check_output(files.gif, files.force, ANIMATION_SUFFIXES)
        check_output(files.tokens, files.force, (".npz",))
        check_output(files.sidecar, files.force, (".json",))
        if files.singles is None:
            return
        if not files.singles.exists():
            if not files.singles.parent.is_dir():
                raise FileNotFoundError(f"{files.singles.parent}: no such directory")
            return check_writable(files.singles.parent)
        if not files.singles.is_dir():
            raise NotADirectoryError(f"{files.singles}: is not a directory")
        check_writable(files.singles)
        if self.grid.parent.resolve() == files.singles.resolve() and self.grid.name in self.names:
            raise UsageError(f"{self.grid}: is also the name of a single image; choose another --out or --singles")
        if not files.force and (taken := set(self.names).intersection(path.name for path in files.singles.iterdir())):
            raise FileExistsError(f"{files.singles / min(taken)}: exists already; pass --force to overwrite it")

    def write(self, generation: Generation, which: Sequence[int], values: dict[str, Any]) -> dict[str, Any]:
        """Writes everything.

        Args:
            generation: The images.
            which: Of every image, the place of its name in ``names``.
            values: For the sidecar.

        Returns:
            The names of the files, for the report.
        """
        from igpt_fast.files import replacing_together

        files, singles = self.files, self.files.singles
        paths = {"out": self.grid, "gif": files.gif, "tokens": files.tokens, "sidecar": files.sidecar}
        told = {name: None if path is None else str(path) for name, path in paths.items()}
        told["singles"] = None if singles is None else str(singles)
        pictures = [] if singles is None else [singles / self.names[i] for i in which]
        targets = [path for path in paths.values() if path is not None] + pictures
        made = singles is not None and not singles.exists()
        try:
            if singles is not None:
                singles.mkdir(exist_ok=True)
            with replacing_together(targets, overwrite=files.force) as partials:
                at = dict(zip(targets, partials, strict=True))
                self.save_grid(generation, at[self.grid])
                if files.gif is not None:
                    generation.save_gif(at[files.gif], columns=self.columns, scale=files.upscale)
                if files.tokens is not None:
                    save_tokens(generation, at[files.tokens])
                if files.sidecar is not None:
                    listed = told | {"singles": [str(picture) for picture in pictures] if pictures else None}
                    at[files.sidecar].write_text(
                        json_module.dumps(values | {"files": listed}, indent=2) + "\n", "utf-8"
                    )
                for picture, image in zip(pictures, generation.images if pictures else [], strict=True):
                    self._save_single(image, at[picture])
        except BaseException:
            if made and singles is not None and singles.is_dir() and not any(singles.iterdir()):
                singles.rmdir()
            raise
        return told

    def _save_single(self, image: Any, path: Path) -> None:
        from PIL import Image

        scale = self.files.upscale or 1
        image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path, format="PNG")

    def save_grid(self, generation: Generation, path: Path) -> None:
        """The grid alone.

        Raises:
            ValueError: Its form is out of range, or it has too many pixels.
        """
        generation.save_grid(path, columns=self.columns, scale=self.files.upscale)


def save_tokens(generation: Generation, path: Path) -> None:
    """A .npz that ``numpy.load`` reads without unpickling.

    ``tokens`` (N, H, W) uint16, ``logprobs`` (N, H, W) float32 in nats, NaN where the pixel was given, ``seed`` uint64,
    ``clusters`` (K, 3) float32 in [-1, 1], the colours; for class-conditional images ``labels`` (N,) int64.
    """
    import numpy as np

    shape = (len(generation), generation.processor.height, generation.processor.width)
    arrays: dict[str, Any] = {
        "tokens": generation.tokens.numpy().astype(np.uint16).reshape(shape),
        "logprobs": generation.logprobs.numpy().reshape(shape),
        "seed": np.uint64(generation.seed),
        "clusters": np.asarray(generation.processor.clusters, dtype=np.float32),
    }
    if generation.labels is not None:
        arrays["labels"] = np.asarray(generation.labels, dtype=np.int64)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


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
