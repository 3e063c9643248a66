"""Makes the pictures of README.md from the bundled model: ``python docs/make_pictures.py``. Needs scikit-image.

``samples.png``: the first sixteen images of seed 0, as ``make sample`` draws them. ``completions.png``: two photographs
that scikit-image ships, and held-out emoji at fixed places of the list, none of them chosen by what came out.
``classes.png``: the first six images of seed 0 of each class.
``inpainting.png``: four of the emoji with a hole. ``scores.png`` is made by ``igpt score --grid docs/scores.png``, and
``probe.png`` by ``python -m igpt_fast.recipes.fashion``, of the shifted images.
"""

from pathlib import Path

import numpy as np
from skimage import data

from igpt_fast import Pipeline
from igpt_fast.files import BUNDLED
from igpt_fast.image import image_grid
from igpt_fast.learning.data import load_tokens

HERE = Path(__file__).parent


def main() -> None:
    pipe = Pipeline.from_pretrained()
    pipe.sample(16, seed=0).save_grid(HERE / "samples.png")
    names = list(pipe.model.config.id2label.values())
    drawn = [pipe.sample(6, seed=0, labels=label, cfg_scale=2.0).images for label in range(len(names))]
    cells = [images[row] for row in range(6) for images in drawn]
    image_grid(cells, columns=len(names), scale=5, gap=6, headings=names).save(HERE / "classes.png")
    heldout = load_tokens(BUNDLED.parent / "emoji16.npz").heldout_tokens
    emoji = pipe.processor.decode(heldout[40 :: len(heldout) // 6])
    pipe.complete([data.astronaut(), data.coffee(), *emoji], n=4, seed=0).save_grid(HERE / "completions.png", scale=6)
    mask = np.ones((16, 16), dtype=bool)
    mask[5:11, 5:11] = False
    inpainted = pipe.complete(emoji[:4], keep=mask, n=4, candidates=16, seed=0)
    inpainted.save_grid(HERE / "inpainting.png", scale=6)


if __name__ == "__main__":
    main()
