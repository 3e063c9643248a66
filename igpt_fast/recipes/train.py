"""Trains an iGPT: images -> clusters -> tokens -> model. One readable script behind ``igpt train``.

The objective is the paper's: the input is ``[SOS, x_0 .. x_{T-2}]`` and position ``t`` predicts ``x_t``, so that
every pixel counts. With classes, the token of the image's own stands in place of SOS, most of the time; it is no
target, and the loss is that of the colours alone. AdamW(0.9, 0.95), linear warm-up, cosine decay to zero, gradient
clipping, optional bf16 autocast. The budget is in steps. Each step draws its images, augmentations and dropouts from
generators seeded with (seed, step): a resumed run is bit-identical to one that was never interrupted.

Source: "Generative Pretraining from Pixels" (Chen et al., 2020), section 3 and appendix.
"""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt_fast import files, ops
from igpt_fast.config import ImageGPTConfig
from igpt_fast.model import ImageGPTForCausalImageModeling
from igpt_fast.recipes.data import TokenData, histogram_nats, load_tokens, lookup_table_nats
from igpt_fast.recipes.output import CHECKPOINT, LOG, Output, check_writable
from igpt_fast.recipes.settings import TrainConfig
from igpt_fast.recipes.state import TrainState, same_run

__all__ = ["DivergedError", "TokenData", "TrainConfig", "evaluate", "image_nats", "load_tokens", "run", "train"]

LOG_EVERY = 50  # steps
MODEL, SAMPLES = "model", "samples.png"  # what a run's directory holds besides the output's files
_GENERATION = "generation_config.json"
_MODEL_FILES = ("config.json", "model.safetensors", "preprocessor_config.json", _GENERATION)

Progress = Callable[[dict[str, Any]], None]


class DivergedError(RuntimeError):
    """The loss or its gradient is no longer a finite number."""


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up to ``lr``, then a cosine to zero at ``steps``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def batch_at(step: int, tokens: Tensor, side: int, config: TrainConfig) -> Tensor:
    """The augmented batch of a step, (B, T) int64: a pass over all images before any comes again."""
    batch = tokens[_chosen_at(step, len(tokens), config)].long().view(-1, side, side)
    generator = torch.Generator().manual_seed(_mix(config.seed, 2, step))
    if config.flip:
        flipped = torch.rand(len(batch), generator=generator) < 0.5
        batch = torch.where(flipped[:, None, None], batch.flip(-1), batch)
    if config.shift:
        # A shift of -shift .. shift along each axis; the border repeats.
        offsets = torch.randint(-config.shift, config.shift + 1, (2, len(batch), 1), generator=generator)
        rows, columns = (torch.arange(side) + offsets).clamp(0, side - 1)
        batch = batch[torch.arange(len(batch))[:, None, None], rows[:, :, None], columns[:, None, :]]
    return batch.reshape(len(batch), -1)


def labels_at(step: int, labels: Tensor, config: TrainConfig) -> Tensor:
    """The classes (B,) of the batch of a step, -1 for the images that are learned without."""
    batch = labels[_chosen_at(step, len(labels), config)]
    generator = torch.Generator().manual_seed(_mix(config.seed, 4, step))
    return batch.masked_fill(torch.rand(len(batch), generator=generator) < config.label_dropout, -1)


