"""OpenAI's checkpoints of image-gpt: TensorFlow's variables to transformers' names.

Everything is derived from the variables: sizes from their shapes, and whether the network is a BERT, whose attention is
bidirectional, from its having no ``sos``. A BERT's masked pixels have the token SOS here, whose embedding is zero:
OpenAI multiplies the embeddings of masked pixels by zero.

Source: openai/image-gpt src/model.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt_fast.checkpoint import foreign
from igpt_fast.checkpoint.bundle import Bundle
from igpt_fast.checkpoint.converted import Converted
from igpt_fast.checkpoint.names import _PREFIX, trunk_shapes
from igpt_fast.checkpoint.pretrained import _is_finite
from igpt_fast.checkpoint.tensors import StoredTensor
from igpt_fast.config import ImageGPTConfig
from igpt_fast.files import first_line, listed, shown

# The variables under "model/" and their axes: V colours, P positions, D width, H heads of E, I width of the MLP.
_OUTER: dict[str, str] = {"wte": "VD", "wpe": "PD", "ln_f/g": "D", "wtet": "VD"}
_SOS = {"sos": "D"}
_LAYER: dict[str, str] = {
    "ln_1/g": "D",
    "attn/q_proj": "HED",
    "attn/k_proj": "HED",
    "attn/v_proj": "HED",
    "attn/c_proj": "HED",
    "ln_2/g": "D",
    "mlp/c_fc/w": "DI",
    "mlp/c_proj/w": "ID",
}
# The end of our name -> the variable that has its numbers in their order. There are no biases: ours are zero.
_SAME: dict[str, str] = {
    "wpe.weight": "wpe",
    "ln_f.weight": "ln_f/g",
    "lm_head.weight": "wtet",
    "ln_1.weight": "ln_1/g",
    "attn.c_proj.weight": "attn/c_proj",
    "ln_2.weight": "ln_2/g",
    "mlp.c_fc.weight": "mlp/c_fc/w",
    "mlp.c_proj.weight": "mlp/c_proj/w",
}
_PARTS = re.compile(r"(?<=.)\.(?:index|data-\d{5}-of-\d{5})$")  # ends of a bundle's files
_ROOT = "model/"
_SKIPPED = re.compile(r"(?:clf/.*|global_step)")  # a classifier, which is of one set of labels, and the step
_SLOT = re.compile(r"/Adam(?:_1)?$")
_NAME = re.compile(r"(?:h(0|[1-9]\d{0,7})/)?(.+)", re.DOTALL)
# TensorFlow's number of a dtype -> ours, and numpy's of the same size.
_DTYPES: dict[int, tuple[torch.dtype, np.dtype[Any]]] = {
    1: (torch.float32, np.dtype(np.float32)),
    19: (torch.float16, np.dtype(np.float16)),
    14: (torch.bfloat16, np.dtype(np.uint16)),
}


def from_openai(checkpoint: str | os.PathLike[str]) -> Converted:
    """Opens one of OpenAI's checkpoints of image-gpt, a TensorFlow bundle; TensorFlow is not needed.

    Every block of the index and every variable is held to its checksum: those of no use here (an optimizer's, a
    classifier's) now, the others when they are read, by ``save_pretrained`` of what is returned.

    Args:
        checkpoint: Its prefix, such as ``model.ckpt-1000000``; one of its files; or a folder with one checkpoint.

    Returns:
        The configuration and the tensors under transformers' names.

    Raises:
        FileNotFoundError: There is none.
        BackendUnavailableError: The compiled module, which computes the checksums, is not there.
        ValueError: It is damaged, or not of such a network; the message names the file and the variable. Or a file of
            PyTorch's: it says what that is, and why it is not converted.
    """
    bundle = Bundle(_prefix(Path(checkpoint)))
    axes, skipped = _names(bundle)
    sizes = _sizes(bundle, axes)
    for name in skipped:
        bundle.verify(name)
    try:
        config = _config(sizes, bidirectional=_ROOT + "sos" not in axes)
    except ValueError as error:  # sizes that no configuration has
        raise ValueError(f"{bundle.index}: {first_line(error)}") from error
    return Converted(bundle.index, config, dict(_tensors(bundle, config)))


def _prefix(path: Path) -> Path:
    if path.is_dir():
        found = [entry.name for entry in path.iterdir() if entry.name.endswith(".index")]
        if not found:
            raise FileNotFoundError(f"{path}: has no checkpoint of TensorFlow (.index) in it")
        if len(found) > 1:
            raise ValueError(f"{path}: has several checkpoints; give one of {listed(found)}")
        path = path / found[0]
    elif path.is_file() and not _PARTS.search(path.name):
        raise ValueError(f"{path}: {foreign.why_not(path)}")
    return path.with_name(_PARTS.sub("", path.name))


def _names(bundle: Bundle) -> tuple[dict[str, str], list[str]]:
    """The network's variables with their axes, and those that are of no use."""
    names = [name for name in bundle.variables if name.startswith(_ROOT)]
    layers = {int(match[1]) for name in names if (match := _NAME.fullmatch(name.removeprefix(_ROOT))) and match[1]}
    table = _OUTER | (_SOS if _ROOT + "sos" in names else {})
    if layers != set(range(len(layers))) or not layers:
        raise ValueError(f"{bundle.index}: has the layers {shown(sorted(layers))}; want 0, 1 and so on")
    wanted = {_ROOT + name: axes for name, axes in table.items()}
    wanted |= {f"{_ROOT}h{i}/{name}": axes for i in sorted(layers) for name, axes in _LAYER.items()}
    others = bundle.variables.keys() - wanted.keys()
    known = [name for name in others if _SLOT.sub("", name) in wanted or not name.startswith(_ROOT)]
    known += [name for name in others if name.startswith(_ROOT) and _SKIPPED.fullmatch(name.removeprefix(_ROOT))]
    if unknown := others - set(known):
        raise ValueError(f"{bundle.index}: has variables that no image-gpt of OpenAI's has: {listed(unknown)}")
    if missing := wanted.keys() - bundle.variables.keys():
        raise ValueError(f"{bundle.index}: lacks {listed(missing)}")
    return wanted, known


def _sizes(bundle: Bundle, names: dict[str, str]) -> dict[str, int]:
    """The size of each axis, on which all variables agree."""
    sizes = {"layers": sum(name.endswith("/ln_1/g") for name in names)}
    dtype = bundle.variables[_ROOT + "wte"].dtype
    if dtype not in _DTYPES:
        raise ValueError(f"{bundle.index}: model/wte has TensorFlow's dtype {dtype}; want float32, float16 or bfloat16")
    for name, axes in names.items():
        variable = bundle.variables[name]
        if variable.dtype != dtype:
            raise ValueError(f"{bundle.index}: {name} has TensorFlow's dtype {variable.dtype}, model/wte has {dtype}")
        fits = len(variable.shape) == len(axes)
        if not fits or any(sizes.setdefault(axis, n) != n for axis, n in zip(axes, variable.shape, strict=True)):
            want = ", ".join(str(sizes.get(axis, axis)) for axis in axes)
            raise ValueError(f"{bundle.index}: {name} has the shape {shown(variable.shape)}; want ({want})")
    if sizes["H"] * sizes["E"] != sizes["D"]:
        raise ValueError(f"{bundle.index}: has {sizes['H']} heads of {sizes['E']} in a width of {sizes['D']}")
    return sizes


def _config(sizes: dict[str, int], bidirectional: bool) -> ImageGPTConfig:
    return ImageGPTConfig(
        vocab_size=sizes["V"] + 1,
        n_positions=sizes["P"],
        n_embd=sizes["D"],
        n_layer=sizes["layers"],
        n_head=sizes["H"],
        n_inner=None if sizes["I"] == 4 * sizes["D"] else sizes["I"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bidirectional=bidirectional,
    )


# --- values ------------------------------------------------------------------------------------------------------


def _tensors(bundle: Bundle, config: ImageGPTConfig) -> Iterator[tuple[str, StoredTensor]]:
    """Our tensors, none of them read."""
    dtype, _ = _DTYPES[bundle.variables[_ROOT + "wte"].dtype]
    trunk = ((_PREFIX, name, shape) for name, shape in trunk_shapes(config))
    for prefix, name, shape in [*trunk, ("", "lm_head.weight", (config.vocab_size - 1, config.n_embd))]:
        match = re.fullmatch(r"h\.(\d+)\.(.+)", name)
        root, own = (f"{_ROOT}h{match[1]}/", match[2]) if match else (_ROOT, name)
        read: Callable[[], Tensor]
        if own == "wte.weight":
            read = partial(_embedding, bundle, shape)
        elif own == "attn.c_attn.weight":
            read = partial(_projections, bundle, root + "attn/", shape)
        elif own.endswith(".bias"):
            read = partial(torch.zeros, shape, dtype=dtype)
        else:
            read = partial(_as_it_is, bundle, root + _SAME[own], shape)
        yield prefix + name, StoredTensor(bundle.index, shape, dtype, read)


def _as_it_is(bundle: Bundle, name: str, shape: tuple[int, ...]) -> Tensor:
    return _read(bundle, name, np.empty(shape, _numpy_dtype(bundle, name)))


def _embedding(bundle: Bundle, shape: tuple[int, ...]) -> Tensor:
    """(V + 1, D): the colours' rows, and that of SOS; zero is a BERT's mask."""
    whole = np.zeros(shape, _numpy_dtype(bundle, _ROOT + "wte"))
    _read(bundle, _ROOT + "wte", whole[:-1])
    if _ROOT + "sos" in bundle.variables:
        _read(bundle, _ROOT + "sos", whole[-1])
    return _torch(bundle, whole)


def _projections(bundle: Bundle, root: str, shape: tuple[int, ...]) -> Tensor:
    """(D, 3D): from the width to queries, keys and values; each variable is (H, E, D), from outputs to the width."""
    whole = np.empty(shape, _numpy_dtype(bundle, root + "q_proj"))
    part = np.empty((shape[0], shape[0]), whole.dtype)
    for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
        _read(bundle, root + name, part)
        whole[:, i * shape[0] : (i + 1) * shape[0]] = part.T
    return _torch(bundle, whole)


def _read(bundle: Bundle, name: str, out: np.ndarray) -> Tensor:
    """A variable's values, which are finite, in ``out``."""
    bundle.read(name, out)
    value = _torch(bundle, out)
    if not _is_finite(value):
        variable = bundle.variables[name]
        raise ValueError(f"{bundle.shards[variable.shard]}: {name}: holds NaN or infinity")
    return value


def _numpy_dtype(bundle: Bundle, name: str) -> np.dtype[Any]:
    return _DTYPES[bundle.variables[name].dtype][1]


def _torch(bundle: Bundle, value: np.ndarray) -> Tensor:
    return torch.from_numpy(value).view(_DTYPES[bundle.variables[_ROOT + "wte"].dtype][0])
