"""``igpt finetune``: a model that draws becomes one that classifies as well."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import OmitArgPrefixes, Positional

from igpt_fast import processes
from igpt_fast.cli import checks, progress, terminal
from igpt_fast.learning.settings import FinetuneConfig

if TYPE_CHECKING:
    from igpt_fast.learning.data import ImageSet


def finetune(
    model: Positional[str],
    data: Positional[Path],
    out: Path = Path("runs/finetune"),
    holdout: float | None = None,
    skip_unreadable: bool = False,
    scratch: bool = False,
    resume: bool = False,
    device: str | None = None,
    backend: checks.Backend = "auto",
    config: OmitArgPrefixes[FinetuneConfig] = FinetuneConfig(),  # noqa: B008 - a frozen value
    json: bool = False,
    force: bool = False,
) -> None:
    """Fine-tune a model to classify images; it still draws, and serves as ImageGPTForImageClassification.

    Example: igpt finetune runs/train/model labelled/ --out runs/classify

    Args:
        model: A folder or hub name of a model with its colours.
        data: A directory whose sub-directories are the classes, or a token file or shards with labels, in the model's
            colours.
        out: Directory for model/, log.jsonl and the training state.
        holdout: Fraction of a directory's images that is held out, for the figures at the end; 0.1 if not given.
        skip_unreadable: Leave out files that are not readable images, instead of failing.
        scratch: Begin with random weights, to see what the training before is worth.
        resume: Continue an interrupted run; the settings must be the same.
        device: cpu, cuda, cuda:N or mps; cuda if torch has it, if not given.
        backend: auto, reference, cpu or cuda; see igpt env.
        config: The run.
        json: Print one JSON object.
        force: Start afresh in a directory that holds a run.
    """
    if (count := processes.size()) > 1:
        raise checks.UsageError(f"{count} processes would tune the same model into the same files; start one")
    if resume and force:
        raise checks.UsageError("--resume goes on with a run, --force starts afresh; give one of them")
    if holdout is not None and not 0.0 <= holdout < 1.0:
        raise checks.UsageError(f"--holdout is {holdout}; want a fraction in [0, 1)")
    if not data.exists():
        raise FileNotFoundError(f"{data}: no such file or directory")
    if not data.is_dir() and (holdout is not None or skip_unreadable):
        raise checks.UsageError("--holdout, --skip-unreadable: only for a directory; a token file is taken as it is")
    checks.choose_backend(backend)
    device_ = checks.choose_device(device)
    from igpt_fast.learning import finetune as tuning
    from igpt_fast.learning import run
    from igpt_fast.learning.objectives.classification import Classification

    how: dict[str, Any] = {"resume": resume, "overwrite": force}
    run.check_directory(out, **how)  # before the images are read, which takes its time
    start = tuning.load(model)
    with checks.as_usage():
        Classification(start, config.gen_weight, config.freeze_below)
    if scratch:
        start = tuning.random_weights(start, config.seed)
    tokens = _tokens(model, data, 0.1 if holdout is None else holdout, skip_unreadable)
    with progress.training(out, config.steps, config.batch_size) as told:
        how |= {"progress": told.record, "on_step": told.step}
        summary = tuning.finetune(start, tokens, out, config, device=device_, **how)
    terminal.report(json, summary, _text(summary))


def _text(summary: dict[str, Any]) -> str:
    text = f"{summary['model']}: {summary['classes']} classes, {summary['train_images']} images, step"
    text += f" {summary['best_step']} of {summary['steps']}"
    if summary["validation_accuracy"] is not None:
        text += f" ({summary['validation_accuracy']:.3f} of {summary['validation_images']} for validation)"
    if summary["accuracy"] is None:
        return f"{text}; no images are held out"
    text += f", {summary['accuracy']:.4f} of {summary['heldout_images']} held-out images right"
    before = f" ({terminal.nats(summary['nats_before'])} before)"
    return f"{text}, {terminal.nats(summary['nats'])} nats/token{before}" if summary["nats"] is not None else text


def _tokens(model: str, data: Path, holdout: float, skip_unreadable: bool) -> ImageSet:
    """With classes, in the model's colours."""
    import numpy as np

    from igpt_fast.learning.data import load_tokens
    from igpt_fast.learning.folders import tokens_from_images
    from igpt_fast.learning.shards import ShardData, is_shards

    processor = checks.read_processor(model)
    if processor.clusters is None:
        raise ValueError(f"{model}: its preprocessor_config.json has no clusters")
    colours = np.asarray(processor.clusters, dtype=np.float32)
    if not data.is_dir() or is_shards(data):
        tokens = ShardData(data, classes=True) if data.is_dir() else load_tokens(data, classes=True)
        theirs = tokens.tokenizer.clusters
        if theirs is None or not np.array_equal(theirs, colours):
            raise ValueError(f"{data}: its colours are not those of {model}; tokenize its images with these")
        return tokens
    if processor.height != processor.width:
        size = f"{processor.height}x{processor.width}"
        raise ValueError(f"{model}: its images are {size}, and no squares; tokenize {data} first")
    how: dict[str, Any] = {"skip_unreadable": skip_unreadable, "classes": True}
    return tokens_from_images(data, processor.height, len(colours), holdout, clusters=colours, **how)
