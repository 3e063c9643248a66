"""Kinship with transformers: our classes become subclasses of its classes as soon as it is loaded, whoever loads it.

Tools ask what something is: Trainer saves a ``config.json`` for a ``PreTrainedModel`` alone, PEFT adapts transformers'
``Conv1D`` by name. So a class here names the class of transformers that it stands for, which becomes the last of its
bases when there is something to ask: instances made before are included, what the class defines itself counts first,
and without transformers nothing changes. Nothing here imports it before ``library`` is asked to.

A class that has kin never calls ``super().__init__()``, which would be theirs some day: it names the base it means.
What theirs keeps on instances, ours has as class attributes or properties, since an instance may be older than the
kinship.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from igpt_fast.locks import Lock

Class = TypeVar("Class", bound=type)
_EXTRAS = {"transformers": "igpt_fast[hf]"}
_OLDEST = 5  # of transformers' major versions, whose classes ours can be


class Root:
    """The base of a class that has no other: Python gives new bases to none that has ``object`` alone."""


class Own:
    """An attribute that stands in ``__dict__`` or that ``__getattr__`` makes, whatever a base class has by its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        own = instance.__dict__
        return own[self.name] if self.name in own else instance.__getattr__(self.name)

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self.name] = value


_waiting: list[tuple[type, str, str]] = []
_lock = Lock()


def stands_for(module: str, name: str) -> Callable[[Class], Class]:
    """Declares a class to be transformers' class of a name in a module, once ``meet`` finds that one loaded."""

    def declare(cls: Class) -> Class:
        with _lock:
            _waiting.append((cls, module, name))
        return cls

    return declare


def meet() -> None:
    """Gives their new bases to the classes whose counterparts are loaded by now.

    Called wherever a tool gets hold of something of ours: when a model, a configuration or a processor is made, and
    when the modules of a model are listed, which every tool does first.
    """
    if not _waiting or "transformers" not in sys.modules:
        return
    with _lock:
        if _too_old(sys.modules["transformers"]):
            _waiting.clear()  # nobody will come
        for entry in list(_waiting):
            cls, module, name = entry
            kin = getattr(sys.modules.get(module), name, None)  # None too where its import is still under way
            if kin is None:
                continue
            _waiting.remove(entry)
            try:
                cls.__bases__ = (*(base for base in cls.__bases__ if not issubclass(kin, base)), kin)
            except TypeError as error:  # a transformers whose class is laid out in another way
                warnings.warn(f"igpt_fast: {cls.__name__} is no {module}.{name}: {error}", stacklevel=3)


def _too_old(transformers: Any) -> str | None:
    """The version of a transformers with other classes than these; one whose import is under way may have none yet."""
    version = str(getattr(transformers, "__version__", ""))
    major = re.match(r"\d+", version)
    return version if major and int(major[0]) < _OLDEST else None


def library(name: str, who: str) -> Any:
    """An optional library, loaded now.

    Raises:
        ImportError: It is not installed, or a transformers that is too old; the message starts with ``who``, who needs
            it.
    """
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = name.partition(".")[0]
        if error.name != missing:
            raise  # it is there, and lacks something itself
        install = _EXTRAS.get(missing, missing)
        raise ImportError(f"{who} needs {missing}: pip install '{install}'", name=missing) from error
    if name == "transformers":
        if version := _too_old(module):
            raise ImportError(f"{who} needs transformers>={_OLDEST}.0, found {version}", name=name)
        for _, kin_module, _ in list(_waiting):
            if kin_module.startswith("transformers."):
                importlib.import_module(kin_module)
    meet()
    return module
