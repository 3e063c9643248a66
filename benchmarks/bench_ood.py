"""How well scores tell strange pictures from held-out emoji: AUROC of raw nats and of ``Scores.ood``, twelve sets.

    python benchmarks/bench_ood.py --fashion /usr/share/datasets/fashion-mnist --json benchmarks/results/ood.json

The usual images are the 380 emoji that the bundled model never saw. Against them stand 200 of each set, at most:

- of another world: handwritten digits (scikit-learn ``load_digits``), clothes (Fashion-MNIST, of Debian's
  dataset-fashion-mnist), both as they are and inverted; squares cut out of photographs (scikit-image's
  samples); faces (scikit-image ``lfw_subset``);
- without a world: uniform noise; the emoji's own pixels shuffled; one constant colour; checkerboards of two colours;
- the emoji themselves, changed: upside down; red and blue exchanged.

Upside down stays in the mean, though neither measure sees it: what keeps colours and neighbourhoods keeps the
likelihood of most pixels. Two more of that kind, mirrored and turned, have rows of their own below the mean.

Exits with 1 where the mean of ood is below 0.84, or less than 0.10 ahead of that of raw nats.
"""

from __future__ import annotations

import argparse
import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import common
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from igpt_fast import Pipeline
from igpt_fast.files import BUNDLED
from igpt_fast.learning.data import load_tokens
from igpt_fast.likelihood.scores import Scores

FASHION = Path("/usr/share/datasets/fashion-mnist")
_MOST_BYTES = 64 << 20  # of an unpacked idx file
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "motorcycle_left", "motorcycle_right", "retina", "ihc")
COLUMNS = ("set", "images", "nats_per_pixel", "ood_bits", "auroc_raw", "auroc_ood", "note")
NOT_SEEN = "colours and neighbourhoods stay: not seen"
BLIND = dict.fromkeys(("upside down", "mirrored", "quarter turn"), NOT_SEEN)
BESIDE = ("mirrored", "quarter turn")  # not of the twelve
LEAST, AHEAD = 0.84, 0.10  # the mean of ood, and how far it is ahead of raw nats


def read_idx(path: Path) -> np.ndarray:
    """The (N, H, W) uint8 of a gzipped idx file.

    Raises:
        ValueError: Not such a file, or one that claims other sizes than it has.
    """
    with gzip.open(path) as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) < 16 or len(content) > _MOST_BYTES or content[:4] != b"\0\0\x08\x03":
        raise ValueError(f"{path}: not a gzipped idx file of 8-bit images within {_MOST_BYTES} bytes")
    shape = struct.unpack(">3I", content[4:16])
    if shape[0] * shape[1] * shape[2] != len(content) - 16:
        raise ValueError(f"{path}: claims {shape} pixels and has {len(content) - 16}")
    return np.frombuffer(content, np.uint8, offset=16).reshape(shape)


