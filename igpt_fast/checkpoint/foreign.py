"""Checkpoints of other networks that are taken for an iGPT's: what each is, and why it is not converted.

Their sources were compared with iGPT's definition. None can be written as weights of it, so that whatever was made of
them would draw something else. They are told by the names of their tensors; nothing is unpickled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from igpt_fast.checkpoint.pickles import strings_of
from igpt_fast.checkpoint.tensors import open_tensor_file

_NO_START = "no token begins an image in it, so that nothing says how a first pixel is drawn"
_CENTRED = "its norms are mean-centred, with biases of which the last one shifts the logits, as iGPT's head cannot"


@dataclass(frozen=True)
class Family:
    """A kind of network.

    Args:
        name: What it is.
        reason: Why it is not converted.
        has, lacks: Ends of names that its checkpoints have, and of names that only others have.
    """

    name: str
    reason: str
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()

    def fits(self, names: set[str]) -> bool:
        """Whether a checkpoint of tensors with these names is one."""

        def there(end: str) -> bool:
            return any(name == end or name.endswith(f".{end}") for name in names)

        return all(map(there, self.has)) and not any(map(there, self.lacks))


FAMILIES = (
    # github.com/teddykoker/image-gpt src/gpt2.py: x = ln_1(x); x = x + attn(x); x = x + mlp(ln_2(x)).
    Family(
        "a Lightning image-gpt (teddykoker/image-gpt)",
        "its blocks go on from the norm of their input and drop the input itself, which an iGPT's always carry on;"
        f" and {_CENTRED}",
        ("sos", "token_embeddings.weight", "layers.0.attn.in_proj_weight", "layers.0.ln_1.bias"),
    ),
    # github.com/karpathy/minGPT mingpt/model.py until 2022; its demo of images gives the first pixel.
    Family(
        "a minGPT of before 2022",
        f"{_CENTRED}; and {_NO_START}",
        ("tok_emb.weight", "pos_emb", "blocks.0.attn.key.weight", "blocks.0.ln1.bias"),
    ),
    # The same since, with a tanh-GELU, which nothing in the file tells from nanoGPT's exact one.
    Family(
        "a GPT-2, minGPT or nanoGPT",
        f"{_CENTRED}; and {_NO_START}",
        ("wte.weight", "wpe.weight", "h.0.ln_1.bias", "h.0.attn.c_attn.weight"),
    ),
    # github.com/karpathy/nanoGPT model.py with bias=False.
    Family(
        "a nanoGPT without biases",
        f"its norms are mean-centred, its head predicts every token that it reads, and {_NO_START}",
        ("wte.weight", "wpe.weight", "h.0.ln_1.weight", "h.0.attn.c_attn.weight"),
        ("h.0.attn.c_attn.bias",),
    ),
    Family(
        "an ImageGPT of transformers'",
        "it needs none: put its config.json beside it, and give the folder to from_pretrained, or as --model",
        ("wte.weight", "wpe.weight", "h.0.ln_1.weight", "h.0.attn.c_attn.bias"),
    ),
)


def why_not(path: Path) -> str:
    """Why a file that is no checkpoint of OpenAI's is not converted.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged; the message names the file.
    """
    names = set(open_tensor_file(path)) if path.suffix == ".safetensors" else strings_of(path)
    for family in FAMILIES:
        if family.fits(names):
            return f"is {family.name}, and is not converted: {family.reason}"
    return "neither a checkpoint of TensorFlow's (PREFIX.index and its data) nor one of a network that is known here"
