"""The state of a run of several processes, as a folder that each writes its part of: ``checkpoint/step-00000250/``.

By torch.distributed.checkpoint, in safetensors and not in its own format, whose ``.metadata`` is a pickle that its
reader runs. ``state.json`` has what is no tensor. The folder is written under another name and renamed when all is on
the disk, then the older ones are removed: whatever has its name is whole. Tensors are copied at once and written in a
thread, while training goes on. Any number of processes reads it, whatever number wrote it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igpt_fast import files
from igpt_fast.files import printable, shown
from igpt_fast.world import World

FOLDER, STATE = "checkpoint", "state.json"
_NAME = re.compile(r"step-\d{8,10}")


def finished(out: Path) -> list[Path]:
    """The folders in a run's directory that are whole, the oldest first."""
    if not (out / FOLDER).is_dir():
        return []
    found = [path for path in (out / FOLDER).iterdir() if _NAME.fullmatch(path.name) and (path / STATE).is_file()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step that a folder was written at."""
    return int(path.name.removeprefix("step-"))


class Writer:
    """Writes folders, one at a time.

    Args:
        out: The run's directory.
        world: The processes, several.
        published: Called on the first process when a folder has its name.

    Raises:
        ImportError: A torch that does not write safetensors from several processes.
    """

    def __init__(self, out: Path, world: World, published: Callable[[], None]) -> None:
        import torch.distributed as dist

        try:
            from torch.distributed.checkpoint import HuggingFaceStorageWriter
        except ImportError as error:
            raise ImportError(f"training by several processes needs torch 2.8; this is {torch.__version__}") from error
        self._writer = HuggingFaceStorageWriter
        self._out, self._world, self._published = out, world, published
        self._group = dist.new_group(backend="gloo")  # its own: the thread's operations run beside those of the steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._target = out

    def save(self, tensors: dict[str, Tensor], about: dict[str, Any], step: int) -> None:
        """Begins to write: a collective operation. Waits until what was begun before is done.

        Raises:
            OSError, RuntimeError: See ``wait``.
        """
        from torch.distributed import checkpoint

        self.wait()
        self._target = self._out / FOLDER / f"step-{step:08}"
        partial = self._target.parent / f".{self._target.name}.partial"
        if self._world.first:
            self._target.parent.mkdir(exist_ok=True)
            for left in self._target.parent.glob(".step-*.partial"):  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            writer = self._writer(str(partial), save_distributed=True)
            written: Any = checkpoint.async_save(tensors, storage_writer=writer, process_group=self._group)
        self._pending = self._thread.submit(self._finish, written, partial, self._target, about)

    def _finish(self, written: Future[Any], partial: Path, target: Path, about: dict[str, Any]) -> None:
        written.result()
        if not self._world.first:
            return
        with (partial / STATE).open("w", encoding="utf-8") as file:
            json.dump(about, file)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():  # damaged: a whole one would have been resumed
            shutil.rmtree(target)
        partial.replace(target)
        for older in finished(self._out):
            if older != target:
                shutil.rmtree(older)
        self._published()

    @property
    def failed(self) -> bool:
        """Whether writing has failed, as far as this process knows; ``wait`` says why."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Until what was begun is written.

        Raises:
            OSError: It could not be; the message names the folder. What was written before is there.
            RuntimeError: Another process is gone, or has failed.
        """
        from torch.distributed.checkpoint import CheckpointException

        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except OSError as error:
            raise _about(error, self._target) from error
        except CheckpointException as failure:  # torch's is a BaseException, with what each process has to say
            raise _about(next(iter(failure.failures.values()))[0], self._target) from failure


def _about(error: BaseException, target: Path) -> Exception:
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, str(target))
    return RuntimeError(f"{target}: cannot be written: {files.first_line(error)}")


def read(path: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Fills tensors, or this process's parts of them, with those of a folder; it must have these and no others.

    Raises:
        OSError: It cannot be read.
        ValueError: Damaged, or not the tensors of this run; the message is the reason alone.
    """
    from torch.distributed import checkpoint

    for file in path.iterdir():
        if not file.is_file():  # opening a pipe could wait for ever
            raise ValueError(f"{printable(file.name)} is not a file")
    reader = checkpoint.HuggingFaceStorageReader(str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _check(reader.read_metadata().state_dict_metadata, tensors)
        try:
            checkpoint.load(tensors, storage_reader=reader, no_dist=world.size == 1)
        except checkpoint.CheckpointException as failure:
            raise ValueError(files.first_line(next(iter(failure.failures.values()))[0])) from failure
    for name, value in tensors.items():
        local = value.to_local() if hasattr(value, "to_local") else value
        if not bool(torch.isfinite(local).all()):
            raise ValueError(f"{name} is not finite")


def _check(stored: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """torch checks the size that a tensor's parts span, and neither that all are there nor their type."""
    if stored.keys() != tensors.keys():
        raise ValueError(f"its tensors are others than this run's: {files.listed(stored.keys() ^ tensors.keys(), 3)}")
    for name, value in tensors.items():
        found = stored[name]
        size, dtype = tuple(found.size), found.properties.dtype
        if size != tuple(value.shape) or dtype != value.dtype:
            raise ValueError(f"{name} is {shown(size)} {dtype}; want {tuple(value.shape)} {value.dtype}")
        end = 0  # parts are rows that follow each other, as FSDP cuts them
        for chunk in sorted(found.chunks, key=lambda chunk: (tuple(chunk.offsets), tuple(chunk.sizes))):
            offsets, sizes = tuple(chunk.offsets) or (0,), tuple(chunk.sizes) or (1,)
            if offsets != (end, *(0 for _ in size[1:])) or sizes[1:] != size[1:]:
                end = -1
                break
            end += sizes[0]
        if end != (size or (1,))[0]:
            raise ValueError(
                f"{name} is not whole: a file is missing, twice there, or one of another place or too many"
            )
