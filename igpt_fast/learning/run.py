"""A whole training run in a directory: training, checkpoint, model, samples."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from igpt_fast.learning import checkpoints
from igpt_fast.learning.data import ImageSet
from igpt_fast.learning.evaluate import histogram_nats, lookup_table_nats
from igpt_fast.learning.objectives.next_pixel import NextPixel
from igpt_fast.learning.objectives.protocol import Objective
from igpt_fast.learning.reconstruction import draw_reconstructions
from igpt_fast.learning.settings import Execution, TrainConfig
from igpt_fast.learning.state import CHECKPOINT, LOG, TENSORBOARD
from igpt_fast.learning.train import OnStep, Progress, _train
from igpt_fast.model import ImageGPTForCausalImageModeling
from igpt_fast.world import World

_BASELINE_TOKENS = 1 << 22  # that the baselines learn from, of a data set that is not in memory
MODEL, SAMPLES, BEST = "model", "samples.png", "best.json"  # what a run's directory holds besides checkpoint and log
_MODEL_FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "generation_config.json")


def run(
    data: ImageSet,
    out: str | os.PathLike[str],
    config: TrainConfig,
    *,
    objective: Objective | None = None,
    device: str | torch.device = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    save_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    execution: Execution = Execution(),  # noqa: B008 - a frozen value
    world: World | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """The whole recipe: trains, then writes the model in transformers' layout and a grid of its samples, or, if it was
    trained on masked images and cannot draw, of what it makes of some.

    Args:
        data: What to train and evaluate on.
        out: Directory of the run: ``log.jsonl``, ``train.pt``, and at the end ``model/`` and ``samples.png``.
        config, objective, device, progress, execution, world: See ``train``.
        on_step: See ``OnStep``.
        resume: Continue the run in ``out``.
        overwrite: Start afresh where ``out`` holds a run; its files are removed when the first new one is written.
        save_dtype: Type of the weights in ``model/``; that of the training, float32, if not given.

    Returns:
        Where the model is, its size, and its held-out nats per token beside the baselines', which of a data set that is
        not in memory are those of a part of 4 million tokens to learn from; ``None`` for
        figures of a held-out part that is empty. With classes also how many, and the nats of images whose class is
        known, ``heldout_class_nats``; of masked images ``heldout_masked_nats`` alone, beside the histogram's.
        If steps were made, the throughput of the last, see ``throughput.Meter``. Other processes than the first return
        nothing, as soon as they are done.

    Raises:
        FileExistsError: ``out`` holds a run, with neither ``resume`` nor ``overwrite``.
        ValueError: Both of them; and whatever ``train`` raises.
    """
    out = Path(out)
    before = check_directory(out, resume=resume, overwrite=overwrite)
    objective = objective or NextPixel(config.label_dropout)
    outdated = before if overwrite else ()
    how: dict[str, Any] = {"outdated": outdated, "execution": execution, "world": world, "on_step": on_step}
    trained = _train(data, out, config, objective, device, resume, progress, **how)
    model, measured = trained.model, trained.heldout
    if world is not None and not world.first:
        return {}
    export(model, data, out / MODEL, save_dtype)
    drawn = data.tokenizer.clusters is not None  # of other tokens there is nothing to see
    if drawn and model.config.bidirectional:
        draw_reconstructions(out / MODEL, data, out / SAMPLES)
    elif drawn:
        _draw_samples(out, data.n_classes)
    held, seen = data.n_heldout, data.in_memory(max(64, _BASELINE_TOKENS // data.tokenizer.length))
    measured = measured or objective.evaluate(model, data)  # a finished run, resumed
    if model.config.bidirectional:
        figures = {"heldout_masked_nats": measured.get("heldout_masked_nats")}
    else:
        figures = {"heldout_nats": measured.get("heldout_nats")}
        figures["lookup_table_nats"] = lookup_table_nats(seen) if held else None
    if model.config.n_classes:
        figures |= {"classes": data.n_classes, "heldout_class_nats": measured.get("heldout_class_nats")}
    return {
        "model": str(out / MODEL),
        "samples": str(out / SAMPLES) if drawn else None,
        "parameters": model.num_parameters(),
        "steps": config.steps,
        "images": data.n_train + held,
        "skipped": data.skipped,
        "heldout_images": held,
        "histogram_nats": histogram_nats(seen) if held else None,
        **figures,
        **trained.throughput,
    }


def check_directory(out: Path, *, resume: bool, overwrite: bool) -> list[Path]:
    """The files of an earlier run in ``out``.

    Raises:
        FileExistsError, ValueError: See ``run``.
    """
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other")
    # By name: a directory that holds other things as well loses none of them.
    own = [out / CHECKPOINT, *checkpoints.finished(out), out / LOG, out / SAMPLES, out / BEST]
    own += [*(out / MODEL / name for name in _MODEL_FILES), *(out / TENSORBOARD).glob("events.out.tfevents.*")]
    before = [path for path in own if path.exists()]
    if before and not (resume or overwrite):
        what = f"{out}: holds a run already ({before[0].name})"
        raise FileExistsError(f"{what}; resume it (--resume) or overwrite it (--force)")
    return before


def export(
    model: ImageGPTForCausalImageModeling,
    data: ImageSet,
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
) -> None:
    """Writes ``config.json``, ``model.safetensors``, ``generation_config.json`` and, where the tokens are colours,
    ``preprocessor_config.json``: a model of other codes makes no pictures by itself.

    Args:
        model: The model.
        data: Its clusters and size.
        folder: Made if it does not exist.
        dtype: Type of the weights in the file; the model's own if not given.
    """
    from igpt_fast.image import ImageGPTImageProcessor

    state = {name: value.to(dtype or value.dtype) for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    if data.tokenizer.clusters is not None:
        size = {"height": data.height, "width": data.width}
        ImageGPTImageProcessor(clusters=data.tokenizer.clusters, size=size).save_pretrained(folder)


def _draw_samples(out: Path, n_classes: int) -> None:
    """From the files just written, so that they are known to load; of the classes in turn."""
    from igpt_fast.pipeline import Pipeline

    labels = [i % n_classes for i in range(16)] if n_classes else None
    Pipeline.from_pretrained(out / MODEL, device="cpu").sample(16, seed=0, labels=labels).save_grid(out / SAMPLES)
