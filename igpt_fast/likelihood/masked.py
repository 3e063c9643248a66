"""The likelihood of masked pixels, each given all that are not: what a bidirectional model, OpenAI's BERT, says.

No likelihood of the image, which it does not have, and not comparable with that of a causal model.
Source: "Generative Pretraining from Pixels" (Chen et al., 2020), section 2.2; openai/image-gpt src/model.py.
"""

from __future__ import annotations

from torch import Tensor

from igpt_fast import ops
from igpt_fast.config import ImageGPTConfig
from igpt_fast.model import ImageGPTForCausalImageModeling

_IGNORED = -100


def masked_nats(model: ImageGPTForCausalImageModeling, tokens: Tensor, mask: Tensor) -> Tensor:
    """(B, T) negative log-likelihood in nats of the masked pixels, each given all that are not masked; 0 elsewhere.

    Args:
        model: A bidirectional one.
        tokens: (B, T) int64, colours.
        mask: (B, T) bool.

    Raises:
        ValueError: A model whose attention is causal: it would be fed the pixel that it predicts.
    """
    if not model.config.bidirectional:
        raise ValueError("masked_nats: the model's attention is causal; want a bidirectional one (a BERT)")
    logits = model(hide(model.config, tokens, mask)).logits
    return ops.cross_entropy(logits, tokens.masked_fill(~mask, _IGNORED), _IGNORED, reduction="none")


def hide(config: ImageGPTConfig, tokens: Tensor, mask: Tensor) -> Tensor:
    """What a bidirectional model is fed: (B, T) tokens, SOS where the mask (B, T) is true."""
    return tokens.masked_fill(mask, config.sos_token_id)
