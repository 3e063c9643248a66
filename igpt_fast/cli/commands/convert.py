"""``igpt convert``: weights from elsewhere to a folder that all commands, and transformers, load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from igpt_fast.cli import checks, terminal

if TYPE_CHECKING:
    from igpt_fast.config import ImageGPTConfig


def convert(
    checkpoint: Positional[Path],
    out: Positional[Path],
    clusters: Path | None = None,
    dtype: checks.Floats | None = None,
    size: str | None = None,
    json: bool = False,
    force: bool = False,
) -> None:
    """Convert OpenAI's checkpoints (TensorFlow's format) to a model that all commands and transformers load.

    Example: igpt convert model.ckpt-1000000 igpt-s --clusters kmeans_centers.npy

    A BERT, a checkpoint without model/sos, is for this package alone: transformers would run it as if it were causal.

    Args:
        checkpoint: Its prefix, such as model.ckpt-1000000; its .index; or a folder with one checkpoint.
        out: Folder to write config.json and model.safetensors to, and with --clusters preprocessor_config.json.
        clusters: The model's colours, OpenAI's kmeans_centers.npy; without them it has no processor.
        dtype: float32, bfloat16 or float16, of the weights; as they are stored if not given.
        size: Height and width of its images, such as 32x32; the square of its positions if not given.
        json: Print one JSON object.
        force: Overwrite a model.
    """
    if size is not None and clusters is None:
        raise checks.UsageError("--size: only with --clusters, whose images have it")
    edges = None if size is None else re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", size)
    if size is not None and edges is None:
        raise checks.UsageError(f"--size is {size!r}; want HxW, such as 32x32, of 1..99999 pixels")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out}: is not a directory")
    written = ["config.json", "model.safetensors", "model.safetensors.index.json", "preprocessor_config.json"]
    written += ["generation_config.json"]
    if not force and (found := [name for name in written if (out / name).exists()]):
        raise FileExistsError(f"{out / found[0]}: exists already; pass --force to overwrite it")
    checks.check_writable(out)
    import torch

    from igpt_fast.checkpoint import from_openai

    converted = from_openai(checkpoint)
    config = converted.config
    texts = {}
    if clusters is not None:
        shape = (int(edges[1]), int(edges[2])) if edges else None
        texts["preprocessor_config.json"] = _processor(clusters, shape, config)
    converted.save_pretrained(out, dtype=None if dtype is None else getattr(torch, dtype), texts=texts)
    names = ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size", "bidirectional")
    stored = dtype or str(converted.dtype).removeprefix("torch.")
    values = {"out": str(out), "source": str(converted.source), "parameters": converted.parameters, "dtype": stored}
    values |= {name: getattr(config, name) for name in names} | {
        "clusters": None if clusters is None else str(clusters)
    }
    bert = "BERT, bidirectional, which cannot draw, and which transformers would run as if it were causal"
    kind = bert if config.bidirectional else f"{config.n_colours} colours"
    sizes = f"{config.n_layer} layers, width {config.n_embd}, {config.n_head} heads"
    terminal.report(json, values, f"{out}: {converted.parameters / 1e6:.2f} M parameters, {sizes}; {kind}; {stored}")


def _processor(clusters: Path, shape: tuple[int, int] | None, config: ImageGPTConfig) -> str:
    """The preprocessor_config.json of a palette, which is the model's, and of its images."""
    import math

    from igpt_fast.image import ImageGPTImageProcessor, load_clusters

    palette = load_clusters(clusters)
    if len(palette) != config.n_colours:
        raise ValueError(f"{clusters}: has {len(palette)} colours, the checkpoint {config.n_colours}")
    height, width = shape or (math.isqrt(config.n_positions),) * 2
    if height * width != config.n_positions:
        what = "give --size HxW" if shape is None else f"--size has {height * width} pixels"
        raise checks.UsageError(f"the checkpoint has {config.n_positions} positions: {what}")
    return ImageGPTImageProcessor(clusters=palette, size={"height": height, "width": width}).to_json_string()
