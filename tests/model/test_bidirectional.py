"""Attention without the causal mask, OpenAI's BERTs: right in every way to compute it, refused where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import ids, small
from torch import Tensor

from igpt_fast import (
    BackendUnavailableError,
    DynamicCache,
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTImageProcessor,
    Pipeline,
    ops,
    reference,
)
from igpt_fast.engines.choice import Choice, choose, make_decoder
from igpt_fast.engines.cpu import forward
from igpt_fast.engines.cpu.decoder import why_not_cpu
from igpt_fast.engines.cuda.decoder import why_not_cuda
from igpt_fast.engines.reference import ReferenceDecoder
from igpt_fast.hf import to_transformers
from igpt_fast.likelihood.nats import image_nats


def bert(dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
    return small(dtype, bidirectional=True, **fields)


def attended(q: Tensor, k: Tensor, v: Tensor, scale: float, shown: Tensor) -> Tensor:
    """By its formula, row by row; zero where nothing is shown."""
    out = torch.zeros_like(q)
    for row, keys in enumerate(shown):
        if keys.any():
            weights = torch.softmax(scale * q[row] @ k[row][:, keys].mT, dim=-1)
            out[row] = weights @ v[row][:, keys]
    return out


@pytest.mark.parametrize("fields", [{}, {"reorder_and_upcast_attn": True}, {"scale_attn_by_inverse_layer_idx": True}])
@pytest.mark.parametrize("weights", [False, True])
def test_attention(fields: dict[str, Any], weights: bool) -> None:
    """Through SDPA and written out; with a mask, of which a row shows nothing, and NaN behind it."""
    model = bert(**fields)
    block = model.transformer.h[1].attn
    x = torch.randn(3, 7, 48, dtype=torch.float64)
    shown = torch.ones(3, 7, dtype=torch.bool)
    shown[0, 2:4] = shown[2] = False
    with torch.no_grad():
        q, k, v = block.c_attn(x).view(3, 7, 3, 2, 24).permute(2, 0, 3, 1, 4)
        for mask in (None, shown):
            want = attended(q, k, v, block.scale, shown if mask is not None else torch.ones_like(shown))
            want = block.c_proj(want.transpose(1, 2).reshape(3, 7, 48))
            given = x if mask is None else x.masked_fill(~shown[..., None], torch.nan)
            got, softmax = block(given, None, mask, output_attentions=weights)
            rows = torch.ones_like(shown) if mask is None else shown.clone()
            rows[2] &= mask is None
            torch.testing.assert_close(got[rows], want[rows], rtol=1e-12, atol=1e-12)
            assert (softmax is not None) == weights
            if softmax is not None and mask is None:
                torch.testing.assert_close(softmax.sum(-1), torch.ones(3, 2, 7, dtype=torch.float64))
                assert softmax[..., 0, -1].all()


def test_every_position_sees_every_other() -> None:
    model, tokens = bert(), ids(bert(), 2, 9)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 16
    with torch.no_grad():
        one, other = model(tokens).logits, model(changed).logits
        permuted = model(tokens.flip(1), position_ids=torch.arange(9).flip(0)[None]).logits
        masked = model(tokens, attention_mask=torch.ones(2, 9).index_fill_(1, torch.tensor(8), 0)).logits
        hidden = model(changed, attention_mask=torch.ones(2, 9).index_fill_(1, torch.tensor(8), 0)).logits
    assert (one != other).any(-1).all()
    torch.testing.assert_close(permuted.flip(1), one)
    torch.testing.assert_close(masked[:, :-1], hidden[:, :-1])
    output = model(tokens, output_hidden_states=True, output_attentions=True)
    assert output.past_key_values is None
    assert (len(output.hidden_states), output.attentions[0].shape) == (3, (2, 2, 9, 9))


def test_the_configuration_alone_says_it() -> None:
    model, tokens = bert(), ids(bert(), 2, 9)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 16
    model.config.bidirectional = False
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits[:, :-1], model(changed).logits[:, :-1])
        model.config.bidirectional = True
        assert not torch.equal(model(tokens).logits[:, 0], model(changed).logits[:, 0])


@pytest.mark.parametrize("masked", [False, True])
def test_second_and_forward_mode_derivatives(masked: bool) -> None:
    key_mask = torch.tensor([[True, False, True, True], [False] * 4]) if masked else None
    leaves = tuple(torch.randn(2, 1, t, 3, dtype=torch.float64, requires_grad=True) for t in (3, 4, 4))
    attend = lambda *x: ops.full_attention(*x, 0.5, key_mask)[0]  # noqa: E731
    assert torch.autograd.gradcheck(attend, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(attend, leaves)


def test_fewer_keys_than_queries() -> None:
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 2, 8)
    torch.testing.assert_close(ops.full_attention(q, k, k)[0], reference.full_attention(q, k, k, 8**-0.5)[0])


@pytest.mark.parametrize("way", ["plain", "checkpointing", "compiled"])
def test_gradients_and_dropout(way: str) -> None:
    model = bert(attn_pdrop=0.5, head=ImageGPTForImageClassification).train()
    tokens = ids(model, 2, 9)
    if way == "checkpointing":
        model.gradient_checkpointing_enable()
    run = torch.compile(model, backend="eager", fullgraph=True) if way == "compiled" else model
    loss = run(tokens, labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert run(tokens, labels=torch.tensor([0, 1])).loss != loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_cannot_be(dtype: torch.dtype) -> None:
    model = bert(dtype)
    tokens = ids(model, 2, 9)
    for arguments in ({"use_cache": True}, {"past_key_values": DynamicCache()}):
        with pytest.raises(ValueError, match="bidirectional attention has no cache"):
            model(tokens, **arguments)
    with pytest.raises(ValueError, match="labels: the model's attention is bidirectional"):
        model(tokens, labels=tokens)
    with pytest.raises(ValueError, match="generate: the model's attention is bidirectional"):
        model.generate()
    with pytest.raises(ValueError, match="image_nats: the model's attention is bidirectional"):
        image_nats(model, tokens)
    with pytest.raises(ValueError, match="to_transformers: the model's attention is bidirectional"):
        to_transformers(model)
    processor = ImageGPTImageProcessor(clusters=np.zeros((16, 3), np.float32), size={"height": 8, "width": 10})
    with pytest.raises(ValueError, match="Pipeline: the model's attention is bidirectional"):
        Pipeline(model, processor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_decoder_takes_it(dtype: torch.dtype) -> None:
    model = bert(dtype, n_embd=64)
    assert why_not_cpu(model) == "attention is bidirectional"
    assert choose(model) == Choice(ReferenceDecoder, "attention is bidirectional")
    with pytest.raises(BackendUnavailableError, match="attention is bidirectional"):
        make_decoder(model, 1, 4)


def test_nor_does_that_of_cuda(emulation: Any) -> None:
    assert why_not_cuda(bert(torch.bfloat16, n_embd=64)) == "attention is bidirectional"
    assert why_not_cuda(small(torch.bfloat16, n_embd=64)) is None


def test_the_forward_pass_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "no_native_decoder", lambda: None)
    model = bert(torch.bfloat16, n_embd=64).requires_grad_(False)
    assert forward.why_not(model.transformer, ids(model, 1, 9)) == "attention is bidirectional"
    model.config.bidirectional = False
    assert forward.why_not(model.transformer, ids(model, 1, 9)) is None
    causal = small(torch.bfloat16, n_embd=64).requires_grad_(False)
    assert forward.why_not(causal.transformer, ids(causal, 1, 9)) is None


def test_the_configuration(tmp_path: Path) -> None:
    model = bert(torch.float32)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["bidirectional"] is True
    again = ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
    tokens = ids(model, 2, 9)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert "bidirectional" not in ImageGPTConfig().to_dict()
    with pytest.raises(ValueError, match="bidirectional must be true or false, got 1"):
        ImageGPTConfig(bidirectional=1)  # type: ignore[arg-type]
