"""The paper's linear probe on ImageNet, for a checkpoint. Written to its protocol; not run: see docs/recipes.md.

    python -m igpt_fast.recipes.imagenet ILSVRC2012 --model openai/imagegpt-large --out runs/imagenet

The directory has ``train/CLASS/`` and ``val/CLASS/`` of images. Each picture of train is resized so that its short side
is a random number of 256..384 pixels, a random square of 224 is cut out, and that is resized to 32x32 (or 48, 64); of
val the short side becomes 224, and the middle is taken. Drawn once for each picture, from its number and the seed.
Features are the mean over positions of layer l behind the norm that comes next, SOS fed; a logistic regression by
L-BFGS reads the classes, in memory: 4 bytes for each of images * layers * n_embd. ``--per-class`` bounds it.

Source: "Generative Pretraining from Pixels" (Chen et al., 2020), sections 3 and 4.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from igpt_fast.checks import whole_number
from igpt_fast.image.reading import open_image
from igpt_fast.recipes.protocol import command, load, measure, parser, read_split

SHORT, CROP = (256, 384), 224  # pixels: the short side of train, the square that is cut out
EXPECTED = {
    32: ("iGPT-L, best layer, 1536 features: 60.3 % (paper)",),
    48: ("iGPT-L, best layer, 1536 features: 65.2 % (paper)",),
    64: (
        "iGPT-XL, best layer, 3072 features: 68.7 % (paper)",
        "iGPT-XL, five layers concatenated, 15360 features: 72.0 % (paper)",
    ),
}


def read_train(path: Path, number: int, side: int, seed: int) -> np.ndarray:
    """(side, side, 3) uint8: a random square of a picture in a random size, drawn from its number and the seed."""
    draws = np.random.default_rng((seed, number))
    return _read(path, int(draws.integers(SHORT[0], SHORT[1] + 1)), side, draws.random(2))


def read_val(path: Path, number: int, side: int) -> np.ndarray:
    """(side, side, 3) uint8: the middle of a picture."""
    return _read(path, CROP, side, np.array((0.5, 0.5)))


def _read(path: Path, short: int, side: int, where: np.ndarray) -> np.ndarray:
    picture = open_image(path)
    scale = short / min(picture.size)
    width, height = (max(short, round(length * scale)) for length in picture.size)
    left, top = (np.rint(where * (width - CROP, height - CROP))).astype(int)
    # The square in the picture's own pixels, so that it is resized once and not the whole of it.
    box = tuple(np.array((left, top, left + CROP, top + CROP)) * np.tile(np.divide(picture.size, (width, height)), 2))
    square = picture.resize((CROP, CROP), Image.Resampling.BILINEAR, box=box)
    return np.asarray(square.resize((side, side), Image.Resampling.BILINEAR), np.uint8)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line of the script."""
    options = parser(__doc__, "all")
    options.add_argument("--side", type=int, choices=sorted(EXPECTED), default=32, help="of the model's images")
    options.add_argument("--per-class", type=int, help="so many images of each class to learn from; all if not given")
    args = options.parse_args(arguments)
    if args.per_class is not None:
        whole_number("--per-class", args.per_class)
    pipeline = load(args, args.side)
    reads = functools.partial(read_train, side=args.side, seed=args.seed), functools.partial(read_val, side=args.side)
    train, val = read_split(args.data, ("train", "val"), args.side, reads, args.per_class)
    return measure(pipeline, train, val, args, EXPECTED[args.side])


if __name__ == "__main__":
    command(main)
