"""Learns Fashion-MNIST without labels, then asks how much the network knows of the labels, and what it must beat.

    python -m igpt_fast.recipes.fashion --out runs/fashion

The pictures are Debian's package ``dataset-fashion-mnist`` (Zalando's, Expat licence); without ``--path`` the script
fetches it with apt-get and unpacks it, installs nothing and needs no root. They become 14x14 pixels of 16 greys.
Stages, of which ``--stages`` names some, each on what the ones before have left in ``--out``:

- ``pretrain``: ``igpt train`` on the 60,000 training images without labels: 6 layers of 96, 1,500 steps of 32.
- ``probe``: ``learning.probe`` with 10,000 labels and 4,000 images of test, which no stage trains on.
- ``shifted``: the same with 6,000 labels, where all images are shifted by up to 4 pixels.
- ``finetune``: ``igpt finetune`` with 10 labels a class, three seeds: pretrained or from scratch; and at a higher rate,
  what the joint loss keeps of the nats that the classes alone lose.
- ``masked``: ``igpt train --objective masked`` on a smaller network, and what its features are worth, read unmasked,
  under one mask, and as the vote of five.

``results.json`` has all figures, ``results.md`` the tables, ``probe.png`` and ``shifted.png`` the curves.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import hashlib
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt_fast import files
from igpt_fast.learning import finetune
from igpt_fast.learning.classifiers import logistic, need_sklearn, standardised
from igpt_fast.learning.data import TokenData, load_tokens, save_tokens
from igpt_fast.learning.extraction import extract, random_twin
from igpt_fast.learning.objectives.masked import VOTES, Masked
from igpt_fast.learning.probe import probe
from igpt_fast.learning.probe_result import ProbeResult, need_matplotlib
from igpt_fast.learning.run import MODEL, run
from igpt_fast.learning.settings import FinetuneConfig, TrainConfig
from igpt_fast.model import ImageGPTForCausalImageModeling, ImageGPTModel
from igpt_fast.recipes.protocol import command

PACKAGE, FOLDER = "dataset-fashion-mnist", Path("usr/share/datasets/fashion-mnist")
INSTALLED = Path("/") / FOLDER
TRAIN, TEST = "train", "t10k"
SHA256 = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
MAX_FILE = 64 << 20  # bytes, of a compressed file
MAX_CONTENT = 64 << 20  # bytes, of what it unpacks to
SIDE, GREYS = 14, 16
CONCAT = 5  # layers
NETWORK: dict[str, Any] = {"n_layer": 6, "n_embd": 96, "n_head": 3}
FINETUNE: dict[str, Any] = {"shots": 10, "validation": 0.0, "steps": 100, "batch_size": 20, "lr": 5e-4, "dropout": 0.1}
FINETUNE_TEST, SEEDS = 2000, 3
ARMS: dict[str, tuple[bool, dict[str, float]]] = {  # pretrained or not, and what differs from FINETUNE
    "pretrained, joint": (True, {}),
    "from scratch, joint": (False, {}),
    "pretrained, joint, lr 2e-3": (True, {"lr": 2e-3}),
    "pretrained, classes alone, lr 2e-3": (True, {"lr": 2e-3, "gen_weight": 0.0}),
}
MASKED_NETWORK: dict[str, Any] = {"n_layer": 4, "n_embd": 64, "n_head": 2}
MASKED_LABELS, MASKED_TEST = 2000, 2000
READINGS = {"unmasked": 0, "one mask": 1, "vote of five": VOTES}  # masks of an image
RANDOM: dict[str, dict[str, float]] = {  # what differs from the trained network's configuration
    "random weights": {},
    "random weights, deviation 0.02": {"initializer_range": 0.02},
}
TEST_IMAGES, LABELS, SHIFTED_LABELS, SHIFT = 4000, 10_000, 6000, 4


def fetch(folder: Path) -> Path:
    """Downloads Debian's package into ``folder``, unpacks it there and returns where the files are.

    Raises:
        OSError: apt-get or dpkg-deb is not there, or fails.
    """
    _command(["apt-get", "download", PACKAGE], folder)
    (package,) = folder.glob(f"{PACKAGE}_*.deb")
    _command(["dpkg-deb", "-x", package.name, "."], folder)
    return folder / FOLDER


def _command(command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise OSError(f"{' '.join(command)} failed: {result.stderr.strip() or f'exit code {result.returncode}'}")


def read_idx(path: Path, shape: Sequence[int | None]) -> np.ndarray:
    """The bytes in a gzipped IDX file, (N,) or (N, H, W) uint8; ``shape`` has the lengths that are known.

    Raises:
        OSError: It cannot be read.
        ValueError: Not such a file, of another shape, damaged, or more than ``MAX_CONTENT``; the message names it.
    """
    try:
        with files.open_input(path) as file, gzip.open(file) as archive:
            header = archive.read(4 + 4 * len(shape))
            if len(header) < 4 + 4 * len(shape) or header[:4] != bytes((0, 0, 8, len(shape))):
                raise ValueError(
                    f"begins with {header[:4].hex()}, want 000008{len(shape):02x}, bytes in {len(shape)}-D"
                )
            found = tuple(int.from_bytes(header[at : at + 4], "big") for at in range(4, len(header), 4))
            if any(want not in (None, length) for want, length in zip(shape, found, strict=True)):
                raise ValueError(f"holds {found}, want {tuple('N' if want is None else want for want in shape)}")
            if not 0 < (size := math.prod(found)) <= MAX_CONTENT:
                raise ValueError(f"claims {size} bytes; want 1..{MAX_CONTENT}")
            content = archive.read(size + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise ValueError(f"{path}: not a usable IDX file: {files.first_line(error)}") from error
    if len(content) != size:
        raise ValueError(f"{path}: not a usable IDX file: holds {len(content)} bytes or more, its header says {size}")
    return np.frombuffer(content, np.uint8).reshape(found)


def check_sum(path: Path) -> None:
    """Raises ValueError where a file is not the one that the figures were measured on."""
    with files.open_input(path) as file:
        content = file.read(MAX_FILE + 1)
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256[path.name]:
        raise ValueError(f"{path}: SHA-256 is {digest}, expected {SHA256[path.name]} ({PACKAGE})")


def read_part(folder: Path, part: str, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) and labels (N,) uint8, the first ``most`` of ``"train"`` or ``"t10k"``.

    Raises:
        OSError, ValueError: See ``read_idx`` and ``check_sum``.
    """
    paths = [folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz"]
    for path in paths:
        check_sum(path)
    images, labels = read_idx(paths[0], (None, 2 * SIDE, 2 * SIDE)), read_idx(paths[1], (None,))
    if len(images) != len(labels):
        raise ValueError(f"{paths[1]}: {len(labels)} labels for {len(images)} images")
    return images[:most], labels[:most]


def shrink(images: np.ndarray) -> np.ndarray:
    """(N, 196) uint8 greys 0..15 of (N, 28, 28) uint8 pixels: the mean of 2x2, rounded."""
    means = images.reshape(-1, SIDE, 2, SIDE, 2).mean((2, 4), dtype=np.float32)  # (N, 14, 14)
    return np.rint(means / (255 / (GREYS - 1))).astype(np.uint8).reshape(len(images), -1)


def build(folder: Path) -> TokenData:
    """The data set: all training images, and of test the first ``TEST_IMAGES``, held out.

    Raises:
        OSError, ValueError: See ``read_part``.
    """
    parts = [read_part(folder, TRAIN), read_part(folder, TEST, TEST_IMAGES)]
    tokens = np.concatenate([shrink(images) for images, _ in parts])
    labels = np.concatenate([labels for _, labels in parts]).astype(np.int64)
    greys = np.arange(GREYS) * (255 / (GREYS - 1)) / 127.5 - 1
    palette = np.repeat(greys[:, None], 3, axis=1).astype(np.float32)  # (16, 3)
    heldout = torch.arange(len(tokens)) >= len(parts[0][0])
    return TokenData(torch.from_numpy(tokens), palette, heldout, labels=torch.from_numpy(labels), class_names=CLASSES)


def shifted(tokens: Tensor, most: int, seed: int) -> Tensor:
    """Images (N, 196), each shifted by -most .. most pixels along each axis; black comes in from outside."""
    images = torch.nn.functional.pad(tokens.view(-1, SIDE, SIDE), (most,) * 4)  # black is grey 0
    offsets = torch.randint(0, 2 * most + 1, (2, len(images), 1), generator=torch.Generator().manual_seed(seed))
    rows, columns = torch.arange(SIDE) + offsets  # (N, 14) each
    return images[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]].flatten(1)


