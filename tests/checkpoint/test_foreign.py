"""Networks that are no iGPT's: told by name and refused with the reason; their pickles are never run."""

from __future__ import annotations

import pickle
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_models import small
from torch import Tensor, nn

from igpt_fast.checkpoint import from_openai


class Lightning(nn.Module):
    """The parameters of teddykoker/image-gpt, one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = nn.Module()
        self.gpt.sos = nn.Parameter(torch.zeros(8))
        self.gpt.token_embeddings, self.gpt.position_embeddings = nn.Embedding(4, 8), nn.Embedding(9, 8)
        layer = nn.Module()
        layer.ln_1, layer.ln_2, layer.attn = nn.LayerNorm(8), nn.LayerNorm(8), nn.MultiheadAttention(8, 2)
        layer.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        self.gpt.layers, self.gpt.ln_f = nn.ModuleList([layer]), nn.LayerNorm(8)
        self.gpt.head, self.gpt.clf_head = nn.Linear(8, 4, bias=False), nn.Linear(8, 10)


def gpt(bias: bool) -> dict[str, Tensor]:
    """Of minGPT since 2022, and nanoGPT."""
    names = {"attn.c_attn": 24, "attn.c_proj": 8, "mlp.c_fc": 32, "mlp.c_proj": 8, "ln_1": 8, "ln_2": 8}
    state = {"transformer.wte.weight": torch.zeros(4, 8), "transformer.wpe.weight": torch.zeros(9, 8)}
    for kind in ("weight", "bias") if bias else ("weight",):
        state |= {f"transformer.h.0.{name}.{kind}": torch.zeros(size) for name, size in names.items()}
    return state | {"lm_head.weight": torch.zeros(4, 8)}


def old_mingpt() -> dict[str, Tensor]:
    state = {"tok_emb.weight": torch.zeros(4, 8), "pos_emb": torch.zeros(1, 9, 8), "head.weight": torch.zeros(4, 8)}
    for name in ("ln1", "ln2", "attn.key", "attn.query", "attn.value", "attn.proj", "mlp.0", "mlp.2"):
        state |= {f"blocks.0.{name}.{kind}": torch.zeros(8) for kind in ("weight", "bias")}
    return state


class Hyperparameters(dict[str, Any]):
    """Stands for a class of Lightning's in its checkpoints."""


CASES = [
    (Lightning().state_dict(), "a Lightning image-gpt .*go on from the norm of their input.*mean-centred"),
    (old_mingpt(), "a minGPT of before 2022, .*mean-centred.*no token begins an image"),
    (gpt(bias=True), "a GPT-2, minGPT or nanoGPT, .*shifts the logits.*no token begins an image"),
    (gpt(bias=False), "a nanoGPT without biases, .*mean-centred.*no token begins"),
    (small().state_dict(), "an ImageGPT of transformers', .*give the folder to from_pretrained"),
    ({"weight": torch.zeros(3)}, "neither a checkpoint of TensorFlow's .* nor one of a network that is known"),
]


@pytest.mark.parametrize("way", ["zip", "older", "lightning", "compiled", "safetensors"])
@pytest.mark.parametrize(("state", "message"), CASES)
def test_refused_by_name(tmp_path: Path, state: dict[str, Tensor], message: str, way: str) -> None:
    path = tmp_path / ("model.safetensors" if way == "safetensors" else "model.ckpt")
    if way == "safetensors":
        save_file({name: value.clone() for name, value in state.items()}, path)
    elif way == "lightning":
        torch.save({"epoch": 3, "state_dict": state, "hyper_parameters": Hyperparameters(num_heads=2)}, path)
    elif way == "compiled":
        torch.save({"model": {f"_orig_mod.{name}": value for name, value in state.items()}}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=way == "zip")
    with pytest.raises(ValueError, match=re.escape(str(path)) + ": (is )?" + message):
        from_openai(path)


class Bomb:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("way", ["zip", "older", "pickle"])
def test_nothing_is_run(tmp_path: Path, way: str) -> None:
    path, content = tmp_path / "model.pt", {**gpt(bias=True), "more": Bomb(tmp_path / "trace")}
    if way == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "zip")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        from_openai(path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"<html></html>", b"\x80\x02" + b"(" * 5000, b"\x80\x04."])
def test_no_checkpoint_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.pt: (not a PyTorch checkpoint|neither)"):
        from_openai(tmp_path / "model.pt")


def test_a_name_of_nothing_but_dots_costs_nothing(tmp_path: Path) -> None:
    """A list of all ends of the name would take gigabytes."""
    torch.save({"." * 50_000: torch.zeros(1)}, tmp_path / "model.pt")
    tracemalloc.start()
    with pytest.raises(ValueError, match="neither a checkpoint"):
        from_openai(tmp_path / "model.pt")
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
