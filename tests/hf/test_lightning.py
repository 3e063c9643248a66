"""A step of Lightning's Trainer with our model, the same as one by hand."""

import copy
from pathlib import Path
from typing import Any

import lightning
import torch
from small_models import ids, small
from torch.utils.data import DataLoader


class Module(lightning.LightningModule):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = self.model(input_ids=batch, labels=batch % 16).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_one_step_and_its_checkpoint(tmp_path: Path) -> None:
    model = small(spread=0.02, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    module, tokens = Module(model), ids(model, 4, 20)
    before = copy.deepcopy(module.model)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(module, DataLoader(tokens, batch_size=4))

    loss = before(input_ids=tokens, labels=tokens % 16).loss
    loss.backward()
    torch.testing.assert_close(trainer.callback_metrics["loss"], loss.detach())
    with torch.no_grad():
        for parameter in before.parameters():
            parameter -= 0.1 * parameter.grad
    for (name, ours), wanted in zip(module.model.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(ours, wanted, msg=name)

    path = tmp_path / "step.ckpt"
    trainer.save_checkpoint(path)
    loaded = Module.load_from_checkpoint(path, model=small(seed=1), map_location="cpu")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in module.state_dict().items())