def pretrain(data: TokenData, out: Path, seed: int, steps: int) -> dict[str, Any]:
    """Trains on the images alone, goes on with a run that was interrupted, and returns what ``run`` does."""
    config = TrainConfig(
        **NETWORK, steps=steps, batch_size=32, lr=3e-3, warmup_steps=100, dropout=0.0, seed=seed, eval_every=steps
    )
    return run(_unlabelled(data), out, config, resume=(out / "train.pt").exists(), progress=_progress)


def _unlabelled(data: TokenData) -> TokenData:
    return dataclasses.replace(data, labels=None, class_names=())


def measure_probe(data: TokenData, out: Path, seed: int, name: str, labels: int, shift: int) -> dict[str, Any]:
    """Probes the pretrained network with so many labels, on images that are shifted; ``curves`` is what draws them."""
    model = ImageGPTForCausalImageModeling.from_pretrained(out / "pretrain" / MODEL).eval()
    assert data.train_labels is not None
    assert data.heldout_labels is not None
    train = shifted(data.train_tokens[:labels], shift, seed + 1), data.train_labels[:labels]
    test = shifted(data.heldout_tokens, shift, seed + 2), data.heldout_labels
    result = probe(train, test, model, data.clusters, shots=[10], concat=CONCAT, seed=seed, progress=_told(name))
    found = {**result.to_dict(), "table": result.table(), "margins": margins(result)}
    return {name: found, "curves": lambda: result.plot(out / f"{name}.png")}


