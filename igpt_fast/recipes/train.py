"""Trains an iGPT: images -> clusters -> tokens -> model. One readable script behind ``igpt train``.

The objective is the paper's: the input is ``[SOS, x_0 .. x_{T-2}]`` and position ``t`` predicts ``x_t``, so that
every pixel counts. AdamW(0.9, 0.95), linear warm-up, cosine decay to zero, gradient clipping, optional bf16
autocast. The budget is in steps. Each step draws its images, augmentations and dropout from generators seeded
with (seed, step): a resumed run is bit-identical to one that was never interrupted.

Source: "Generative Pretraining from Pixels" (Chen et al., 2020), section 3 and appendix.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_fast.config import ImageGPTConfig
from igpt_fast.model import ImageGPTForCausalImageModeling


@dataclass
class TrainConfig:
    """What a run depends on, besides its data."""

    n_layer: int = 8
    n_embd: int = 192
    n_head: int = 3
    steps: int = 6000
    batch_size: int = 32
    lr: float = 3e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    dropout: float = 0.1
    clip: float = 1.0
    flip: bool = True
    shift: int = 1
    seed: int = 0
    bf16: bool = True
    compile: bool = False
    eval_every: int = 500
    save_every: int = 500


@dataclass
class TokenData:
    """Images as tokens: (N, side * side) integers, (K, 3) float32 clusters in [-1, 1], (N,) bool held out."""

    tokens: Tensor
    clusters: np.ndarray
    heldout: Tensor

    @property
    def side(self) -> int:
        """Height and width in pixels."""
        return math.isqrt(self.tokens.shape[1])

    @property
    def n_clusters(self) -> int:
        """Number of colours; also the id of the SOS token."""
        return len(self.clusters)


def load_tokens(path: Path) -> TokenData:
    """Reads a token file (.npz with ``tokens``, ``clusters``, ``heldout``).

    Raises:
        ValueError: The file is not such a file; the message names it and the reason.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            tokens, clusters, heldout = arrays["tokens"], arrays["clusters"], arrays["heldout"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a token file: {error}") from error
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or len(tokens) == 0:
        raise ValueError(f"{path}: tokens must be (N, T) integers, got {tokens.shape} {tokens.dtype}")
    if math.isqrt(tokens.shape[1]) ** 2 != tokens.shape[1] or tokens.shape[1] == 0:
        raise ValueError(f"{path}: {tokens.shape[1]} tokens are not a square image")
    if clusters.ndim != 2 or clusters.shape[1] != 3 or clusters.dtype.kind != "f" or not np.isfinite(clusters).all():
        raise ValueError(f"{path}: clusters must be (K, 3) finite floats, got {clusters.shape} {clusters.dtype}")
    if tokens.min() < 0 or tokens.max() >= len(clusters):
        raise ValueError(f"{path}: tokens lie outside 0..{len(clusters) - 1}")
    if heldout.shape != tokens.shape[:1] or heldout.dtype != np.bool_ or heldout.all():
        raise ValueError(f"{path}: heldout must be (N,) bool with at least one image to train on")
    return TokenData(
        torch.from_numpy(tokens.astype(np.int64)), clusters.astype(np.float32), torch.from_numpy(heldout.copy())
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up to ``lr``, then a cosine to zero at ``steps``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def batch_at(step: int, tokens: Tensor, side: int, config: TrainConfig) -> Tensor:
    """The augmented batch of a step, (B, T): a pass over all images before any comes again."""
    n = len(tokens)
    positions = range(step * config.batch_size, (step + 1) * config.batch_size)
    orders = {p // n: _permutation(n, config.seed, p // n) for p in positions}
    batch = tokens[[int(orders[p // n][p % n]) for p in positions]].view(-1, side, side)
    generator = torch.Generator().manual_seed(_mix(config.seed, 2, step))
    if config.flip:
        chosen = torch.rand(len(batch), generator=generator) < 0.5
        batch = torch.where(chosen[:, None, None], batch.flip(-1), batch)
    if config.shift:
        # A shift of -shift .. shift along each axis; the border repeats.
        offsets = torch.randint(-config.shift, config.shift + 1, (2, len(batch), 1), generator=generator)
        rows, columns = (torch.arange(side) + offsets).clamp(0, side - 1)
        batch = batch[torch.arange(len(batch))[:, None, None], rows[:, :, None], columns[:, None, :]]
    return batch.reshape(len(batch), -1)


def _mix(seed: int, stream: int, step: int) -> int:
    """A seed per (run, stream, step)."""
    return (seed * 1_000_003 + stream) * 1_000_000_007 + step


_orders: dict[tuple[int, int, int], Tensor] = {}


def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    key = (n, seed, epoch)
    if key not in _orders:
        _orders.clear()
        _orders[key] = torch.randperm(n, generator=torch.Generator().manual_seed(_mix(seed, 1, epoch)))
    return _orders[key]


def image_nats(model: ImageGPTForCausalImageModeling, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of each pixel in nats: (B, T) from (B, T)."""
    sos = torch.full_like(tokens[:, :1], model.config.sos_token_id)
    logits = model(torch.cat([sos, tokens[:, :-1]], dim=1), use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)


@torch.no_grad()
def evaluate(model: ImageGPTForCausalImageModeling, tokens: Tensor, batch_size: int = 64) -> float:
    """Mean nats per token."""
    training = model.training
    model.eval()
    total = sum(float(image_nats(model, part).double().sum()) for part in tokens.split(batch_size))
    model.train(training)
    return total / tokens.numel()


def optimizer_for(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW(0.9, 0.95); weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def train(
    data: TokenData,
    out: Path,
    config: TrainConfig,
    *,
    device: str | torch.device = "cpu",
    resume: bool = False,
    stop_after: int | None = None,
) -> ImageGPTForCausalImageModeling:
    """Trains a model and returns it.

    Args:
        data: What to train and evaluate on.
        out: Folder for ``train.pt`` (model, optimizer, step) and ``log.jsonl``.
        config: The run.
        device: Where to train.
        resume: Continue from ``out/train.pt``, which must come from the same ``config`` and data.
        stop_after: Save and return after this step, as an interruption would.

    Raises:
        ValueError: ``resume`` with another configuration or other data.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    model = ImageGPTForCausalImageModeling(
        ImageGPTConfig(
            vocab_size=data.n_clusters + 1,
            n_positions=data.tokens.shape[1],
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            resid_pdrop=config.dropout,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ).to(device)
    torch.nn.init.zeros_(model.lm_head.weight)  # the paper starts from uniform predictions
    optimizer = optimizer_for(model, config)
    identity = {"config": dataclasses.asdict(config), "data": _fingerprint(data)}
    start = 0
    if resume:
        state = torch.load(out / "train.pt", map_location=device, weights_only=True)
        if state["identity"] != identity:
            raise ValueError(f"{out / 'train.pt'}: written by a run with another configuration or other data")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]

    train_tokens = data.tokens[~data.heldout]
    held_tokens = data.tokens[data.heldout].to(device)
    nats = torch.compile(image_nats) if config.compile else image_nats
    kind = torch.device(device).type
    end = config.steps if stop_after is None else min(stop_after, config.steps)
    model.train()
    clock = time.monotonic()
    try:
        for step in range(start, end):
            torch.manual_seed(_mix(config.seed, 3, step))  # dropout
            batch = batch_at(step, train_tokens, data.side, config).to(device)
            with torch.autocast(kind, dtype=torch.bfloat16, enabled=config.bf16):
                loss = nats(model, batch).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            optimizer.step()
            start = step + 1
            if start % 50 == 0 or start == end:
                record = {"step": start, "nats": float(loss), "grad_norm": float(norm)}
                record |= {"lr": learning_rate(step, config), "seconds": round(time.monotonic() - clock, 2)}
                if len(held_tokens) and (start % config.eval_every == 0 or start == config.steps):
                    record["heldout_nats"] = evaluate(model, held_tokens)
                with (out / "log.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(record) + "\n")
                print(json.dumps(record), file=sys.stderr)
            if start % config.save_every == 0:
                _save(out, model, optimizer, start, identity)
    finally:
        _save(out, model, optimizer, start, identity)  # an interrupted run keeps its last whole step
    return model.eval()


def _save(
    out: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, identity: dict[str, object]
) -> None:
    partial = out / "train.pt.partial"
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "identity": identity}
    torch.save(state, partial)
    os.replace(partial, out / "train.pt")


def _fingerprint(data: TokenData) -> str:
    import hashlib

    digest = hashlib.sha256(data.tokens.numpy().tobytes())
    digest.update(data.clusters.tobytes() + data.heldout.numpy().tobytes())
    return digest.hexdigest()
