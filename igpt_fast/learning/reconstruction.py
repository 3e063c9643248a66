"""What a model of masked pixels makes of images, as a picture: its sample, as it cannot draw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from igpt_fast.image import ImageGPTImageProcessor, image_grid, save_image
from igpt_fast.learning.objectives.masked import fixed_masks, hide
from igpt_fast.learning.objectives.protocol import Data
from igpt_fast.model import ImageGPTForCausalImageModeling

_HIDDEN = 224  # light grey
_SHOWN = 16  # images


@torch.inference_mode()
def draw_reconstructions(folder: Path, data: Data, path: Path) -> None:
    """Writes a picture: images as the model sees them, with its most likely colours, and as they are; two a row.

    Args:
        folder: The model's, of what was just written, so that it is known to load.
        data: Of its held-out images, or where there are none of those to train on, the first few.
        path: The picture.
    """
    model = ImageGPTForCausalImageModeling.from_pretrained(folder, device="cpu", dtype=torch.float32).eval()
    processor = ImageGPTImageProcessor.from_pretrained(folder)
    if data.n_heldout:
        tokens, _ = next(data.heldout_batches(_SHOWN))
    else:
        tokens, _ = data.train_batch(range(min(_SHOWN, data.n_train)))
    mask = fixed_masks(tokens, 1)[0]
    guesses = model(hide(model.config, tokens, mask)).logits.argmax(dim=-1)
    pictures = [
        [np.array(picture) for picture in processor.decode(part)]
        for part in (tokens, torch.where(mask, guesses, tokens), tokens)
    ]
    for seen, hidden in zip(pictures[0], mask.numpy(), strict=True):
        seen.reshape(-1, 3)[hidden] = _HIDDEN
    scale = max(1, 128 // max(data.height, data.width))
    cells = [picture for images in zip(*pictures, strict=True) for picture in images]
    save_image(image_grid(cells, 6, scale=scale, gap=scale), path)
