"""The likelihood of whole images: each pixel among the colours, given those before it, in nats.

Over a model's palette: numbers of models with other clusters, and 8-bit bits/dim, are not comparable.
Source: "Generative Pretraining from Pixels" (Chen et al., 2020), section 2; openai/image-gpt src/model.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from igpt_fast import ops
from igpt_fast.engines.network import logits_of, why_not_modules
from igpt_fast.likelihood.transfer import sent
from igpt_fast.model import ImageGPTForCausalImageModeling
from igpt_fast.ops.dispatch import WITHOUT_FLOAT64

_ROWS = 8192  # pixels that go through the head together, without gradients
# Pixels that go through the network together on the CPU, and at least so many for each thread: activations of more
# leave the caches, which costs a seventh (bfloat16) to a quarter (benchmarks/bench_score.py, batch 64).
_ROWS_CPU, _ROWS_THREAD = 4096, 1024


def image_nats(
    model: ImageGPTForCausalImageModeling, tokens: Tensor, labels: Tensor | None = None, dtype: str | None = None
) -> Tensor:
    """Negative log-likelihood of each pixel among the colours in nats: (B, T) from (B, T) integers.

    ``labels``: (B,) int64, the classes that the images are known to be of, -1 for none; ``None``: none at all.
    ``dtype``: of the network, as of ``forward_intermediates``.

    Without gradients, and where nothing stands around the model's parts that only a call of the model meets, network,
    head and loss follow each other for some pixels at a time, so that no batch's logits are ever whole in memory.
    """
    tokens, config = tokens.long(), model.config
    config.check_causal("image_nats")
    begin = torch.full_like(tokens[:, 0], config.sos_token_id)
    if labels is not None:
        begin = torch.where(labels < 0, begin, config.n_colours + labels)
    inputs = torch.cat([begin[:, None], tokens[:, :-1]], dim=1)
    many = inputs.numel() > _ROWS_CPU and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if dtype is not None or (many and why_not_modules(model) is None):
        return _in_parts(model, inputs, tokens, dtype)
    logits = model(inputs, use_cache=False, return_dict=True).logits
    if config.n_classes:
        logits = logits[..., : config.n_colours].contiguous()  # here, or the loss copies it, and its gradient again
    # Of rows: torch's own loss, which little work goes to, is four times as slow over (B, K, T).
    return ops.cross_entropy(logits.flatten(0, 1), tokens.reshape(-1), reduction="none").view(tokens.shape)


def _in_parts(model: ImageGPTForCausalImageModeling, inputs: Tensor, tokens: Tensor, dtype: str | None) -> Tensor:
    """(B, T) nats of tokens, given what stands before each of them."""
    together = max(_ROWS_CPU, _ROWS_THREAD * torch.get_num_threads())
    images = max(1, together // inputs.shape[1] if inputs.device.type == "cpu" else len(inputs))
    nats = torch.empty(tokens.shape, dtype=torch.promote_types(model.dtype, torch.float32), device=tokens.device)
    for some, targets, into in zip(*(part.split(images) for part in (inputs, tokens, nats)), strict=True):
        if dtype is None:
            hidden = model.transformer(some, use_cache=False, return_dict=True).last_hidden_state  # (b, T, n_embd)
        else:
            hidden = model.forward_intermediates(some, 1, pool=None, dtype=dtype)[0]
        rows = (hidden.flatten(0, 1), targets.reshape(-1), into.view(-1))  # (b * T, n_embd), (b * T), (b * T)
        for states, right, out in zip(*(part.split(_ROWS) for part in rows), strict=True):
            logits = logits_of(model.lm_head, states)  # (rows, vocab_size - 1)
            if model.config.n_classes:
                logits = logits[:, : model.config.n_colours].contiguous()
            out.copy_(ops.cross_entropy(logits, right, reduction="none"))
    return nats


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode for the length of a block; then each of its modules is in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    if any(training for _, training in modes):  # to say it again takes as long as a pixel row of a small model
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # an outer one before those inside of it
            if module.training != training:
                module.train(training)


def float64_sum(x: Tensor) -> Tensor:
    """On the device of x, but on the CPU where that has no float64."""
    return (x.cpu() if x.device.type in WITHOUT_FLOAT64 else x).double().sum()


@torch.no_grad()
def mean_nats(
    model: ImageGPTForCausalImageModeling, batches: Iterable[tuple[Tensor, Tensor | None]], classes: bool = False
) -> float:
    """Mean nats per pixel of batches of (tokens (B, T), labels (B,) or ``None``), which may be on another device.

    The model is in evaluation mode meanwhile. ``classes``: given the labels.

    Raises:
        ValueError: No images.
    """
    total: float | Tensor = 0.0  # on the device, which is waited for in the end
    count = 0
    with evaluating(model):
        for tokens, labels in batches:
            given = (sent(labels, model.device),) if classes and labels is not None else ()
            total = total + float64_sum(image_nats(model, sent(tokens, model.device), *given))
            count += tokens.numel()
    if not count:
        raise ValueError("mean_nats: no images")
    return float(total) / count