def margins(result: ProbeResult) -> dict[str, float]:
    """By how much the best features of the network are ahead of its random weights, and of raw pixels."""

    def best(kind: str, shots: int | None) -> float:
        wanted = (kind, "logistic", shots)
        return max(row.accuracy for row in result.rows if (row.kind, row.method, row.shots) == wanted)

    few = result.best(shots=10), result.best("random", shots=10)
    return {
        "best layer - best random layer, all labels": result.best().accuracy - result.best("random").accuracy,
        "best layer - best random layer, 10 a class": few[0].accuracy - few[1].accuracy,
        "best features - raw pixels, all labels": best("model", None) - best("raw", None),
    }


def measure_finetuning(data: TokenData, out: Path, seed: int) -> dict[str, Any]:
    """Fine-tunes the pretrained network and one with random weights, each ``SEEDS`` times, with 10 labels a class."""
    assert data.labels is not None
    seen = torch.cat([torch.nonzero(~data.heldout), torch.nonzero(data.heldout)[:FINETUNE_TEST]]).squeeze(1)
    parts: dict[str, Any] = {"tokens": data.tokens[seen], "heldout": data.heldout[seen], "labels": data.labels[seen]}
    images = dataclasses.replace(data, **parts)
    found: dict[str, Any] = {}
    for arm, (pretrained, own) in ARMS.items():
        for number in range(seed, seed + SEEDS):
            start = finetune.load(out / "pretrain" / MODEL)
            start = start if pretrained else finetune.random_weights(start, number)
            config = FinetuneConfig(**{**FINETUNE, **own, "seed": number})
            with tempfile.TemporaryDirectory() as folder:
                tuned = finetune.finetune(start, images, folder, config)
            for name in ("accuracy", "nats", "nats_before"):
                found.setdefault(arm, {}).setdefault(name, []).append(tuned[name])
            print(f"finetune: {arm}, seed {number}: {tuned}", file=sys.stderr, flush=True)
    mean = {arm: {name: float(np.mean(values)) for name, values in figures.items()} for arm, figures in found.items()}
    ahead = mean["pretrained, joint"]["accuracy"] - mean["from scratch, joint"]["accuracy"]
    gaps = {f"nats after - before, {arm}": mean[arm]["nats"] - mean[arm]["nats_before"] for arm in ARMS if ARMS[arm][0]}
    gaps["pretrained joint - from scratch joint, accuracy"] = ahead
    return {"runs": found, "mean": mean, "margins": gaps}


def measure_masked(data: TokenData, out: Path, seed: int, steps: int) -> dict[str, Any]:
    """Trains a bidirectional network on masked pixels, and reads its features and those of random weights: of the
    deviation that it began with, and of the paper's, which untrained is the better reader.
    """
    how: dict[str, Any] = {"steps": steps, "batch_size": 32, "lr": 5e-3, "warmup_steps": 100, "eval_every": steps}
    config = TrainConfig(**MASKED_NETWORK, **how, dropout=0.0, seed=seed)
    resume = (out / "train.pt").exists()
    trained = run(_unlabelled(data), out, config, resume=resume, progress=_progress, objective=Masked())
    model = ImageGPTForCausalImageModeling.from_pretrained(out / MODEL).eval()
    assert data.train_labels is not None
    assert data.heldout_labels is not None
    labels = data.train_labels[:MASKED_LABELS].numpy(), data.heldout_labels[:MASKED_TEST].numpy()
    tokens = data.train_tokens[:MASKED_LABELS], data.heldout_tokens[:MASKED_TEST]
    accuracy: dict[str, list[float]] = {}  # by layer
    networks: dict[str, ImageGPTModel] = {"trained": model.transformer}
    for kind, changed in RANDOM.items():
        networks[kind] = random_twin(ImageGPTModel(dataclasses.replace(model.config, **changed)), seed)
    for kind, network in networks.items():
        for name, masks in READINGS.items():
            train, test = (extract(network, part, masks=masks) for part in tokens)
            layers = [standardised(train[:, i], test[:, i]) for i in range(train.shape[1])]
            read = [logistic(one, labels[0], other, labels[1], seed).accuracy for one, other in layers]
            accuracy[f"{kind}, {name}"] = read
            print(f"masked: {kind}, {name}: {read}", file=sys.stderr, flush=True)
    return {**trained, "accuracy by layer": accuracy, "margins": masked_margins(accuracy)}


