"""The names and shapes of a network's tensors in checkpoints, as transformers has them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from igpt_fast.checkpoint.tensors import StoredTensor, StoredWeights
from igpt_fast.config import ImageGPTConfig
from igpt_fast.files import listed

# The network as transformers names and shapes it: V tokens, P positions, D width, I width of the MLP. Names are
# those of ImageGPTModel; in the models with a head they stand under "transformer.".
_PREFIX = "transformer."
_EMBEDDINGS: dict[str, tuple[str, ...]] = {"wte.weight": ("V", "D"), "wpe.weight": ("P", "D")}
_LAYER: dict[str, tuple[str, ...]] = {
    "ln_1.weight": ("D",),
    "attn.c_attn.weight": ("D", "3D"),
    "attn.c_attn.bias": ("3D",),
    "attn.c_proj.weight": ("D", "D"),
    "attn.c_proj.bias": ("D",),
    "ln_2.weight": ("D",),
    "mlp.c_fc.weight": ("D", "I"),
    "mlp.c_fc.bias": ("I",),
    "mlp.c_proj.weight": ("I", "D"),
    "mlp.c_proj.bias": ("D",),
}
_FINAL: dict[str, tuple[str, ...]] = {"ln_f.weight": ("D",)}
# A model may lack these (it is newly initialised), or have no use for them.
_HEADS = ("lm_head.weight", "score.weight")
# The causal mask, which old files carry as buffers.
_IGNORED = re.compile(r"h\.\d+\.attn\.(?:bias|masked_bias)")


def trunk_shapes(config: ImageGPTConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight of ``ImageGPTModel``, one after another (``n_layer`` may be absurd)."""
    d = config.n_embd
    sizes = {"V": config.vocab_size, "P": config.n_positions, "D": d, "3D": 3 * d, "I": config.inner}
    layers = ((f"h.{i}.", _LAYER) for i in range(config.n_layer))
    for place, table in itertools.chain([("", _EMBEDDINGS)], layers, [("", _FINAL)]):
        for name, axes in table.items():
            yield place + name, tuple(sizes[axis] for axis in axes)


def plain_names(stored: StoredWeights) -> dict[str, StoredTensor]:
    """The tensors under ``ImageGPTModel``'s names, without the prefix they have in a model with a head.

    Raises:
        ValueError: A tensor is there with and without the prefix.
    """
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stored.tensors.items():
        plain = name.removeprefix(_PREFIX)
        if _IGNORED.fullmatch(plain):
            continue
        if plain in tensors:
            raise ValueError(f"{stored.source}: holds both {listed([plain])} and {listed([_PREFIX + plain])}")
        tensors[plain] = tensor
    return tensors