def _chosen_at(step: int, n: int, config: TrainConfig) -> list[int]:
    """Which of n images are the batch of a step."""
    positions = range(step * config.batch_size, (step + 1) * config.batch_size)
    return [int(_permutation(n, config.seed, p // n)[p % n]) for p in positions]


def _mix(seed: int, stream: int, step: int) -> int:
    """A seed per (run, stream, step)."""
    return ((seed * 1_000_003 + stream) * 1_000_000_007 + step) % (1 << 64)


@functools.lru_cache(maxsize=2)  # a batch may span two passes
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """As an array: its elements are had in a tenth of the time that those of a tensor take."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(_mix(seed, 1, epoch))).numpy()


def image_nats(model: ImageGPTForCausalImageModeling, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of each pixel among the colours in nats: (B, T) from (B, T) integers.

    ``labels``: (B,) int64, the classes that the images are known to be of, -1 for none; ``None``: none at all.
    """
    tokens, config = tokens.long(), model.config
    begin = torch.full_like(tokens[:, 0], config.sos_token_id)
    if labels is not None:
        begin = torch.where(labels < 0, begin, config.n_colours + labels)
    logits = model(torch.cat([begin[:, None], tokens[:, :-1]], dim=1), use_cache=False).logits
    if config.n_classes:
        logits = logits[..., : config.n_colours].contiguous()  # here, or the loss copies it, and its gradient again
    return ops.cross_entropy(logits, tokens, reduction="none")


@torch.no_grad()
def evaluate(
    model: ImageGPTForCausalImageModeling, tokens: Tensor, batch_size: int = 64, labels: Tensor | None = None
) -> float:
    """Mean nats per token of images (N, T), which may be on another device than the model.

    Over the model's palette: numbers of models with other clusters, and 8-bit bits/dim, are not comparable. Given
    ``labels`` (N,), see ``image_nats``.

    Raises:
        ValueError: No images.
    """
    if tokens.numel() == 0:
        raise ValueError("evaluate: no images")
    training = model.training
    model.eval()
    total = 0.0
    for start in range(0, len(tokens), batch_size):
        part = slice(start, start + batch_size)
        given = () if labels is None else (labels[part].to(model.device),)
        total += float(image_nats(model, tokens[part].to(model.device), *given).double().sum())
    model.train(training)
    return total / tokens.numel()


def heldout_nats(model: ImageGPTForCausalImageModeling, data: TokenData) -> dict[str, float]:
    """``evaluate`` on the held-out images, without their classes and, if they have some, with them; empty if there
    are no images."""
    tokens, labels = data.heldout_tokens, data.heldout_labels
    if not len(tokens):
        return {}
    given = {} if labels is None else {"heldout_class_nats": evaluate(model, tokens, labels=labels)}
    return {"heldout_nats": evaluate(model, tokens), **given}


def optimizer_for(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW(0.9, 0.95); weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def new_model(data: TokenData, config: TrainConfig) -> ImageGPTForCausalImageModeling:
    """A model for the data, on the CPU, with the run's initial weights.

    Raises:
        ValueError: A network that ``ImageGPTConfig`` refuses.
    """
    shape = ImageGPTConfig(
        vocab_size=data.n_clusters + data.n_classes + 1,
        n_positions=data.tokens.shape[1],
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        resid_pdrop=config.dropout,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        n_classes=data.n_classes,
        id2label=dict(enumerate(data.class_names)) or None,
    )
    cpu = torch.device("cpu")
    with _own_generators(cpu):
        _seed(config.seed, cpu)
        model = ImageGPTForCausalImageModeling(shape)
    torch.nn.init.zeros_(model.lm_head.weight)  # the paper starts from uniform predictions
    return model


def _seed(seed: int, device: torch.device) -> None:
    """Seeds what the device draws from like ``torch.manual_seed``, which would seed every other GPU as well."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _own_generators(device: torch.device) -> AbstractContextManager[None]:
    """Inside, torch's global generators are the run's; afterwards they go on as if nothing had been drawn."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def train_step(
    state: TrainState, tokens: Tensor, side: int, config: TrainConfig, nats: Callable, labels: Tensor | None = None
) -> dict[str, Any]:
    """One optimizer step on training images (N, T); returns its record for the log.

    It seeds torch's global generators of the CPU and of the model's device, for the dropout.

    Args:
        state: Advanced in place by one step.
        tokens, side: The training images.
        config: The run.
        nats: ``image_nats``, or that compiled.
        labels: (N,) int64, the classes of the images, if they have any.

    Raises:
        DivergedError: The loss or its gradient is not finite; ``state`` is as it was.
    """
    step, model, device = state.step, state.model, state.model.device
    _seed(_mix(config.seed, 3, step), device)  # dropout
    batch = batch_at(step, tokens, side, config).to(device)
    given = () if labels is None else (labels_at(step, labels, config).to(device),)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.bf16):
        loss = nats(model, batch, *given).mean()
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    record = {"step": step + 1, "nats": loss.item(), "grad_norm": norm.item(), "lr": learning_rate(step, config)}
    if not (math.isfinite(record["nats"]) and math.isfinite(record["grad_norm"])):
        raise DivergedError(
            f"step {step + 1}: the loss is {record['nats']} and its gradient's norm {record['grad_norm']};"
            " try a lower learning rate"
        )
    for group in state.optimizer.param_groups:
        group["lr"] = record["lr"]
    state.optimizer.step()
    state.step = step + 1
    return record


def train(
    data: TokenData,
    out: str | os.PathLike[str],
    config: TrainConfig,
    *,
    device: str | torch.device = "cpu",
    resume: bool = False,
    progress: Progress | None = None,
    stop_after: int | None = None,
) -> ImageGPTForCausalImageModeling:
    """Trains a model and returns it.

    Ctrl-C takes effect between two steps, with the last one saved; a second Ctrl-C at once, without. Torch's global
    generators are left as they were.

    Args:
        data: What to train and evaluate on.
        out: Directory for ``train.pt`` (model, optimizer, step) and ``log.jsonl``; made with the first of them.
        config: The run.
        device: Where to train.
        resume: Continue from ``out/train.pt``, which must come from the same ``config`` and data.
        progress: Called with each record of the log.
        stop_after: Save and return after this step, as an interruption would.

    Raises:
        DivergedError: The loss is no longer finite; ``train.pt`` is the last one saved before.
        FileNotFoundError: ``resume`` without a ``train.pt``.
        KeyboardInterrupt: On Ctrl-C.
        NotADirectoryError, PermissionError: ``out`` cannot be made or written to.
        ValueError: ``resume`` with another configuration or other data, or from a file that is damaged.
    """
    return _train(data, Path(out), config, device, resume, progress, stop_after)[0]


def _train(
    data: TokenData,
    out: Path,
    config: TrainConfig,
    device: str | torch.device,
    resume: bool,
    progress: Progress | None,
    stop_after: int | None = None,
    outdated: Sequence[Path] = (),
) -> tuple[ImageGPTForCausalImageModeling, dict[str, float]]:
    """``train``, which also takes files to remove when the first new one is written, and returns the held-out nats
    of the last step if it was made here."""
    check_writable(out)
    model = new_model(data, config).to(device)
    state = TrainState(model, optimizer_for(model, config), 0, same_run(config, data))
    output = Output(out, outdated)
    clock = time.monotonic()
    if resume:
        state.load(output.checkpoint)
        clock -= output.resume(state.step)
    train_tokens, train_labels = data.train_tokens, data.train_labels
    nats = torch.compile(image_nats) if config.compile else image_nats
    end = config.steps if stop_after is None else min(stop_after, config.steps)
    final: dict[str, float] = {}
    model.train()
    with _own_generators(model.device), _delayed_interrupt() as interrupted:
        while state.step < end and not interrupted():
            record = train_step(state, train_tokens, data.side, config, nats, train_labels)
            step, last = state.step, state.step == config.steps
            evaluated = bool(data.heldout.any()) and (step % config.eval_every == 0 or last)
            logged = evaluated or step % LOG_EVERY == 0 or last
            if evaluated:
                measured = heldout_nats(model, data)
                record.update(measured)
                final = measured if last else {}
            if logged:
                record["seconds"] = round(time.monotonic() - clock, 2)
                output.append(record)
            # After the log: a step that is saved has its record, and one that is not is cut off when resuming.
            if step % config.save_every == 0:
                output.save(state)
            if logged and progress is not None:
                _tell(progress, record, state, output)
        if state.step and state.saved != state.step:
            output.save(state)
    return model.eval(), final


def _tell(progress: Progress, record: dict[str, Any], state: TrainState, output: Output) -> None:
    """Calls ``progress``, which may be where a program notices that it shall stop."""
    try:
        progress(record)
    except KeyboardInterrupt:
        output.save(state)
        raise


@contextmanager
def _delayed_interrupt() -> Iterator[Callable[[], bool]]:
    """Holds the first Ctrl-C back to the end of the block, where it is raised; yields whether there was one.

    In the middle of a step the weights may be half updated. Where Python's own handler is not in force - in
    another thread, or a program with its own - it is left alone.
    """
    hits: list[int] = []

    def handler(number: int, frame: object) -> None:
        hits.append(number)
        if len(hits) > 1:
            raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(hits)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hits:
        raise KeyboardInterrupt


def run(
    data: TokenData,
    out: str | os.PathLike[str],
    config: TrainConfig,
    *,
    device: str | torch.device = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    save_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The whole recipe: trains, then writes the model in transformers' layout and a grid of its samples.

    Args:
        data: What to train and evaluate on.
        out: Directory of the run: ``log.jsonl``, ``train.pt``, and at the end ``model/`` and ``samples.png``.
        config, device, progress: See ``train``.
        resume: Continue the run in ``out``.
        overwrite: Start afresh where ``out`` holds a run; its files are removed when the first new one is written.
        save_dtype: Type of the weights in ``model/``; that of the training, float32, if not given.

    Returns:
        Where the model is, its size, and its held-out nats per token beside the baselines'; ``None`` for
        figures of a held-out part that is empty. With classes also how many, and the nats of images whose class is
        known, ``heldout_class_nats``.

    Raises:
        FileExistsError: ``out`` holds a run, with neither ``resume`` nor ``overwrite``.
        ValueError: Both of them; and whatever ``train`` raises.
    """
    out = Path(out)
    before = check_directory(out, resume=resume, overwrite=overwrite)
    model, measured = _train(data, out, config, device, resume, progress, outdated=before if overwrite else ())
    export(model, data, out / MODEL, save_dtype)
    _draw_samples(out, data.n_classes)
    held = int(data.heldout.sum())
    measured = measured or heldout_nats(model, data)  # a finished run, resumed
    classes = {"classes": data.n_classes, "heldout_class_nats": measured.get("heldout_class_nats")}
    return {
        "model": str(out / MODEL),
        "samples": str(out / SAMPLES),
        "parameters": model.num_parameters(),
        "steps": config.steps,
        "images": len(data.tokens),
        "heldout_images": held,
        "heldout_nats": measured.get("heldout_nats"),
        "lookup_table_nats": lookup_table_nats(data) if held else None,
        "histogram_nats": histogram_nats(data) if held else None,
        **(classes if data.n_classes else {}),
    }


def check_directory(out: Path, *, resume: bool, overwrite: bool) -> list[Path]:
    """The files of an earlier run in ``out``.

    Raises:
        FileExistsError, ValueError: See ``run``.
    """
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other")
    before = [path for path in _run_files(out) if path.exists()]
    if before and not (resume or overwrite):
        raise FileExistsError(f"{out}: holds a run already ({before[0].name}); resume it or overwrite it")
    return before


def _run_files(out: Path) -> list[Path]:
    """The files of a run, by name: a directory that holds other things as well loses none of them."""
    return [out / CHECKPOINT, out / LOG, out / SAMPLES, *(out / MODEL / name for name in _MODEL_FILES)]


def export(
    model: ImageGPTForCausalImageModeling,
    data: TokenData,
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
) -> None:
    """Writes ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``.

    For a model with classes ``generation_config.json`` as well, by which transformers' ``generate`` draws colours only.

    Args:
        model: The model.
        data: Its clusters and size.
        folder: Made if it does not exist.
        dtype: Type of the weights in the file; the model's own if not given.
    """
    from igpt_fast.image import ImageGPTImageProcessor

    state = {name: value.to(dtype or value.dtype) for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    size = {"height": data.side, "width": data.side}
    ImageGPTImageProcessor(clusters=data.clusters, size=size).save_pretrained(folder)
    if classes := list(range(model.config.n_colours, model.config.sos_token_id)):
        with files.replacing(Path(folder) / _GENERATION) as partial:
            partial.write_text(json.dumps({"suppress_tokens": classes}) + "\n", encoding="utf-8")


def _draw_samples(out: Path, n_classes: int) -> None:
    """From the files just written, so that they are known to load; of the classes in turn."""
    from igpt_fast.pipeline import Pipeline

    labels = [i % n_classes for i in range(16)] if n_classes else None
    Pipeline.from_pretrained(out / MODEL, device="cpu").sample(16, seed=0, labels=labels).save_grid(out / SAMPLES)
