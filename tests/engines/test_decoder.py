"""What every decoder holds to, on each of them: the reference, the compiled one, the emulated kernels'."""

from collections.abc import Callable, Iterator

import pytest
import torch
from small_models import small

from igpt_fast import backend
from igpt_fast.engines.choice import make_decoder
from igpt_fast.engines.decoder import Decoder


@pytest.fixture(params=["reference", "cpu", "cuda"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda":
        request.getfixturevalue("emulation")
    elif request.param == "cpu" and backend._C is None:
        pytest.skip(backend.native_reason)
    with backend.use_backend({"cpu": "auto", "cuda": backend.get_backend()}.get(request.param, "reference")):
        yield request.param


TOKENS = torch.tensor([[16, 1], [16, 2]])
TURNS: dict[str, Callable[[Decoder], object]] = {
    "start": lambda decoder: (decoder.start(decoder.model, 2, 9), decoder.prefill(TOKENS)),
    "prefill": lambda decoder: decoder.prefill(TOKENS),
    "step": lambda decoder: decoder.step(TOKENS[:, 0]),
    "fork": lambda decoder: decoder.fork(1),
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("streams", [None, (1, torch.arange(2))], ids=["numbers", "streams"])
@torch.no_grad()
def test_what_is_drawn_is_read_next_or_not_at_all(
    engine: str, turn: str, streams: tuple[int, torch.Tensor] | None
) -> None:
    decoder = make_decoder(small(n_embd=64), 2, 9)
    assert decoder.name == engine
    numbers = torch.tensor([0.2, 0.7])
    decoder.draw(decoder.prefill(TOKENS), numbers, streams)
    TURNS[turn](decoder)
    with pytest.raises(ValueError, match="nothing was drawn"):
        decoder.step_drawn()
    logits = decoder.step(TOKENS[:, 1])
    tokens, _ = decoder.draw(logits, numbers, streams)
    other = make_decoder(decoder.model, 2, 9)
    other.prefill(TOKENS)
    if turn in ("prefill", "step"):
        other.prefill(TOKENS if turn == "prefill" else TOKENS[:, :1])
    other.step(TOKENS[:, 1])
    torch.testing.assert_close(decoder.step_drawn(), other.step(tokens), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_was_drawn_last_is_read(engine: str) -> None:
    """Whether the engine made the numbers by itself or not."""
    model, streams = small(n_embd=64), (1, torch.arange(2))
    for first, last in ((streams, None), (None, streams)):
        decoder, other = (make_decoder(model, 2, 9) for _ in range(2))
        logits, _ = decoder.prefill(TOKENS), other.prefill(TOKENS)
        decoder.draw(logits, torch.tensor([0.9, 0.1]), first)
        tokens, _ = decoder.draw(logits, torch.tensor([0.1, 0.9]), last)
        torch.testing.assert_close(decoder.step_drawn(), other.step(tokens), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_logits_of_a_primer_keep_no_others(engine: str) -> None:
    """Those of its last position alone are kept; the reference's come of a hook's too."""
    model = small(n_embd=64)
    for _ in range(2 if engine == "reference" else 1):
        logits = make_decoder(model, 1, 80).prefill(torch.zeros(1, 70, dtype=torch.int64))
        assert logits.untyped_storage().nbytes() == logits.numel() * logits.element_size()
        torch.testing.assert_close(logits, model(torch.zeros(1, 70, dtype=torch.int64)).logits[:, -1])
        model.register_forward_hook(lambda *_: None)
