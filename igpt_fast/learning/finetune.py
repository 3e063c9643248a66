"""Fine-tunes a model to classify: which images are learned, which choose the best step, and the figures of the rest."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igpt_fast import files
from igpt_fast.checks import finite_number, whole_number
from igpt_fast.learning.data import ImageSet
from igpt_fast.learning.objectives.classification import (
    Classification,
    ImageGPTWithBothHeads,
    class_figures,
    fit_classifier,
)
from igpt_fast.learning.objectives.protocol import Data
from igpt_fast.learning.run import BEST, MODEL, check_directory, export
from igpt_fast.learning.schedule import augmented
from igpt_fast.learning.settings import FinetuneConfig, TrainConfig
from igpt_fast.learning.train import OnStep, Progress, _train
from igpt_fast.likelihood.nats import mean_nats
from igpt_fast.model import ImageGPTForCausalImageModeling

_CHUNK = 4096  # images whose labels are read at once
_MOST_FITTED, _COPIES = 10_000, 8  # images that a new classifier is fitted to, each augmented so often, if it may be


class Part:
    """``Data``: some images of others' training part, of which a fraction of each class is held out for validation.

    Args:
        data: The others.
        shots: Images of each class, those for validation included; ``None``: all.
        validation: Fraction of each class, rounded down.
        seed: Of the choice; fewer shots are some of more.

    Raises:
        ValueError: No classes or one, or a class that has fewer images.
    """

    def __init__(self, data: Data, shots: int | None, validation: float, seed: int) -> None:
        if data.n_classes < 2:
            raise ValueError(
                f"the images have {data.n_classes or 'no'} class{'' if data.n_classes == 1 else 'es'}; want 2"
            )
        self.data, self.height, self.width = data, data.height, data.width
        self.vocabulary, self.n_classes, self.class_names = data.vocabulary, data.n_classes, data.class_names
        labels = _train_labels(data)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        train, held = [], []
        for label, name in enumerate(data.class_names):
            own = order[labels[order] == label][:shots]
            if len(own) < (shots or 1):
                found = f"class {name!r} has {len(own)} images to train on"
                raise ValueError(found if shots is None else f"{found}; shots wants {shots}")
            count = int(len(own) * validation)
            held.append(own[:count])
            train.append(own[count:])
        self._train, self._held = torch.cat(train).tolist(), torch.cat(held).tolist()
        self.ready = getattr(data, "ready", False)  # see ``ImageSet``
        self.n_train, self.n_heldout = len(self._train), len(self._held)

    def train_batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """See ``objectives.protocol.Data``."""
        return self.data.train_batch([self._train[i] for i in indices])

    def heldout_batches(self, batch_size: int = 64) -> Iterator[tuple[Tensor, Tensor | None]]:
        """See ``objectives.protocol.Data``."""
        for first in range(0, self.n_heldout, batch_size):
            yield self.data.train_batch(self._held[first : first + batch_size])

    def fingerprint(self) -> str:
        """See ``objectives.protocol.Data``."""
        return hashlib.sha256(f"{self.data.fingerprint()} {self._train} {self._held}".encode()).hexdigest()


def _train_labels(data: Data) -> Tensor:
    """(N_train,) int64."""
    found = []
    for first in range(0, data.n_train, _CHUNK):
        _, labels = data.train_batch(range(first, min(first + _CHUNK, data.n_train)))
        assert labels is not None  # there are classes
        found.append(labels)
    return torch.cat(found)


def _augmented(part: Part, config: TrainConfig) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images to train on as training sees them, each a few times where they are few."""
    chosen = torch.randperm(part.n_train, generator=torch.Generator().manual_seed(0))[:_MOST_FITTED]
    copies = min(_COPIES, max(1, _MOST_FITTED // len(chosen)))
    for step, indices in enumerate(chosen.repeat(copies).split(64)):
        tokens, labels = part.train_batch(indices.tolist())
        yield augmented(step, tokens, part.height, part.width, config), labels


def load(name_or_path: str | os.PathLike[str]) -> ImageGPTWithBothHeads:
    """A model to fine-tune, in float32; of a model that draws, the classifier is new, and of one that has been
    fine-tuned it is the file's.

    Raises:
        FileNotFoundError, ValueError: As ``from_pretrained``.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*lacks score\.weight: newly")
        return ImageGPTWithBothHeads.from_pretrained(name_or_path, dtype="float32")


def random_weights(model: ImageGPTWithBothHeads, seed: int) -> ImageGPTWithBothHeads:
    """A model of the same configuration that has learned nothing; as in training, its first predictions are uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        fresh = ImageGPTWithBothHeads(model.config)
    for head in (fresh.lm_head, fresh.score):
        torch.nn.init.zeros_(head.weight)
    return fresh


def finetune(
    model: ImageGPTForCausalImageModeling,
    data: ImageSet,
    out: str | os.PathLike[str],
    config: FinetuneConfig = FinetuneConfig(),  # noqa: B008 - a frozen value
    *,
    device: str | torch.device = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Tunes a copy of a model to classify, and writes the best of it in transformers' layout.

    ``out/model`` has the weights of the step that was best on the part of the training images that is kept for
    validation: by accuracy, then by loss. The held-out images of ``data`` are looked at once, in the end. It loads as
    ``ImageGPTForImageClassification``, which puts SOS in front by itself (``config.classify_with_sos``), as
    ``ImageGPTForCausalImageModeling`` or ``Pipeline``, and by ``load`` to go on.

    Args:
        model: What to begin with; a head for the same classes is kept. Its weights stay as they are.
        data: Images with classes, of the model's colours and size.
        out: Directory of the run: ``log.jsonl``, whose ``heldout`` figures are those of the validation, ``train.pt``,
            ``model/``, and ``best.json``, the record of the step that ``model/`` is of.
        config: The run.
        device, resume, overwrite, progress, on_step: See ``run``.

    Returns:
        Where the model is, how many images did what, the step that was kept and its ``validation_accuracy``; of the
        held-out images ``accuracy``, ``class_loss`` and ``nats``, a pixel, and these before the first step. ``None``
        where there are no such images, or of a bidirectional model no nats.

    Raises:
        DivergedError, FileExistsError, FileNotFoundError, KeyboardInterrupt: See ``run``.
        ValueError: Fewer than two classes or too few images of one, other colours or another size than the model's, a
            bidirectional model with a ``gen_weight``; and whatever ``run`` raises.
    """
    out, network = Path(out), model.config
    before = check_directory(out, resume=resume, overwrite=overwrite)
    if data.vocabulary != network.n_colours:
        raise ValueError(f"the images have {data.vocabulary} colours, the model {network.n_colours}")
    if data.height * data.width != network.n_positions:
        size = f"{data.height}x{data.width} = {data.height * data.width} pixels"
        raise ValueError(f"the images have {size}, the model {network.n_positions}; see resize_positions")
    part = Part(data, config.shots, config.validation, config.seed)
    start = ImageGPTWithBothHeads.of(model, data.class_names).eval().to(device)
    objective = Classification(start, config.gen_weight, config.freeze_below)
    if not (resume or start.score.weight.any()):
        fit_classifier(start, _augmented(part, config.training(1, 1, 1)))

    def keep(tuned: ImageGPTWithBothHeads, record: dict[str, Any]) -> None:
        # Not by the log, which is cut off after a kill, while the model stays that of a step that is gone.
        if not (out / BEST).exists() or _rank(record) > _rank(_best(out / BEST)):
            (out / BEST).unlink(missing_ok=True)  # until the model is whole
            export(tuned, data, out / MODEL)
            with files.replacing(out / BEST) as partial:
                partial.write_text(json.dumps(record) + "\n", encoding="utf-8")

    training = config.training(network.n_layer, network.n_embd, network.n_head)
    how: dict[str, Any] = {"outdated": before if overwrite else (), "on_evaluation": keep, "on_step": on_step}
    tuned = _train(part, out, training, objective, device, resume, progress, **how).model
    best: dict[str, Any] = {"step": config.steps}
    if part.n_heldout:
        best = _best(out / BEST)
        tuned = ImageGPTWithBothHeads.from_pretrained(out / MODEL, device=device)
    else:
        export(tuned, data, out / MODEL)
    figures = class_figures(tuned, data.heldout_batches()) if data.n_heldout else {}
    drew = data.n_heldout and not network.bidirectional
    return {
        "model": str(out / MODEL),
        "parameters": tuned.num_parameters(),
        "steps": config.steps,
        "best_step": best["step"],
        "classes": data.n_classes,
        "train_images": part.n_train,
        "validation_images": part.n_heldout,
        "heldout_images": data.n_heldout,
        "validation_accuracy": best.get("heldout_accuracy"),
        **{name: figures.get(name) for name in ("accuracy", "class_loss", "nats")},
        "nats_before": mean_nats(start, data.heldout_batches()) if drew else None,
    }


def _rank(record: dict[str, Any]) -> tuple[float, float]:
    return record["heldout_accuracy"], -record["heldout_class_loss"]


def _best(path: Path) -> dict[str, Any]:
    """The record of the step that the model beside it is of."""
    record = files.read_json(path)
    try:
        whole_number("step", record.get("step"))
        finite_number("heldout_accuracy", record.get("heldout_accuracy"), 0, 1)
        finite_number("heldout_class_loss", record.get("heldout_class_loss"), 0)
    except ValueError as error:
        raise ValueError(f"{path}: not the record of a step: {error}") from error
    return record
