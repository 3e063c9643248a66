"""Builds the bundled emoji data set from the npm package ``emoji-datasource`` 16.0.0.

Only two sheets of the package are read: Google's Noto Emoji (Apache-2.0) and Twitter's Twemoji (CC-BY-4.0).
The package also carries sets that are not free; they are never unpacked.

    npm pack emoji-datasource@16.0.0
    python -m igpt_fast.recipes.emoji emoji-datasource-16.0.0.tgz --out igpt_fast/assets/emoji16.npz

Without a path the script runs ``npm pack`` itself. The result is a token file (see ``igpt_fast.learning.data``) with
``names`` such as ``noto/1F600``, and the emoji's categories as classes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from igpt_fast.image.clusters import fit_clusters, quantize
from igpt_fast.learning.data import TokenData, save_tokens
from igpt_fast.recipes.protocol import command

PACKAGE = "emoji-datasource@16.0.0"
SHA256 = "2006725061dc0098daa832d65f854a7bec0740af2eb47cb5b23d89f7e2c849f9"
SHEETS = {"noto": "package/img/google/sheets/32.png", "twemoji": "package/img/twitter/sheets/32.png"}
# Unicode's categories, and what the classes are called after them.
CLASSES = {
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}
CELL, PITCH = 32, 34  # pixels of a cell, and from one cell to the next; one transparent pixel around each


def fetch(folder: Path) -> Path:
    """Downloads the package with ``npm pack`` into ``folder`` and returns its path.

    Raises:
        OSError: npm is not installed, or fails.
    """
    call = ["npm", "pack", PACKAGE, "--silent", "--pack-destination", str(folder)]
    result = subprocess.run(call, capture_output=True, text=True)
    if result.returncode or not result.stdout.strip():
        raise OSError(f"{' '.join(call)} failed: {result.stderr.strip() or 'no file name printed'}")
    return folder / result.stdout.split()[-1]


def unpack(tarball: Path) -> tuple[list[dict], dict[str, Image.Image]]:
    """The list of emoji and the two sheets.

    Raises:
        ValueError: The file is not the package this data set is defined by.
    """
    content = tarball.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{tarball}: SHA-256 is {digest}, expected {SHA256} ({PACKAGE})")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:

        def read(name: str) -> bytes:
            member = archive.extractfile(name)
            if member is None:
                raise ValueError(f"{tarball}: {name} is not a file")
            return member.read()

        records = json.loads(read("package/emoji.json"))
        sheets = {name: Image.open(io.BytesIO(read(path))).convert("RGBA") for name, path in SHEETS.items()}
    return records, sheets


def family(unified: str) -> str:
    """Emoji that look alike share a family, so that none of them is trained on while another is held out.

    ``unified`` is the code point sequence, ``1F468-200D-1F52C``. Gender and the man/woman/person base are
    dropped; flags go by the first letter of their country, keycaps together, all others by the block of
    eight code points their first symbol stands in (clock faces, moons, cats stand side by side in Unicode).
    """
    codes = [int(part, 16) for part in unified.split("-")]
    if codes[-1] == 0x20E3:
        return "keycap"
    if 0x1F1E6 <= codes[0] <= 0x1F1FF:
        return f"flag {codes[0]:X}"
    people = {0x1F468, 0x1F469, 0x1F9D1, 0x1F467, 0x1F466, 0x1F9D2}
    rest = [c for c in codes if c not in {0xFE0F, 0x200D, 0x2640, 0x2642} | people]
    if not rest or 0x1F48B in rest or (codes[0] in people and 0x2764 in rest):
        return "people"
    return f"block {rest[0] >> 3:X}"


def hold_out(families: list[str], fraction: float) -> set[str]:
    """Families, in an order that depends on their names alone, until ``fraction`` of the emoji is covered."""
    size = {name: families.count(name) for name in set(families)}
    chosen: set[str] = set()
    covered = 0
    for name in sorted(size, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        if covered + size[name] <= fraction * len(families):
            chosen.add(name)
            covered += size[name]
    return chosen


def cells(records: list[dict], sheet: Image.Image) -> list[Image.Image]:
    """The (32, 32) RGB picture of every record, composited on white."""
    white = Image.new("RGBA", sheet.size, "white")
    opaque = Image.alpha_composite(white, sheet).convert("RGB")
    corners = [(record["sheet_x"] * PITCH + 1, record["sheet_y"] * PITCH + 1) for record in records]
    return [opaque.crop((x, y, x + CELL, y + CELL)) for x, y in corners]


def build(tarball: Path, side: int = 16, n_clusters: int = 128, seed: int = 0) -> tuple[TokenData, list[str]]:
    """The data set, and the name of each image.

    The skin-tone variants stand in a sub-table of their records and are not read; the five bare skin-tone
    swatches (category ``Component``) are left out too. White, the background, is the first cluster.

    Raises:
        ValueError: See ``unpack``.
    """
    records, sheets = unpack(tarball)
    records = [r for r in records if r["category"] != "Component"]
    families = [family(r["unified"]) for r in records]
    held = hold_out(families, 0.10)
    heldout = np.array([name in held for name in families] * len(sheets))
    names = [f"{name}/{r['unified']}" for name in sheets for r in records]
    originals = [cell for sheet in sheets.values() for cell in cells(records, sheet)]
    pictures = np.stack([np.asarray(cell.resize((side, side), Image.Resampling.BILINEAR)) for cell in originals])
    white = ((255, 255, 255),)
    clusters = fit_clusters(pictures[~heldout], n_clusters, seed=seed, pinned=white, all_pixels=True)
    tokens = quantize(pictures, clusters).reshape(len(pictures), -1)
    found = [name for category, name in CLASSES.items() if any(r["category"] == category for r in records)]
    labels = torch.tensor([found.index(CLASSES[r["category"]]) for r in records] * len(sheets))
    data = TokenData(torch.from_numpy(tokens), clusters, torch.from_numpy(heldout), labels=labels, class_names=found)
    return data, names


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tarball", type=Path, nargs="?", help="the package; fetched with npm when not given")
    parser.add_argument("--out", type=Path, required=True, help="the .npz to write")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        data, names = build(args.tarball or fetch(Path(folder)))
    save_tokens(data, args.out, names=names)
    held = len(data.heldout_tokens)
    print(f"{args.out}: {len(names)} images, {held} held out, {args.out.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    command(main)