def photographs(count: int, random: np.random.Generator) -> list[Image.Image]:
    """Squares of random size and place."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    files = sorted(path for path in folder.iterdir() if path.stem in PHOTOGRAPHS)
    opened = [Image.open(path).convert("RGB") for path in files]
    crops = []
    for i in range(count):
        picture = opened[i % len(opened)]
        edge = int(random.integers(min(picture.size) // 8, min(picture.size)))
        left, top = (int(random.integers(0, side - edge + 1)) for side in picture.size)
        crops.append(picture.crop((left, top, left + edge, top + edge)))
    return crops


def sets(
    emoji: Tensor, pipeline: Pipeline, fashion: Path, count: int
) -> dict[str, Callable[[], list[Image.Image] | Tensor]]:
    """Name -> the images, or tokens, of a set."""
    from sklearn.datasets import load_digits

    side, colours = pipeline.processor.height, pipeline.model.config.n_colours
    random = np.random.default_rng(0)
    digits = np.rint(load_digits().images[:count] * (255 / 16)).astype(np.uint8)
    clothes = read_idx(fashion / "t10k-images-idx3-ubyte.gz")[:count]
    square = emoji.view(-1, side, side)

    def pictures(arrays: np.ndarray) -> list[Image.Image]:
        return [Image.fromarray(array) for array in arrays]

    def faces() -> list[Image.Image]:
        import skimage

        crops = np.load(Path(skimage.__file__).parent / "data" / "lfw_subset.npy", allow_pickle=False)[:100]
        return pictures(np.rint(crops * 255).astype(np.uint8))  # the second hundred are no faces

    def noise() -> list[Image.Image]:
        return pictures(random.integers(0, 256, (count, side, side, 3), dtype=np.uint8))

    def shuffled() -> Tensor:
        return torch.stack([row[torch.from_numpy(random.permutation(len(row)))] for row in emoji])

    def exchanged() -> list[Image.Image]:
        return [Image.fromarray(np.asarray(image)[..., ::-1].copy()) for image in pipeline.processor.decode(emoji)]

    def checkerboards() -> Tensor:
        cell = torch.from_numpy(random.integers(1, side // 2 + 1, (count, 1, 1)))
        pair = torch.from_numpy(random.integers(0, colours, (count, 2)))
        at = torch.arange(side)
        return pair.gather(1, ((at[:, None] // cell + at // cell) % 2).flatten(1))

    def constant() -> Tensor:
        return (torch.arange(count) % colours)[:, None].expand(-1, side * side).contiguous()

    return {
        "digits": lambda: pictures(digits),
        "digits, inverted": lambda: pictures(255 - digits),
        "fashion": lambda: pictures(clothes),
        "fashion, inverted": lambda: pictures(255 - clothes),
        "photographs": lambda: photographs(count, random),
        "faces": faces,
        "noise": noise,
        "shuffled pixels": shuffled,
        "constant": constant,
        "checkerboards": checkerboards,
        "upside down": lambda: square.flip(1).flatten(1),
        "red and blue exchanged": exchanged,
        "mirrored": lambda: square.flip(2).flatten(1),
        "quarter turn": lambda: square.rot90(1, (1, 2)).flatten(1),
    }


def row(name: str, scores: Scores, usual: Scores) -> dict[str, object]:
    aurocs = {"auroc_raw": scores.compare(usual, "nats_per_pixel"), "auroc_ood": scores.compare(usual, "ood")}
    means = {"nats_per_pixel": float(scores.nats_per_pixel.mean()), "ood_bits": float(scores.ood.mean())}
    return {"set": name, "images": len(scores), **means, **aurocs, "note": BLIND.get(name, "")}


def below(raw: float, ood: float) -> str:
    """What is said where the mean AUROCs miss their bars; nothing where they do not."""
    if ood >= LEAST and ood >= raw + AHEAD - 1e-9:
        return ""
    bars = f"{LEAST} at least, and {AHEAD} ahead"
    return f"the mean AUROC of ood is {ood:.3f}, of raw nats {raw:.3f}; want {bars}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=Path, default=FASHION, help="where dataset-fashion-mnist is unpacked")
    parser.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
    parser.add_argument("--images", type=int, default=200, help="of each set at most")
    options = parser.parse_args()
    pipeline = Pipeline.from_pretrained(device="cpu")
    emoji = load_tokens(BUNDLED.parent / "emoji16.npz").heldout_tokens.long()
    common.say("held-out emoji")
    usual = pipeline.score_tokens(emoji)
    some = emoji[torch.randperm(len(emoji), generator=torch.Generator().manual_seed(0))[: options.images]]
    rows = []
    for name, make in sets(some, pipeline, options.fashion, len(some)).items():
        common.say(name)
        found = make()
        scores = pipeline.score_tokens(found) if isinstance(found, Tensor) else pipeline.score(found)
        rows.append(row(name, scores, usual))
    counted = [each for each in rows if each["set"] not in BESIDE]
    mean = {key: float(np.mean([float(str(each[key])) for each in counted])) for key in ("auroc_raw", "auroc_ood")}
    rows.insert(len(counted), {"set": f"mean of the {len(counted)}", **mean})
    rows.append(row("held-out emoji", usual, usual))
    print(f"over {usual.palette}; higher = more unusual")
    print(common.table(rows, COLUMNS))
    if options.json:
        common.write(options.json, rows)
    if reason := below(mean["auroc_raw"], mean["auroc_ood"]):
        raise SystemExit(reason)


if __name__ == "__main__":
    main()
