"""What ``igpt score`` writes: lines, arrays, maps, a grid."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from igpt_fast.cli.checks import GRID_SUFFIXES, check_output
from igpt_fast.files import check_writable, replacing_together

if TYPE_CHECKING:
    from igpt_fast.pipeline import Scores

_MAP = re.compile(r"\d{5,}-[A-Za-z0-9._-]{0,80}\.png")


@dataclass(frozen=True)
class Results:
    """What is written.

    Args:
        csv: Write a line for each image; .csv.
        npz: Write the nats of every pixel, tokens and figures, which --reference takes again; .npz.
        maps: Write each image enlarged beside a heat map of its surprise into this directory, a new or empty one;
            their names begin with the image's number, which --csv and --json have too.
        grid: Write the most and the least unusual images with their maps as one picture; .png, .jpg, .webp or .bmp.
        force: Overwrite files; the maps of another run are removed.
    """

    csv: Path | None = None
    npz: Path | None = None
    maps: Path | None = None
    grid: Path | None = None
    force: bool = False

    def check(self) -> None:
        """Fails before the work is done if a result could not be written, or would replace something."""
        check_output(self.csv, self.force, (".csv",))
        check_output(self.npz, self.force, (".npz",))
        check_output(self.grid, self.force, GRID_SUFFIXES)
        folder = self.maps
        if folder is None:
            return
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder}: is not a directory")
        if folder.is_dir() and not self.force and (found := next(folder.iterdir(), None)):
            raise FileExistsError(f"{found}: exists already; --maps wants an empty directory, or --force")
        if not folder.exists() and not folder.parent.is_dir():
            raise FileNotFoundError(f"{folder.parent}: no such directory")
        check_writable(folder if folder.exists() else folder.parent)

    def write(self, scores: Scores, by: str) -> None:
        """All of it, or nothing."""
        from igpt_fast.image import save_image

        maps = [] if self.maps is None else [self.maps / _map_name(i, name) for i, name in enumerate(scores.names)]
        targets = [*(path for path in (self.csv, self.npz, self.grid) if path is not None), *maps]
        old, made = [], self.maps is not None and not self.maps.exists()
        if self.maps is not None:
            self.maps.mkdir(exist_ok=True)
            old = [path for path in self.maps.iterdir() if self.force and _MAP.fullmatch(path.name)]
        try:
            with replacing_together(targets, overwrite=self.force, outdated=old) as partials:
                at = dict(zip(targets, partials, strict=True))
                for path in (self.csv, self.npz):
                    if path is not None:
                        scores.writer(path)(at[path])
                if self.grid is not None:
                    save_image(scores.grid(by=by), at[self.grid])
                for path, picture in zip(maps, scores.each_map() if maps else [], strict=True):
                    picture.save(at[path], format="PNG")
        except BaseException:
            if self.maps is not None and made:
                with contextlib.suppress(OSError):  # what has its name already stays
                    self.maps.rmdir()
            raise


def _map_name(number: int, name: str) -> str:
    return f"{number:05}-{re.sub(r'[^A-Za-z0-9._-]+', '_', Path(name).stem)[:80]}.png"
