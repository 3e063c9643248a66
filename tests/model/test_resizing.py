"""A model for images of another size or of other colours: it goes on from what it knows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import ids, small

from igpt_fast import ImageGPTForCausalImageModeling, ImageGPTForImageClassification, ImageGPTModel
from igpt_fast.files import BUNDLED
from igpt_fast.likelihood.nats import image_nats
from igpt_fast.model.resizing import nearest, recolour

HEADS = [ImageGPTModel, ImageGPTForCausalImageModeling, ImageGPTForImageClassification]


def test_the_bundled_model_at_24x24() -> None:
    """Before any step; new random positions leave 2.67 nats."""
    model = ImageGPTForCausalImageModeling.from_pretrained(BUNDLED, dtype="float32")
    model.resize_positions(24, 24)
    tokens = torch.from_numpy(np.load(Path(__file__).parent / "emoji24.npz")["tokens"])
    with torch.no_grad():
        assert float(image_nats(model, tokens).mean()) <= 1.5


@pytest.mark.parametrize("head", HEADS)
def test_the_grid_is_the_images(head: type) -> None:
    """Tables of rows and of columns stay such, away from the border: 8x10 becomes 16x30."""
    model = small(head=head)
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(10.0), indexing="ij")
    with torch.no_grad():
        model.base_model.wpe.weight[:, :2] = torch.stack([rows, columns], dim=-1).view(80, 2)
    table = model.resize_positions(16, 30, old=(8, 10))
    assert table is model.base_model.wpe
    assert (model.config.n_positions, table.num_embeddings, table.weight.shape) == (480, 480, (480, 48))
    row, column = torch.meshgrid((torch.arange(16) + 0.5) / 2 - 0.5, (torch.arange(30) + 0.5) / 3 - 0.5, indexing="ij")
    inside = (slice(4, -4), slice(6, -6))
    found = table.weight.detach()[:, :2].view(16, 30, 2)[inside]
    torch.testing.assert_close(found, torch.stack([row, column], dim=-1)[inside], rtol=0, atol=0.1)
    assert model(ids(model, 2, 480))[0].isfinite().all()


def test_what_does_not_change(tmp_path: Path) -> None:
    model = small(n_positions=64, dtype=torch.bfloat16)
    weight = model.transformer.wpe.weight.requires_grad_(False)
    assert model.resize_positions(8, 8).weight is weight
    resized = model.resize_positions(4, 12, old=(8, 8)).weight
    assert (resized.dtype, resized.requires_grad, resized.is_contiguous()) == (torch.bfloat16, False, True)
    model.save_pretrained(tmp_path)
    again = ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
    assert torch.equal(again.transformer.wpe.weight, resized)


@pytest.mark.parametrize(
    ("positions", "size", "old", "reason"),
    [
        (80, (9, 9), None, r"80 positions are no square; say what they are"),
        (80, (9, 9), (9, 9), r"from \(9, 9\) to \(9, 9\), in pixels, of a model of 80 positions"),
        (64, (0, 9), None, r"from \(8, 8\) to \(0, 9\)"),
        (64, (9, 9), (-8, -8), r"from \(-8, -8\)"),
    ],
)
def test_wrong_sizes(positions: int, size: tuple[int, int], old: tuple[int, int] | None, reason: str) -> None:
    model = small(n_positions=positions)
    with pytest.raises(ValueError, match=f"resize_positions: {reason}"):
        model.resize_positions(*size, old=old)
    assert len(model.transformer.wpe.weight) == model.config.n_positions == positions


def test_other_colours() -> None:
    """16 old colours, SOS; then 3 colours, 2 classes, SOS; then other classes."""
    model = small()
    table, head = model.transformer.wte, model.lm_head
    old, rows = table.weight.detach().clone(), head.weight.detach().clone()
    colours = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    origin = nearest(colours[[5, 2, 5]] + 1e-3, colours)
    assert origin.tolist() == [5, 2, 5]
    recolour(table, head, origin, 2, False)
    assert torch.equal(table.weight, old[[5, 2, 5, 16, 16, 16]])
    assert torch.equal(head.weight, torch.cat([rows[[5, 2, 5]], torch.zeros(2, 48)]))
    assert (table.num_embeddings, head.out_features) == (6, 5)
    with torch.no_grad():
        table.weight[3:5] = torch.tensor([[1.0], [2.0]])
        head.weight[3:] = torch.tensor([[3.0], [4.0]])
    recolour(table, head, torch.tensor([2, 0]), 2, True)
    assert torch.equal(
        table.weight, torch.stack([old[5], old[5], *torch.ones(1, 48), *torch.full((1, 48), 2.0), old[16]])
    )
    assert head.weight[2:, 0].tolist() == [3.0, 4.0]
    recolour(table, head, torch.tensor([0, 1]), 0, False)
    assert torch.equal(table.weight, old[[5, 5, 16]])
    assert len(head.weight) == 2
