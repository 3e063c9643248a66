"""transformers' automatic classes and pipelines, with our classes behind them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from small_models import small

import igpt_fast
from igpt_fast import (
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTImageProcessor,
    ImageGPTModel,
)
from igpt_fast.hf import auto

MODELS = {
    "AutoModel": ImageGPTModel,
    "AutoModelForCausalLM": ImageGPTForCausalImageModeling,
    "AutoModelForImageClassification": ImageGPTForImageClassification,
}
PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)) for seed in range(3)
]


@pytest.fixture
def registered() -> Iterator[None]:
    auto.register()
    yield
    auto.unregister()


def processor() -> ImageGPTImageProcessor:
    clusters = np.random.default_rng(0).uniform(-1, 1, (16, 3)).astype(np.float32)
    return ImageGPTImageProcessor(clusters=clusters, size=8)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    small(head=ImageGPTForImageClassification, num_labels=3).save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.filterwarnings("ignore:.*newly initialized")
@pytest.mark.parametrize("name", MODELS)
def test_models(registered: None, folder: str, name: str) -> None:
    made = getattr(transformers, name)
    assert type(made.from_pretrained(folder)) is MODELS[name]
    assert type(made.from_pretrained(pretrained_model_name_or_path=folder, trust_remote_code=True)) is MODELS[name]
    assert type(made.from_config(small().config)) is MODELS[name]


def test_a_configuration_of_transformers_stays_one(registered: None) -> None:
    theirs = transformers.ImageGPTConfig(n_embd=8, n_layer=1, n_head=1)
    assert type(transformers.AutoModel.from_config(theirs)) is transformers.ImageGPTModel


@pytest.mark.parametrize("kind", ["ImageGPTImageProcessor", "ImageGPTImageProcessorPil", "ImageGPTImageProcessorFast"])
@pytest.mark.parametrize("options", [{}, {"use_fast": True}, {"use_fast": False}, {"backend": "pil"}])
def test_processors(registered: None, folder: str, kind: str, options: dict[str, Any]) -> None:
    path = Path(folder) / "preprocessor_config.json"
    path.write_text(path.read_text().replace('"ImageGPTImageProcessor"', f'"{kind}"'))
    assert type(transformers.AutoImageProcessor.from_pretrained(folder, **options)) is ImageGPTImageProcessor
    path.write_text('{"size": 8}')  # then the model's config.json says what it is
    assert type(transformers.AutoImageProcessor.from_pretrained(folder, **options)) is ImageGPTImageProcessor


def test_it_can_be_said_twice_and_taken_back(folder: str) -> None:
    before = type(transformers.AutoConfig.from_pretrained(folder))
    auto.register()
    auto.register()
    assert type(transformers.AutoConfig.from_pretrained(folder)) is igpt_fast.ImageGPTConfig
    auto.unregister()
    auto.unregister()
    assert type(transformers.AutoConfig.from_pretrained(folder)) is before is transformers.ImageGPTConfig
    assert type(transformers.AutoImageProcessor.from_pretrained(folder)) is not ImageGPTImageProcessor
    assert type(transformers.AutoModel.from_pretrained(folder)) is transformers.ImageGPTModel


def classes(found: list[dict[str, Any]]) -> dict[str, float]:
    return {entry["label"]: entry["score"] for entry in found}


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("by", ["object", "folder"])
def test_image_classification(registered: None, folder: str, by: str, batch_size: int) -> None:
    model = ImageGPTForImageClassification.from_pretrained(folder)
    given: dict[str, Any] = {"model": model, "image_processor": processor()} if by == "object" else {"model": folder}
    pipe = transformers.pipeline("image-classification", batch_size=batch_size, **given)
    assert type(pipe.model) is ImageGPTForImageClassification
    assert type(pipe.image_processor) is ImageGPTImageProcessor
    with torch.no_grad():
        logits = model(**processor()(PICTURES, return_tensors="pt")).logits
    for found, wanted in zip(pipe(PICTURES), logits.softmax(-1).tolist(), strict=True):
        assert classes(found) == pytest.approx({f"LABEL_{i}": p for i, p in enumerate(wanted)}, rel=1e-4)


@pytest.mark.parametrize("by", ["object", "folder"])
def test_image_feature_extraction(registered: None, folder: str, by: str) -> None:
    model = ImageGPTModel.from_pretrained(folder)
    given: dict[str, Any] = {"model": model, "image_processor": processor()} if by == "object" else {"model": folder}
    pipe = transformers.pipeline("image-feature-extraction", **given)
    assert type(pipe.model) is ImageGPTModel
    with torch.no_grad():
        states = model(**processor()(PICTURES, return_tensors="pt")).last_hidden_state
    for pool, wanted in ((False, states), (True, states.mean(dim=1))):
        found = torch.cat(pipe(PICTURES, return_tensors=True, pool=pool))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_features_are_pooled_in_float32(registered: None, folder: str) -> None:
    pipe = transformers.pipeline("image-feature-extraction", model=folder, dtype=torch.bfloat16)
    states, pooled = (pipe(PICTURES[0], return_tensors=True, pool=pool) for pool in (False, True))
    assert states.dtype == torch.bfloat16
    assert torch.equal(pooled, states.float().mean(dim=1))


def test_pooling_is_for_our_models(registered: None, folder: str) -> None:
    task = "image-feature-extraction"
    theirs = transformers.pipeline(
        task, model=transformers.ImageGPTModel.from_pretrained(folder), image_processor=folder
    )
    with pytest.raises(ValueError, match="No pooled output"):
        theirs(PICTURES[0], pool=True)
    auto.unregister()
    own = transformers.pipelines.image_feature_extraction.ImageFeatureExtractionPipeline
    assert type(transformers.pipeline(task, model=folder)) is own
