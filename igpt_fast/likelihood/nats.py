"""The likelihood of whole images: each pixel among the colours, given those before it, in nats.

Over a model's palette: numbers of models with other clusters, and 8-bit bits/dim, are not comparable.
Source: "Generative Pretraining from Pixels" (Chen et al., 2020), section 2; openai/image-gpt src/model.py.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from igpt_fast import ops
from igpt_fast.engines.network import why_not_modules
from igpt_fast.model import ImageGPTForCausalImageModeling

_ROWS = 8192  # pixels whose logits are in memory at once, where no gradient wants them all


def image_nats(model: ImageGPTForCausalImageModeling, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of each pixel among the colours in nats: (B, T) from (B, T) integers.

    ``labels``: (B,) int64, the classes that the images are known to be of, -1 for none; ``None``: none at all.

    Without gradients, and where nothing stands around the model's parts that only a call of the model meets, the head
    and the loss follow the network some rows at a time, so that no batch's logits are ever whole in memory.
    """
    tokens, config = tokens.long(), model.config
    config.check_causal("image_nats")
    begin = torch.full_like(tokens[:, 0], config.sos_token_id)
    if labels is not None:
        begin = torch.where(labels < 0, begin, config.n_colours + labels)
    inputs = torch.cat([begin[:, None], tokens[:, :-1]], dim=1)
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and why_not_modules(model) is None:
        hidden = model.transformer(inputs, use_cache=False, return_dict=True).last_hidden_state
        return _nats_of_hidden(model, hidden, tokens)
    logits = model(inputs, use_cache=False, return_dict=True).logits
    if config.n_classes:
        logits = logits[..., : config.n_colours].contiguous()  # here, or the loss copies it, and its gradient again
    return ops.cross_entropy(logits, tokens, reduction="none")


def _nats_of_hidden(model: ImageGPTForCausalImageModeling, hidden: Tensor, tokens: Tensor) -> Tensor:
    """(B, T) of the (B, T, n_embd) states behind the last norm."""
    rows, targets = hidden.flatten(0, 1), tokens.reshape(-1)  # (B * T, n_embd), (B * T)
    found = []
    for some, right in zip(rows.split(_ROWS), targets.split(_ROWS), strict=True):
        logits = model.lm_head(some)  # (rows, vocab_size - 1)
        if model.config.n_classes:
            logits = logits[:, : model.config.n_colours].contiguous()
        found.append(ops.cross_entropy(logits, right, reduction="none"))  # (rows,)
    return torch.cat(found).view(tokens.shape) if found else hidden.new_empty(tokens.shape, dtype=torch.float32)


@torch.no_grad()
def mean_nats(
    model: ImageGPTForCausalImageModeling, batches: Iterable[tuple[Tensor, Tensor | None]], classes: bool = False
) -> float:
    """Mean nats per pixel of batches of (tokens (B, T), labels (B,) or ``None``), which may be on another device.

    The model is in evaluation mode meanwhile. ``classes``: given the labels.

    Raises:
        ValueError: No images.
    """
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for tokens, labels in batches:
        given = (labels.to(model.device),) if classes and labels is not None else ()
        total += float(image_nats(model, tokens.to(model.device), *given).double().sum())
        count += tokens.numel()
    model.train(training)
    if not count:
        raise ValueError("mean_nats: no images")
    return total / count
