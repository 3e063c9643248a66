"""iGPT as a classifier of images: transformers' class, arguments, outputs and state-dict keys."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_fast.config import ImageGPTConfig
from igpt_fast.engines.cache import Cache
from igpt_fast.engines.network import logits_of, whole
from igpt_fast.model.imagegpt import ImageGPTModel, ImageGPTPreTrainedModel, mask_of_keys
from igpt_fast.model.outputs import ImageClassificationOutput


class ImageGPTForImageClassification(ImageGPTPreTrainedModel):
    """``ImageGPTModel``, the mean over the positions, and a linear classifier without bias.

    The mean is over all T positions, as in transformers, hidden ones of an ``attention_mask`` included. With
    ``config.classify_with_sos``, which ``igpt finetune`` sets, SOS is put in front of the images here, and what has no
    position then is cut off: a whole image loses its last pixel, as in training, and a shorter one nothing.

    Args:
        config: The hyper-parameters; ``num_labels`` outputs.
    """

    loss_type = "ForImageClassification"

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__(config)
        config = self.config
        self.num_labels = config.num_labels
        self.transformer = ImageGPTModel(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        nn.init.normal_(self.score.weight, 0.0, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassificationOutput | tuple[Any, ...]:
        """Logits of the classes, and the loss of ``labels``.

        Args:
            labels: (B,) int64 classes, (B, num_labels) multi-hot floats, or (B,) / (B, num_labels) targets
                of a regression; which one is ``config.problem_type``, or follows from ``num_labels`` and
                the dtype and is then kept in the configuration, as in transformers.

        For the other arguments see ``ImageGPTModel.forward``.

        Returns:
            ``ImageClassificationOutput`` or a tuple of its fields that are set.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if self.config.classify_with_sos:
            if any(argument is not None for argument in (past_key_values, token_type_ids, position_ids)):
                what = "past_key_values, token_type_ids and position_ids"
                raise ValueError(f"{what} are not supported where classify_with_sos puts SOS in front of an image")
            input_ids, inputs_embeds, attention_mask = self._begun(input_ids, inputs_embeds, attention_mask)
        base = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = logits_of(self.score, base.last_hidden_state.mean(dim=1))  # (B, num_labels)
        loss = None if labels is None else self._loss(whole(logits, self.score), labels)  # ()
        output = ImageClassificationOutput(loss, logits, base.past_key_values, base.hidden_states, base.attentions)
        return output if return_dict else output.to_tuple()

    def _begun(self, ids: Tensor | None, embeds: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, ...]:
        """The arguments of an image that begins with SOS: as many positions as there are, and no more."""
        most, sos = self.config.n_positions, self.config.sos_token_id
        rows = ids if embeds is None else embeds[..., 0] if embeds.ndim == 3 else None  # (..., T), of what is given
        if mask is not None and rows is not None and rows.ndim:
            known = mask_of_keys(mask, rows.shape[:-1].numel(), rows.shape[-1])
            mask = None if known is None else F.pad(known, (1, 0), value=True)[:, :most]
        if ids is not None and ids.ndim and ids.shape[-1] <= most:  # what is longer is refused as it is
            ids = F.pad(ids, (1, 0), value=sos)[..., :most]
        if embeds is not None and embeds.ndim == 3 and embeds.shape[1] <= most:
            begin = self.transformer.wte(torch.full((len(embeds), 1), sos, device=embeds.device))  # (B, 1, n_embd)
            embeds = torch.cat([begin.to(embeds.dtype), embeds], dim=1)[:, :most]
        return ids, embeds, mask

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        config = self.config
        if config.problem_type is None:
            if self.num_labels == 1:
                config.problem_type = "regression"
            elif labels.dtype in (torch.long, torch.int):
                config.problem_type = "single_label_classification"
            else:
                config.problem_type = "multi_label_classification"
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32  # losses are computed in fp32 at least
        logits, labels = logits.to(wide), labels.to(logits.device)  # (B, num_labels)
        if config.problem_type == "single_label_classification":
            return F.cross_entropy(logits.view(-1, self.num_labels), labels.view(-1))
        # Compared by size, since a broadcast would score every output against every target.
        if labels.shape != logits.shape and not (self.num_labels == 1 and labels.numel() == logits.numel()):
            wanted = f"{tuple(logits.shape)} for {config.problem_type}"
            raise ValueError(f"labels: expected {wanted}, got {tuple(labels.shape)}")
        labels = labels.view_as(logits).to(logits.dtype)  # (B, num_labels)
        if config.problem_type == "regression":
            return F.mse_loss(logits, labels)
        return F.binary_cross_entropy_with_logits(logits, labels)
