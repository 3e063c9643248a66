"""What trainers and PEFT ask of a transformers model: recomputation, gradients of inputs, sizes."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor, nn
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
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, every_n_layers: int = 1
    ) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations.

        Args:
            gradient_checkpointing_kwargs: For ``torch.utils.checkpoint.checkpoint``; ``use_reentrant=False`` if
                ``None``.
            every_n_layers: Recompute the first of every so many blocks.

        Raises:
            ValueError: ``every_n_layers`` is less than 1.
        """
        if every_n_layers < 1:
            raise ValueError(f"every_n_layers is {every_n_layers}; want 1 or more")
        base = self.base_model
        base.gradient_checkpointing = True
        base.checkpoint_every_n_layers = every_n_layers
        base.checkpoint_kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.base_model.gradient_checkpointing = False

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, every_n_layers: int = 1
    ) -> None:
        """transformers' newer name of ``gradient_checkpointing_enable``."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers)

    def activation_checkpointing_disable(self) -> None:
        """transformers' newer name of ``gradient_checkpointing_disable``."""
        self.gradient_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass."""
        return self.base_model.gradient_checkpointing

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
