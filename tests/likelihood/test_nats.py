"""image_nats: the chain rule by hand, transformers fed SOS by hand, and the same by parts as in one piece."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import small
from torch import Tensor

from igpt_fast import Pipeline, ops
from igpt_fast.files import BUNDLED
from igpt_fast.learning.data import load_tokens
from igpt_fast.likelihood import nats as module
from igpt_fast.likelihood.nats import image_nats


def colours(model: object, batch: int, length: int) -> Tensor:
    return torch.randint(model.config.n_colours, (batch, length), generator=torch.Generator().manual_seed(1))  # type: ignore[attr-defined]


def by_hand(model: object, tokens: Tensor, begin: list[int]) -> Tensor:
    """Pixel by pixel, each from a call of its own."""
    nats = torch.empty(tokens.shape, dtype=torch.float64)
    for i, row in enumerate(tokens.tolist()):
        for t, colour in enumerate(row):
            logits = model(torch.tensor([[begin[i], *row[:t]]]), use_cache=False).logits[0, -1]  # type: ignore[operator]
            nats[i, t] = -logits[: model.config.n_colours].log_softmax(-1)[colour]  # type: ignore[attr-defined]
    return nats


@pytest.mark.parametrize("classes", [0, 3])
@torch.no_grad()
def test_the_chain_rule_by_hand(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(torch.float64, n_classes=classes)
    tokens, config = colours(model, 3, 7), model.config
    labels = torch.tensor([2, -1, 0]) if classes else None
    begin = [config.n_colours + 2, config.sos_token_id, config.n_colours] if classes else [config.sos_token_id] * 3
    want = by_hand(model, tokens, begin)
    torch.testing.assert_close(image_nats(model, tokens, labels), want, rtol=0, atol=1e-10)
    monkeypatch.setattr(module, "_ROWS_CPU", 15)  # two images at a time, the last one alone
    monkeypatch.setattr(module, "_ROWS_THREAD", 0)
    monkeypatch.setattr(module, "_ROWS", 5)
    torch.testing.assert_close(image_nats(model, tokens, labels), want, rtol=0, atol=1e-10)


@torch.no_grad()
def test_logits_are_never_whole_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is given some rows at a time, of some images."""
    monkeypatch.setattr(module, "_ROWS_CPU", 32)
    monkeypatch.setattr(module, "_ROWS_THREAD", 0)
    monkeypatch.setattr(module, "_ROWS", 5)
    model = small()
    rows: list[int] = []
    before = ops.cross_entropy

    def watched(logits: Tensor, *args: Any, **options: Any) -> Tensor:
        rows.append(len(logits))
        return before(logits, *args, **options)

    monkeypatch.setattr(ops, "cross_entropy", watched)
    image_nats(model, colours(model, 7, 16))
    assert rows == [5] * 6 + [2] + [5] * 6 + [2] + [5] * 6 + [2] + [5] * 3 + [1]


@torch.no_grad()
def test_what_stands_around_the_model_counts_in_parts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_CPU", 1)
    model = small(torch.float64)
    tokens = colours(model, 2, 7)
    plain = image_nats(model, tokens)
    model.register_forward_hook(lambda _, __, output: type(output)(logits=output.logits * 0.0))
    flat = image_nats(model, tokens)
    assert not torch.allclose(plain, flat)
    torch.testing.assert_close(flat, torch.full_like(flat, model.config.n_colours).log())


def test_with_a_gradient_it_is_the_same_and_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_CPU", 1)
    model = small(torch.float64)
    tokens = colours(model, 2, 7)
    nats = image_nats(model, tokens)
    with torch.no_grad():
        torch.testing.assert_close(image_nats(model, tokens), nats.detach())
    nats.sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def transformers_nats(model: object, tokens: Tensor) -> Tensor:
    """What a user of transformers writes; of the colours alone, for the classes have logits there too."""
    import transformers

    theirs = transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(**model.config.to_dict())).eval()  # type: ignore[attr-defined]
    theirs.load_state_dict(model.state_dict())  # type: ignore[attr-defined]
    sos = torch.full_like(tokens[:, :1], theirs.config.vocab_size - 1)
    logits = theirs(torch.cat([sos, tokens[:, :-1]], dim=1), use_cache=False).logits[..., : model.config.n_colours]  # type: ignore[attr-defined]
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)


@torch.no_grad()
def test_transformers_fed_sos_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model's held-out emoji in float32, by parts and whole: within 1e-4 nats a pixel, each."""
    tokens = load_tokens(BUNDLED.parent / "emoji16.npz").heldout_tokens[::64].long()
    model = Pipeline.from_pretrained(device="cpu").model
    want = transformers_nats(model, tokens)
    assert float((image_nats(model, tokens) - want).abs().max()) <= 1e-4
    monkeypatch.setattr(module, "_ROWS_CPU", 512)
    monkeypatch.setattr(module, "_ROWS_THREAD", 0)
    assert float((image_nats(model, tokens) - want).abs().max()) <= 1e-4
