"""Steps of the CUDA decoder that nobody uses, kept with their graphs for the next decoder of the model."""

from __future__ import annotations

from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from igpt_fast.engines.cuda.step import CudaStep
from igpt_fast.engines.network import Model, Network

_idle_lock = RLock()  # the collector may end a decoder, which gives, inside of a block
_idle: WeakKeyDictionary[Any, tuple[Any, CudaStep]] = WeakKeyDictionary()  # model -> (its key, a step nobody uses)


def take(model: Model, key: Any, network: Network) -> CudaStep | None:
    """A step of this key, of which ``network.key()`` is a part, that a decoder of the model has left behind; one of
    another key is dropped with its memory.
    """
    with _idle_lock:
        found = _idle.pop(model, None)
    if found is None or found[0] != key:
        return None
    found[1].network = network
    return found[1]


def give(model: Model, key: Any, step: CudaStep) -> None:
    """Leaves a step for the model's next decoder of this key; the one that was there is dropped."""
    del step.network  # the model's weights may go, or be others in the same place
    with _idle_lock:
        _idle[model] = key, step


def idle_bytes(model: Model) -> int:
    """Of what a decoder of the model has left behind, which the next one uses or drops."""
    with _idle_lock:
        found = _idle.get(model)
    return 0 if found is None else found[1].bytes


def forget() -> None:
    """Drops what decoders of all models have left behind, with its memory."""
    with _idle_lock:
        _idle.clear()
