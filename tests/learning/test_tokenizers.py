"""Tokenizers: what stands between pictures and models, also where the tokens are no colours."""

from pathlib import Path

import numpy as np
import pytest
import torch

from igpt_fast.learning.data import TokenData, load_tokens, save_tokens
from igpt_fast.learning.run import run
from igpt_fast.learning.settings import TrainConfig
from igpt_fast.learning.tokenizers import CodeTokenizer, ColourTokenizer, Tokenizer, tokenizer_of

PALETTE = np.array([[-1, -1, -1], [1, 1, 1], [1, -1, -1]], np.float32)


def test_colours_come_back() -> None:
    tokenizer = ColourTokenizer(PALETTE, 2, 3)
    tokens = np.array([[0, 1, 2, 2, 1, 0]], np.uint8)
    pictures = tokenizer.decode(tokens)
    assert pictures.shape == (1, 2, 3, 3)
    assert pictures[0, 0, 2].tolist() == [255, 0, 0]
    again = tokenizer.encode(pictures)
    assert again.dtype == np.uint8
    assert np.array_equal(again, tokens)
    with pytest.raises(ValueError, match="want \\(N, 2, 3, 3\\)"):
        tokenizer.encode(pictures.transpose(0, 2, 1, 3))


@pytest.mark.parametrize("tokenizer", [ColourTokenizer(PALETTE, 2, 3), CodeTokenizer(8192, 2, 3)])
def test_an_entry_knows_its_tokenizer(tokenizer: Tokenizer) -> None:
    assert tokenizer_of(tokenizer.entry(), tokenizer.clusters).digest() == tokenizer.digest()
    with pytest.raises(ValueError, match="another"):
        tokenizer_of({**tokenizer.entry(), "height": 3, "width": 2}, tokenizer.clusters)
    with pytest.raises(ValueError):
        tokenizer_of({**tokenizer.entry(), "height": -1}, tokenizer.clusters)
    with pytest.raises(ValueError):
        tokenizer_of(["colours"], tokenizer.clusters)


def test_another_palette_is_seen() -> None:
    entry = ColourTokenizer(PALETTE, 2, 3).entry()
    with pytest.raises(ValueError, match="another palette"):
        tokenizer_of(entry, PALETTE[::-1])


def codes(n: int = 40) -> TokenData:
    tokenizer = CodeTokenizer(300, 2, 4)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 300, (n, 8)).astype(np.int16))
    return TokenData(tokens, None, torch.arange(n) % 5 == 0, tokenizer=tokenizer)


def test_token_files_of_codes(tmp_path: Path) -> None:
    save_tokens(codes(), tmp_path / "codes.npz")
    again = load_tokens(tmp_path / "codes.npz")
    assert (again.height, again.width, again.vocabulary, again.clusters) == (2, 4, 300, None)
    assert again.fingerprint() == codes().fingerprint()
    other = TokenData(codes().tokens, None, codes().heldout, tokenizer=CodeTokenizer(300, 4, 2))
    assert other.fingerprint() != codes().fingerprint()


def test_a_model_of_codes_is_trained_and_has_no_colours(tmp_path: Path) -> None:
    """As of a VQ-VAE's codebook: a network, its likelihood, and no picture."""
    config = TrainConfig(n_layer=1, n_embd=16, n_head=2, steps=2, batch_size=4, eval_every=2, shift=0, flip=False)
    summary = run(codes(), tmp_path, config)
    assert summary["samples"] is None
    assert summary["heldout_nats"] == pytest.approx(np.log(300), abs=0.1)
    assert summary["lookup_table_nats"] > 0
    assert not (tmp_path / "model" / "preprocessor_config.json").exists()
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_data_that_do_not_fit_their_tokenizer() -> None:
    data = codes()
    for wrong, reason in ((CodeTokenizer(300, 3, 3), "8 tokens are not an image of 3 x 3"), (None, "not a square")):
        with pytest.raises(ValueError, match=reason):
            TokenData(data.tokens, None, data.heldout, tokenizer=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"not in 0\.\.99"):
        TokenData(data.tokens, None, data.heldout, tokenizer=CodeTokenizer(100, 2, 4))