def masked_margins(accuracy: dict[str, list[float]]) -> dict[str, float]:
    """By how much a vote is ahead of one mask, over the layers, and training, in each reading, of the better random
    weights in theirs; all at the layer that is best by test.
    """
    gains = np.subtract(accuracy["trained, vote of five"], accuracy["trained, one mask"])
    random = {f"{kind}, best layer": max(max(accuracy[f"{kind}, {name}"]) for name in READINGS) for kind in RANDOM}
    ahead = {
        f"trained - better random weights, best layer, {name}": max(accuracy[f"trained, {name}"]) - max(random.values())
        for name in READINGS
    }
    return {"vote of five - one mask, mean of the layers": float(gains.mean()), **random, **ahead}


def _progress(record: dict[str, Any]) -> None:
    print(json.dumps(record), file=sys.stderr, flush=True)


def _told(name: str) -> Callable[[str, int, int], None]:
    def say(what: str, done: int, total: int) -> None:
        if done == total:
            print(f"{name}: {what}: {done} of {total}", file=sys.stderr, flush=True)

    return say


STAGES: dict[str, Callable[[TokenData, Path, argparse.Namespace], dict[str, Any]]] = {
    "pretrain": lambda data, out, args: {"pretrain": pretrain(data, out / "pretrain", args.seed, args.steps)},
    "probe": lambda data, out, args: measure_probe(data, out, args.seed, "probe", LABELS, 0),
    "shifted": lambda data, out, args: measure_probe(data, out, args.seed, "shifted", SHIFTED_LABELS, SHIFT),
    "finetune": lambda data, out, args: {"finetune": measure_finetuning(data, out, args.seed)},
    "masked": lambda data, out, args: {"masked": measure_masked(data, out / "masked", args.seed, args.steps)},
}


def _with_cost(stage: str, data: TokenData, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What a stage has found, and what it took: CPU-minutes of user time, and how busy the machine was."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    found = STAGES[stage](data, out, args)
    minutes = (resource.getrusage(resource.RUSAGE_SELF).ru_utime - before) / 60
    cost = {"cpu_minutes": round(minutes, 2), "load": os.getloadavg()[0], "threads": torch.get_num_threads()}
    return {**found, f"cost of {stage}": cost}


def tables(results: dict[str, Any]) -> str:
    """The results for people to read, in Markdown."""
    lines: list[str] = []
    for name, found in results.items():
        table = found.pop("table", None) if isinstance(found, dict) else None
        lines += [f"## {name}", ""]
        if table is not None:
            lines += ["```", table, "```", ""]
            found = found["margins"]
        told = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in found.items()}
        lines += [f"- {key}: {value}" for key, value in told.items()]
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, help=f"folder of the four .gz; {INSTALLED} where that is")
    parser.add_argument("--out", type=Path, default=Path("runs/fashion"), help="folder of everything that is written")
    parser.add_argument("--stages", default="pretrain,probe,shifted", help=f"some of {','.join(STAGES)}")
    parser.add_argument("--steps", type=int, default=1500, help="of pretraining")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    stages = args.stages.split(",")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        parser.error(f"--stages: unknown {files.listed(unknown)}; want some of {','.join(STAGES)}")
    if {"probe", "shifted", "masked"} & set(stages):
        need_sklearn("the probe")
    if {"probe", "shifted"} & set(stages):
        need_matplotlib()
    out: Path = args.out
    files.check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "fashion.npz").exists():
        with tempfile.TemporaryDirectory() as folder:
            source = args.path or (INSTALLED if INSTALLED.is_dir() else fetch(Path(folder)))
            save_tokens(build(source), out / "fashion.npz")
    data = load_tokens(out / "fashion.npz", classes=True)
    path = out / "results.json"
    results = files.read_json(path) if path.exists() else {}
    for stage in stages:
        found = _with_cost(stage, data, out, args)
        draw = found.pop("curves", None)
        results |= found
        with files.replacing(path) as partial:
            partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        if draw is not None:
            draw()
    text = tables(results)
    with files.replacing(out / "results.md") as partial:
        partial.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    command(main)
