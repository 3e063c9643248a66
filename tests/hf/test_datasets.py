"""The processor inside datasets and DataLoader: cached by what it says, in processes of their own."""

import functools
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets.fingerprint import Hasher
from PIL import Image
from torch.utils.data import DataLoader

from igpt_fast import ImageGPTImageProcessor

CLUSTERS = np.random.default_rng(0).uniform(-1, 1, (16, 3)).astype(np.float32)
PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)) for seed in range(8)
]


def processor(**settings: Any) -> ImageGPTImageProcessor:
    return ImageGPTImageProcessor(**{"clusters": CLUSTERS, "size": 8, **settings})


def tokens(**settings: Any) -> torch.Tensor:
    return processor(**settings)(PICTURES, return_tensors="pt").input_ids


def mapped(data: datasets.Dataset, ours: ImageGPTImageProcessor, **options: Any) -> datasets.Dataset:
    options = {"batched": True, "batch_size": 3, "remove_columns": "image", **options}
    return data.map(lambda batch: ours(batch["image"]), **options).with_format("torch")


def test_equal_processors_have_one_fingerprint(tmp_path: Path) -> None:
    ours = processor(do_center_crop=True, crop_size=6)
    ours.save_pretrained(tmp_path)
    loaded = ImageGPTImageProcessor.from_pretrained(tmp_path)
    loaded(PICTURES)  # use leaves no trace
    assert Hasher.hash(loaded) == Hasher.hash(ours)
    assert Hasher.hash(processor()) != Hasher.hash(processor(size=7))
    other = CLUSTERS.copy()
    other[3] += 1e-3
    assert Hasher.hash(processor(clusters=other)) != Hasher.hash(processor())


def test_map_takes_what_is_cached_for_equal_processors(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"image": PICTURES}, features=datasets.Features({"image": datasets.Image()}))
    made.save_to_disk(tmp_path / "data")
    data = datasets.load_from_disk(tmp_path / "data")
    first = mapped(data, processor())
    assert torch.equal(first["input_ids"][:], tokens())
    assert mapped(data, processor()).cache_files == first.cache_files
    other = mapped(data, processor(size=7))
    assert other.cache_files != first.cache_files
    assert torch.equal(other["input_ids"][:], tokens(size=7))


def test_map_in_two_processes() -> None:
    data = datasets.Dataset.from_dict({"image": PICTURES}, features=datasets.Features({"image": datasets.Image()}))
    assert torch.equal(mapped(data, processor(), num_proc=2)["input_ids"][:], tokens())


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_data_loader(context: str) -> None:
    wanted = tokens()  # here first: what a fork leaves behind does not serve the workers
    collate = functools.partial(processor(), return_tensors="pt")
    workers = 1 if context == "spawn" else 2  # a spawned one imports torch anew
    loader = DataLoader(PICTURES, 3, num_workers=workers, collate_fn=collate, multiprocessing_context=context)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in loader]), wanted)
