"""What trainers and PEFT ask of a transformers model: recomputation, gradients of inputs, sizes."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle


class TrainableMixin(nn.Module):
    """The methods that trainers call; their names and arguments are transformers'."""

    supports_gradient_checkpointing = True
    _input_hook: RemovableHandle | None = None

    @property
    def base_model(self) -> Any:
        """The network without its head; it recomputes the blocks."""
        return getattr(self, "transformer", self)

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding ``wte``."""
        return self.base_model.wte

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations.

        Args:
            gradient_checkpointing_kwargs: For ``torch.utils.checkpoint.checkpoint``; ``use_reentrant=False`` if
                ``None``.
            every_n_layers: Recompute the first of every so many blocks.
            offload: Keep in the host's memory what the recomputation begins with.

        Raises:
            ValueError: ``every_n_layers`` is less than 1.
        """
        if every_n_layers < 1:
            raise ValueError(f"every_n_layers is {every_n_layers}; want 1 or more")
        keywords = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        base = self.base_model
        base.gradient_checkpointing = True
        for i, block in enumerate(base.h):
            block._gradient_checkpointing_func = functools.partial(_offloaded if offload else checkpoint, **keywords)
            block.gradient_checkpointing = i % every_n_layers == 0

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.base_model.gradient_checkpointing = False
        for block in self.base_model.h:
            block.gradient_checkpointing = False

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """transformers' newer name of ``gradient_checkpointing_enable``."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def activation_checkpointing_disable(self) -> None:
        """transformers' newer name of ``gradient_checkpointing_disable``."""
        self.gradient_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass."""
        return self.base_model.gradient_checkpointing

    @property
    def is_activation_checkpointing(self) -> bool:
        """transformers' newer name of ``is_gradient_checkpointing``."""
        return self.is_gradient_checkpointing

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters.

        Args:
            only_trainable: Count only those that require a gradient.
            exclude_embeddings: Leave ``wte`` and ``wpe`` out.
        """
        tables = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)} if exclude_embeddings else set()
        counted = (p for p in self.parameters() if p.requires_grad or not only_trainable)
        return sum(p.numel() for p in counted if id(p) not in tables)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters and, if asked, of the buffers."""
        tensors = itertools.chain(self.parameters(), self.buffers() if return_buffers else ())
        return sum(tensor.nbytes for tensor in tensors)

    def enable_input_require_grads(self) -> None:
        """Make the embedded tokens want a gradient, which reentrant checkpointing of a frozen model needs."""
        if self._input_hook is None:
            self._input_hook = self.get_input_embeddings().register_forward_hook(_require_grad)

    def disable_input_require_grads(self) -> None:
        """Leave the embedded tokens as they are again."""
        if self._input_hook is not None:
            self._input_hook.remove()
            self._input_hook = None


def _require_grad(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    output.requires_grad_(True)


def _offloaded(*args: Any, **keywords: Any) -> Any:
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(*args, **keywords)
