"""What the compiled module makes of a model's weights, made once and kept while model and weights stay as they are.

Kept beside the model, not in it: copies, pickles and state dicts know nothing of it, and it goes when the model goes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from igpt_fast import backend


class _Kept(NamedTuple):
    source: Hashable  # settings and parameters that it was made from
    others: Hashable  # and further tensors
    result: Any


# model -> purpose -> what was made
_kept: WeakKeyDictionary[nn.Module, dict[Hashable, _Kept]] = WeakKeyDictionary()
_lock = Lock()


def _renew_lock() -> None:
    """Another thread's, which a forked child does not have, would stay locked."""
    global _lock
    _lock = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def packed(
    model: nn.Module, purpose: Hashable, settings: Hashable, pack: Callable[[], Any], others: dict[str, Tensor]
) -> Any:
    """The result of ``pack()``, kept for the next call.

    Parameters are compared by what they hold: PyTorch counts changes in place, but not those through ``.data``, numpy
    or shared memory, and reading weights takes a tenth of the time of packing them.

    Args:
        model: Whose parameters are packed, on the CPU.
        purpose: One result is kept for each.
        settings: What else the result depends on, besides the parameters and the instruction set.
        pack: Makes it; called by one thread at a time.
        others: What is packed with the parameters. A result with more serves where there are none.
    """
    assert backend._C is not None
    with _lock:
        source = (settings, backend._C.cpu_isa(), _contents(dict(model.named_parameters(remove_duplicate=False))))
        more = _contents(others)
        results = _kept.setdefault(model, {})
        old = results.pop(purpose, None)
        if old is None or old.source != source or (others and old.others != more):
            del old  # before the new one is there
            old = _Kept(source, more, pack())
        results[purpose] = old
        return old.result


def _contents(tensors: dict[str, Tensor]) -> Hashable:
    """A number of 64 bits for each tensor, its layout, and its name."""
    assert backend._C is not None
    found = [(name, tensor.detach()) for name, tensor in tensors.items()]
    sums = backend._C.checksums([(tensor.data_ptr(), _span(tensor)) for _, tensor in found], torch.get_num_threads())
    return tuple(
        (name, tensor.dtype, tensor.shape, tensor.stride(), sum_)
        for (name, tensor), sum_ in zip(found, sums, strict=True)
    )


def _span(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
