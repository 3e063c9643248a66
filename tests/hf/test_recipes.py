"""The recipes of docs/transformers.md, run as they stand there, on a tiny model and no network."""

import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small

from igpt_fast import ImageGPTForImageClassification, ImageGPTImageProcessor
from igpt_fast.hf import unregister

PAGE = (Path(__file__).resolve().parents[2] / "docs/transformers.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
RECIPES = {
    title.lstrip("# "): "\n".join(BLOCK.findall(text))
    for title, _, text in (part.partition("\n") for part in PAGE.split("\n## "))
    if BLOCK.search(text)
}
COLOURS, SIDE = 16, 8


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a recipe in a folder with a photograph, beside a checkpoint and a data set that stand in for the hub's."""
    name = tmp_path / "checkpoint"
    sizes = {"vocab_size": COLOURS + 1, "n_positions": SIDE * SIDE}
    small(head=ImageGPTForImageClassification, spread=0.05, num_labels=10, **sizes).save_pretrained(name)
    clusters = np.random.default_rng(0).uniform(-1, 1, (COLOURS, 3)).astype(np.float32)
    ImageGPTImageProcessor(clusters=clusters, size=SIDE).save_pretrained(name)
    pictures = np.random.default_rng(1).integers(0, 128, (12, 32, 32, 3), dtype=np.uint8)
    pictures[1::2] += 128  # dark ones and bright ones
    columns = {"img": [Image.fromarray(item) for item in pictures], "label": [i % 2 for i in range(12)]}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(10)})
    data = datasets.DatasetDict({part: datasets.Dataset.from_dict(columns, features) for part in ("train", "test")})
    monkeypatch.setattr(datasets, "load_dataset", {"uoft-cs/cifar10": data}.__getitem__)
    monkeypatch.chdir(tmp_path)
    columns["img"][0].save("photo.jpg")

    def execute(title: str) -> dict[str, Any]:
        namespace: dict[str, Any] = {"__name__": "recipe"}
        code = RECIPES[title].replace('"openai/imagegpt-small"', repr(str(name))).replace("[[512]]", f"[[{COLOURS}]]")
        exec(compile(code, title, "exec"), namespace)
        return namespace

    return execute


def test_the_same_names(run: Any) -> None:
    found = run("Coming from transformers")
    assert found["tokens"].shape == (8, SIDE * SIDE + 1)
    assert found["outputs"].loss.isfinite()
    assert (Path("copy") / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore")
def test_trainer_and_lora(run: Any) -> None:
    found = run("Fine-tune with Trainer, whole or by LoRA")
    names = {path.name for path in Path("runs/cifar10").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= names
    assert found["trainer"].state.global_step == 2
    before, after = (
        ImageGPTForImageClassification.from_pretrained(folder).transformer.wte.weight
        for folder in ("checkpoint", "runs/cifar10")
    )
    assert not torch.equal(before, after)
    assert torch.equal(after, found["model"].transformer.wte.weight)  # which LoRA leaves
    assert Path("runs/adapter/adapter_model.safetensors").exists()


def test_pipelines(run: Any) -> None:
    try:
        found = run("The automatic classes and pipelines")
    finally:
        unregister()
    for made in (found["model"], found["classify"].model, found["extract"].model, found["processor"]):
        assert type(made).__module__.startswith("igpt_fast.")


def test_sampling(run: Any) -> None:
    found = run("Sample and complete, step by step")
    assert found["tokens"].shape == (4, SIDE * SIDE + 1)
    assert torch.equal(found["tokens"][:, 1 : SIDE * SIDE // 2 + 1], found["half"])
    assert [image.size for image in found["samples"] + found["completions"]] == [(SIDE, SIDE)] * 8


def test_probe(run: Any) -> None:
    found = run("A linear probe on features")
    assert found["probe"].n_features_in_ == found["model"].config.n_embd
    assert found["probe"].score(found["test"]["features"][:], found["test"]["label"][:]) == 1.0


@pytest.mark.filterwarnings("ignore")
def test_onnx(run: Any) -> None:
    found = run("Export to ONNX")
    with torch.no_grad():
        wanted = found["model"](found["example"][:1, :5])[0]
    torch.testing.assert_close(torch.from_numpy(found["logits"]), wanted, rtol=1e-4, atol=1e-4)


def test_accelerated(run: Any) -> None:
    found = run("Keep transformers' own model, and make it fast")
    assert type(found["model"]).__name__ == "ImageGPTForCausalImageModeling"
    assert isinstance(found["model"], found["transformers"].ImageGPTForCausalImageModeling)
    assert found["tokens"].shape == (1, SIDE * SIDE + 1)


def test_no_recipe_is_left_out() -> None:
    assert len(RECIPES) == 7
    assert len(BLOCK.findall(PAGE)) == 8  # one has two: LoRA goes on from the Trainer's
