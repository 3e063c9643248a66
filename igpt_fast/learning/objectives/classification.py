"""Fine-tuning: the class of an image, and with the joint loss its pixels as well.

One pass serves both: the input is ``[SOS, x_0 .. x_{T-2}]``, position ``t`` predicts ``x_t``, and the mean over all
positions after the last norm goes through a linear classifier without bias. The loss is
``L_clf + gen_weight * L_gen``, nats an image and nats a pixel. A bidirectional network sees the whole image, without
SOS, and learns the classes alone.

A new classifier begins where logistic regression on the network's features ends, and not at random: from there the
network moves far less, and a few hundred steps are enough.

Source: "Generative Pretraining from Pixels" (Chen et al., 2020), section 2.3; for the beginning "Fine-Tuning can
Distort Pretrained Features and Underperform Out-of-Distribution" (Kumar et al., 2022).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from igpt_fast import ops
from igpt_fast.config import ImageGPTConfig
from igpt_fast.engines.network import logits_of
from igpt_fast.learning.objectives.protocol import Data
from igpt_fast.learning.objectives.starting import checksum, copy_of
from igpt_fast.likelihood.nats import evaluating, float64_sum
from igpt_fast.likelihood.transfer import sent
from igpt_fast.model import ImageGPTForCausalImageModeling


class ImageGPTWithBothHeads(ImageGPTForCausalImageModeling):
    """A model that draws and classifies. Its files are those of an ``ImageGPTForImageClassification`` and hold both
    heads, so that each of the classes loads what it has a use for.
    """

    saved_as = "ImageGPTForImageClassification"

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__(config)
        self.num_labels = self.config.num_labels
        self.score = nn.Linear(self.config.n_embd, self.config.num_labels, bias=False)
        nn.init.normal_(self.score.weight, 0.0, self.config.initializer_range)

    @classmethod
    def of(cls, model: ImageGPTForCausalImageModeling, class_names: Sequence[str]) -> ImageGPTWithBothHeads:
        """A copy of a model's weights in float32, to classify into these classes.

        The classifier is zero, unless the model has one for the same classes.
        """
        config = copy.deepcopy(model.config)
        names = dict(enumerate(class_names))
        known = isinstance(model, cls) and config.id2label == names and "score.weight" not in model.newly_initialized
        own = {"id2label": names, "classify_with_sos": not config.bidirectional}
        config.update({**own, "problem_type": "single_label_classification"})
        both = cls(config).float()
        state = {name: value.detach().float() for name, value in model.state_dict().items()}
        score = state["score.weight"] if known else torch.zeros_like(both.score.weight)
        both.load_state_dict({**state, "score.weight": score})
        return both


@dataclass(frozen=True, eq=False)
class Classification:
    """See ``Objective``.

    Args:
        start: What a run begins with.
        gen_weight: Of the nats of the pixels in the loss; 0 learns the classes alone.
        freeze_below: So many of the first blocks stay as they are, and with them the embeddings; 0: all learn.

    Raises:
        ValueError: A number out of its range, or a ``gen_weight`` for a bidirectional model.
    """

    start: ImageGPTWithBothHeads
    gen_weight: float = 1.0
    freeze_below: int = 0
    checksum: int = field(init=False)
    name: ClassVar[str] = "classification"
    figure: ClassVar[str] = "loss"

    def __post_init__(self) -> None:
        if self.start.config.bidirectional and self.gen_weight:
            raise ValueError("gen_weight: the model is bidirectional, which has no nats of the next pixel; want 0")
        # Now: a new classifier, which is zero, is fitted by whoever begins a run, and by nobody who goes on with one.
        object.__setattr__(self, "checksum", checksum(self.start))
        if not 0 <= self.freeze_below <= self.start.config.n_layer:
            raise ValueError(f"freeze_below is {self.freeze_below}; want 0..{self.start.config.n_layer}")

    def settings(self, data: Data) -> dict[str, Any]:
        n_classes = self.start.config.n_classes  # of drawing, which stay as they are
        return {"vocab_size": data.vocabulary + n_classes + 1, "n_classes": n_classes}

    def model(self, config: ImageGPTConfig) -> ImageGPTWithBothHeads:
        model = copy_of(self.start, config)
        if not self.gen_weight:
            model.lm_head.requires_grad_(False)
        if self.freeze_below:
            body = model.transformer
            for part in (body.wte, body.wpe, *body.h[: self.freeze_below]):
                part.requires_grad_(False)
        return model

    def identity(self) -> dict[str, int | float]:
        own = {"gen_weight": self.gen_weight, "freeze_below": self.freeze_below}
        return {**own, "checksum of the model to start from": self.checksum}

    def inputs(self, tokens: Tensor, labels: Tensor | None, generator: Generator) -> tuple[Tensor, ...]:
        if labels is None:
            raise ValueError("fine-tuning needs a class of every image; the data have none")
        return tokens, labels

    def losses(self, model: ImageGPTWithBothHeads, *inputs: Tensor) -> Tensor:
        tokens, labels = inputs
        classes, nats = _losses(model, tokens, labels, pixels=self.gen_weight != 0)[:2]
        return classes if nats is None else classes + self.gen_weight * nats

    def evaluate(self, model: ImageGPTWithBothHeads, data: Data) -> dict[str, float]:
        if not data.n_heldout:
            return {}
        return {f"heldout_{name}": value for name, value in class_figures(model, data.heldout_batches()).items()}


def _hidden(model: ImageGPTWithBothHeads, tokens: Tensor) -> Tensor:
    """(B, T, n_embd) after the last norm."""
    if model.config.classify_with_sos:
        tokens = F.pad(tokens, (1, 0), value=model.config.sos_token_id)[:, :-1]
    return model.transformer(tokens, use_cache=False).last_hidden_state


def fit_classifier(model: ImageGPTWithBothHeads, batches: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    """Sets the classifier to the logistic regression of the classes on the features, by L-BFGS.

    Without a bias, as the classifier has none; the features are divided by their standard deviation meanwhile, and the
    inverse of the penalty is 1 (scikit-learn's ``C``).

    Args:
        model: Its classifier is changed.
        batches: Tokens and labels of two images or more.
    """
    found, classes = [], []
    with torch.no_grad():
        for tokens, labels in batches:
            found.append(_hidden(model, tokens.to(model.device)).mean(dim=1).cpu().double())
            classes.append(labels)
    features, labels = torch.cat(found), torch.cat(classes)  # type: ignore[arg-type]
    deviation = features.std(dim=0).clamp_min(1e-6)
    features /= deviation
    weight = torch.zeros(model.num_labels, features.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(features @ weight.T, labels) + weight.square().sum() / (2 * len(labels))
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    with torch.no_grad():
        model.score.weight.copy_(weight / deviation)


def _losses(
    model: ImageGPTWithBothHeads, tokens: Tensor, labels: Tensor, pixels: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Cross-entropy of the classes, (B,); nats per pixel, (B,), if wanted; logits of the classes, (B, num_labels)."""
    config, hidden = model.config, _hidden(model, tokens)
    logits = logits_of(model.score, hidden.mean(dim=1)).float()
    classes = F.cross_entropy(logits, labels, reduction="none")
    if not pixels:
        return classes, None, logits
    colours = logits_of(model.lm_head, hidden)
    if config.n_classes:
        colours = colours[..., : config.n_colours].contiguous()
    return classes, ops.cross_entropy(colours, tokens, reduction="none").mean(dim=1), logits


@torch.no_grad()
def class_figures(model: ImageGPTWithBothHeads, batches: Iterable[tuple[Tensor, Tensor | None]]) -> dict[str, float]:
    """``accuracy``, ``class_loss`` and, of a causal model, ``nats`` per pixel of batches of tokens and labels.

    The model is in evaluation mode meanwhile.

    Raises:
        ValueError: No images, or images without classes.
    """
    device, count = model.device, 0
    sums = torch.zeros(())  # of the three; on the device, which is waited for in the end
    with evaluating(model):
        for tokens, labels in batches:
            if labels is None:
                raise ValueError("class_figures: the images have no classes")
            given = sent(tokens, device), sent(labels, device)
            classes, nats, logits = _losses(model, *given, pixels=not model.config.bidirectional)
            right = logits.argmax(dim=1) == given[1]
            each = (right, classes, torch.zeros_like(classes) if nats is None else nats)
            sums = sums + torch.stack([float64_sum(value) for value in each])
            count += len(tokens)
    if not count:
        raise ValueError("class_figures: no images")
    accuracy, loss, nats_ = (sums / count).tolist()
    return {"accuracy": accuracy, "class_loss": loss, **({} if model.config.bidirectional else {"nats": nats_})}
