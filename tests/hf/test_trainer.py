"""transformers' Trainer on our models: its checkpoints are whole, and it recomputes as it does with its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_models import small

import igpt_fast

IMAGES = [{"input_ids": torch.arange(i, i + 8) % 16, "labels": torch.arange(i, i + 8) % 16} for i in range(8)]
CLASSES = [{"input_ids": image["input_ids"], "labels": torch.tensor(i % 3)} for i, image in enumerate(IMAGES)]


def trained(model: Any, data: list[dict[str, Any]], folder: Path, **options: Any) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, **options
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    return trainer


def test_a_checkpoint_is_whole(tmp_path: Path) -> None:
    names = {0: "cat", 1: "dog", 2: "emu"}
    model = small(head=igpt_fast.ImageGPTForImageClassification, id2label=names, attn_pdrop=0.0)
    trainer = trained(model, CLASSES, tmp_path, save_steps=2)
    trainer.save_model(str(tmp_path / "last"))
    for folder in (tmp_path / "checkpoint-2", tmp_path / "last"):
        assert {"config.json", "model.safetensors"} <= {path.name for path in folder.iterdir()}
        assert json.loads((folder / "config.json").read_text())["architectures"] == [type(model).__name__]
        again = igpt_fast.ImageGPTForImageClassification.from_pretrained(folder)
        theirs = transformers.ImageGPTForImageClassification.from_pretrained(folder)
        assert again.config.id2label == theirs.config.id2label == names
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
    metrics = trainer.evaluate()
    assert 0 < metrics["eval_loss"] < 20
    predicted = trainer.predict(CLASSES)  # type: ignore[arg-type]
    assert predicted.predictions.shape == (8, 3)  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{}, {"every_n_layers": 2}, {"offload": True}, {"use_reentrant": True}])
def test_recomputation(tmp_path: Path, options: dict[str, Any]) -> None:
    losses = []
    for recompute in (False, True):
        model = small(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        keywords = {"gradient_checkpointing_kwargs": options} if recompute and options else {}
        trainer = trained(model, IMAGES, tmp_path, gradient_checkpointing=recompute, save_strategy="no", **keywords)
        assert model.is_activation_checkpointing == recompute
        losses.append(trainer.state.log_history[-1]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_resumed(tmp_path: Path) -> None:
    model = small()
    trained(model, IMAGES, tmp_path, save_steps=1)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True
    )
    trainer = transformers.Trainer(model=small(seed=5), args=arguments, train_dataset=IMAGES)  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
