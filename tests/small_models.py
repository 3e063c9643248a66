"""Small models and pipelines of random weights, which are large enough that every part shows in what comes out."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling, ImageGPTImageProcessor, Pipeline, backend
from igpt_fast.engines.decoder import Decoder


def small(
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    head: Any = ImageGPTForCausalImageModeling,
    spread: float = 0.2,
    **fields: Any,
) -> Any:
    """A model of 2 layers for 17 tokens and 80 positions, biases among its weights; ``fields`` of the config."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 17, "n_positions": 80, "n_embd": 48, "n_layer": 2, "n_head": 2}
    wide = torch.promote_types(dtype, torch.float32)
    model = head(ImageGPTConfig(**{**sizes, **fields})).eval().to(wide)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, spread)
    return model.to(dtype)


def small_pipeline(
    height: int,
    width: int,
    colours: int,
    classes: int = 0,
    seed: int = 0,
    spread: float = 0.3,
    dtype: torch.dtype = torch.float64,
) -> Pipeline:
    """Images of so many pixels and random colours."""
    sizes = {"vocab_size": colours + classes + 1, "n_classes": classes, "n_positions": height * width, "n_embd": 32}
    model = small(dtype, seed, spread=spread, **sizes)
    clusters = np.random.default_rng(0).uniform(-1, 1, (colours, 3)).astype(np.float32)
    return Pipeline(model, ImageGPTImageProcessor(clusters=clusters, size={"height": height, "width": width}))


def ids(model: Any, batch: int, length: int, seed: int = 3) -> Tensor:
    """(batch, length) random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator)


def stepped(decoder: Decoder, tokens: Tensor) -> Tensor:
    """(B, T, K) logits, a position at a time."""
    return torch.stack([decoder.step(column) for column in tokens.unbind(1)], dim=1)


def exact_and_plain(model: ImageGPTForCausalImageModeling, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the same weights in float64, and of the PyTorch model as it is."""
    with torch.no_grad():
        plain = model(tokens, use_cache=False).logits
        double = ImageGPTForCausalImageModeling(model.config).eval().double()
        double.load_state_dict(model.state_dict())
        return double(tokens, use_cache=False).logits, plain


def rounded_to_int8(model: ImageGPTForCausalImageModeling) -> ImageGPTForCausalImageModeling:
    """A copy with the weights that int8 stands for: 8 bits with a scale for each output."""
    copy = ImageGPTForCausalImageModeling(model.config).eval()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            output_dim = 0 if name == "lm_head.weight" else 1
            if parameter.ndim == 2 and "wte" not in name and "wpe" not in name:
                scale = parameter.abs().amax(dim=1 - output_dim, keepdim=True) / 127
                parameter.copy_(torch.round(parameter / scale) * scale)
    return copy


def _in_steps(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """x in steps of a 127th of its largest along ``dim``, and that step; float64, but found in float32."""
    step = x.float().abs().amax(dim, keepdim=True) / 127
    return (x.float() * (1 / step)).nan_to_num().double(), step.double()


def _product(x: Tensor, weight: Tensor, bias: Tensor, stored: torch.dtype, together: int) -> Tensor:
    """What int8 stands for: x W + bias of (.., k) and (k, n), where W is rounded by column, and x by row, ``together``
    of k at once, from what it is ``stored`` as.
    """
    (columns, by_column), y = _in_steps(weight, 0), bias.double()
    whole = (columns.abs() + 0.5).floor() * columns.sign()  # as the decoder's
    for part, weights in zip(x.to(stored).split(together, -1), whole.split(together), strict=True):
        numbers, by_row = _in_steps(part, -1)
        y = y + (numbers.round() @ weights) * (by_row * by_column)
    return y.to(x.dtype)


def computed_in_int8(model: nn.Module) -> nn.Module:
    """The forward pass in int8: a float32 copy of a body, whose layers compute ``_product``; 512 of the mlp's inner
    numbers have a scale together.
    """
    found = copy.deepcopy(model).float()
    stored = torch.bfloat16 if backend._C.cpu_bf16_products() else torch.float32
    for block in found.h:
        for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            how = {"weight": layer.weight, "bias": layer.bias, "stored": stored}
            how["together"] = 512 if layer is block.mlp.c_proj else len(layer.weight)
            layer.forward = functools.partial(_product, **how)
    return found


def int8_is_right(got: Tensor, right: Tensor, plain: Tensor) -> bool:
    """Whether states are those of ``computed_in_int8`` (``right``), as far as these are from the network's (``plain``).

    An activation's last bit can turn a rounding, which turns others behind it. Few are where all is float32; where
    attention is in bfloat16 so many are that the two are only as far from the network as each other.
    """
    away, rounding, size = (
        float((a.double() - b.double()).norm()) for a, b in ((got, plain), (got, right), (right, plain))
    )
    if not size > 0.002 * float(plain.double().norm()):
        return False
    return 0.9 * size < away < 1.1 * size and rounding < (0.9 if backend._C.cpu_bf16_products() else 0.1) * size
