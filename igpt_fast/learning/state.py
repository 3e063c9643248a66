"""What a training run writes while it goes on: its log, and its state, written whole and read with suspicion."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igpt_fast import files, processes
from igpt_fast.checkpoint.pickles import scan_torch_file
from igpt_fast.checks import finite_number, whole_number
from igpt_fast.files import printable, shown
from igpt_fast.learning import checkpoints
from igpt_fast.learning.objectives.next_pixel import NextPixel
from igpt_fast.learning.objectives.protocol import Data, Objective
from igpt_fast.learning.settings import Execution, TrainConfig
from igpt_fast.world import World

CHECKPOINT, LOG, TENSORBOARD = "train.pt", "log.jsonl", "tensorboard"
_MAX_LINE = 1 << 16  # bytes of a record of the log
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MAX_NUMBER = 1 << 32  # in the pickle: a seed may be as large


def same_run(config: TrainConfig, data: Data, objective: Objective) -> dict[str, Any]:
    """What must agree between a run and its continuation; how they are computed (see ``computed_by``) need not."""
    settings = dataclasses.asdict(config) | {"objective": objective.name, **objective.identity()}
    settings["warmup_steps"] = config.warmup
    settings["compile"] = bool(config.compile)  # a CUDA graph launches the same kernels
    if not data.n_classes or not isinstance(objective, NextPixel):
        del settings["label_dropout"]
    return {"config": settings, "data": data.fingerprint()}


def computed_by(world: World, execution: Execution, precision: str = "") -> str:
    """What must agree as well for a continuation to be bit-identical; with dropout, another draws other masks.
    ``precision``: where it is not what the run asks for.
    """
    count = f"{world.size} processes ({execution.parallel})" if world.size > 1 else "1 process"
    return f"{count}, --accumulate {execution.accumulate}{precision}"


@dataclass
class TrainState:
    """Model, optimizer and the number of steps done. Under FSDP this process has parts of the tensors."""

    model: Any
    optimizer: torch.optim.AdamW
    step: int
    identity: dict[str, Any]  # see ``same_run``
    computed: str  # see ``computed_by``
    saved: int | None = None  # the step that the file holds

    @property
    def about(self) -> dict[str, Any]:
        """What is no tensor."""
        return {"step": self.step, "identity": self.identity, "computed": self.computed}

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """The model's and the optimizer's own, by name; the optimizer's are made where there has been no step."""
        named = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        learning = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for name, p in self.model.named_parameters():
            if id(p) in learning:
                moments = self.optimizer.state[p]
                if not moments:  # as the fused AdamW begins
                    moments["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                    moments |= {key: torch.zeros_like(p) for key in _MOMENTS}
                named |= {f"{key}.{name}": moments[key] for key in _MOMENTS}
        return named

    def save(self, path: Path) -> None:
        """Writes the file, replacing an older one."""
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = float(group["lr"])  # where it is a tensor, for a CUDA graph
        state = {"model": self.model.state_dict(), "optimizer": optimizer, **self.about}
        for left in path.parent.glob(f".{path.name}.*.partial*"):
            left.unlink(missing_ok=True)  # from a process that was killed while it wrote
        with files.replacing(path) as partial, partial.open("wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # of torch's archive, which could not be closed after a write had failed
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
        self.saved = self.step

    def load(self, path: Path) -> None:
        """Takes over the state in a file; warns where going on will not be bit-identical.

        Raises:
            FileNotFoundError: No such file.
            ValueError: Damaged, not the state of a training run, or that of another one; the message names the
                file.
        """
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file; there is no run to resume")
        if not path.is_file():
            raise ValueError(f"{path}: is a folder, a pipe or a device, not a file")
        try:
            # Refuses what would unpack to more than it holds, or names anything but tensors.
            if not scan_torch_file(path, largest=_MAX_NUMBER):
                raise ValueError("not a zip, as torch.save writes")
            state = torch.load(path, map_location="cpu", weights_only=True)
            known = {"model", "optimizer", "step", "identity"}
            if not isinstance(state, dict) or state.keys() - {"computed"} != known:
                raise ValueError("has other entries than model, optimizer, step, identity and computed")
            if not all(isinstance(state[name], dict) for name in ("model", "optimizer")):
                raise ValueError("model or optimizer is no dictionary")
            _check_about(state)
        except PermissionError:
            raise
        except Exception as error:  # what a damaged file raises is not documented
            raise ValueError(f"{path}: not a usable training state: {files.first_line(error)}") from error
        self._check_same_run(path, state)
        try:
            self._check_tensors(state)
        except (ValueError, RuntimeError) as error:  # a tensor in place of a number has no truth value
            raise ValueError(f"{path}: not a usable training state: {files.first_line(error)}") from error
        self._take(state)
        self._warn(path, state)

    def load_folder(self, path: Path, world: World) -> None:
        """Takes over the state in a folder of several processes' files: a collective operation. See ``load``."""
        about = files.read_json(path / checkpoints.STATE)
        try:
            _check_about(about)
            if about["step"] != checkpoints.step_of(path):
                raise ValueError(f"{checkpoints.STATE} is of step {about['step']}")
        except ValueError as error:
            raise ValueError(f"{path}: not a usable training state: {files.first_line(error)}") from error
        self._check_same_run(path, about)
        try:
            checkpoints.read(path, self.tensors(), world)
        except PermissionError:
            raise
        except Exception as error:  # what a damaged file raises is not documented
            raise ValueError(f"{path}: not a usable training state: {files.first_line(error)}") from error
        self._count(about["step"])
        self._warn(path, about)

    def _check_same_run(self, path: Path, state: dict[str, Any]) -> None:
        if differences := _differences(state["identity"], self.identity):
            raise ValueError(f"{path}: written by another run: {differences}")
        if state["step"] > self.identity["config"]["steps"]:
            raise ValueError(f"{path}: not a usable training state: its step lies behind the end of the run")

    def _warn(self, path: Path, state: dict[str, Any]) -> None:
        before = state.get("computed", self.computed)  # without: from before it was written down
        if before != self.computed and not processes.rank():
            dropout = ", with other dropout" if self.identity["config"]["dropout"] else ""
            text = f"{path}: was computed by {printable(before)[:100]}, goes on by {self.computed}: not bit for bit"
            warnings.warn(text + dropout, stacklevel=2)

    @torch.no_grad()
    def _take(self, state: dict[str, Any]) -> None:
        for name, value in self.model.state_dict().items():
            _copy(value, state["model"][name])
        self.tensors()  # makes those of the optimizer
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, moments in state["optimizer"]["state"].items():
            for key in _MOMENTS:
                _copy(self.optimizer.state[parameters[index]][key], moments[key])
        self._count(state["step"])

    def _count(self, step: int) -> None:
        """Of every parameter the optimizer counts the steps by itself."""
        self.step = self.saved = step
        for moments in self.optimizer.state.values():
            moments["step"].fill_(step)

    def _check_tensors(self, state: dict[str, Any]) -> None:
        """torch checks the shapes of a model's state, but not of an optimizer's."""
        own = self.model.state_dict()
        if state["model"].keys() != own.keys():
            raise ValueError("its weights have other names than the model's")
        for name, value in own.items():
            _check_tensor(name, state["model"][name], value)
        fresh = self.optimizer.state_dict()
        moments, groups = state["optimizer"].get("state"), state["optimizer"].get("param_groups")
        fixed = [_without_lr(group) for group in fresh["param_groups"]]
        if not isinstance(groups, list) or [_without_lr(group) for group in groups] != fixed:
            raise ValueError("its optimizer has other settings than this one")
        for group in groups:
            finite_number("its optimizer's lr", group.get("lr"), 0)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not isinstance(moments, dict) or moments.keys() != set(range(len(parameters) if state["step"] else 0)):
            raise ValueError("its optimizer has other parameters than this one")
        for index, moment in moments.items():
            if not isinstance(moment, dict) or moment.keys() != {"step", *_MOMENTS}:
                raise ValueError(f"its optimizer's state of parameter {index} is not AdamW's")
            _check_tensor(f"optimizer step {index}", moment["step"], torch.zeros(()))
            for name in _MOMENTS:
                _check_tensor(f"optimizer {name} {index}", moment[name], parameters[index])


def _check_about(state: dict[str, Any]) -> None:
    """Of what is no tensor: the form of it."""
    whole_number("step", state.get("step"), 0, _MAX_NUMBER)
    identity = state.get("identity")
    config, data = (identity.get("config"), identity.get("data")) if isinstance(identity, dict) else (None, None)
    if not isinstance(config, dict) or not isinstance(data, str):
        raise ValueError("identity names no configuration or no data")
    if not isinstance(state.get("computed", ""), str):
        raise ValueError("computed is no text")
    for name, value in config.items():
        wanted = str if name == "objective" else bool | int | float
        if not isinstance(name, str) or not isinstance(value, wanted):
            want = "a name" if wanted is str else "a number"
            raise ValueError(f"identity's {printable(name)} is {shown(value)}; want {want}")


def _copy(target: Tensor, value: Tensor) -> None:
    """Into a tensor, or this process's part of one."""
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


def _without_lr(group: Any) -> Any:
    return {k: v for k, v in group.items() if k != "lr"} if isinstance(group, dict) else None


def _check_tensor(name: str, value: Any, like: Tensor) -> None:
    if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
        found = f"{shown(tuple(value.shape))} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} is {found}; want {tuple(like.shape)} {like.dtype}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} is not finite")


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """What differs between two identities, in words; empty when nothing does."""
    before, now = {"objective": NextPixel.name} | theirs["config"], ours["config"]
    words = [
        f"{printable(key)} was {shown(before.get(key))}, is {shown(now.get(key))}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if theirs["data"] != ours["data"]:
        words.append("the data differ")
    return "; ".join(words)[:500]


class Output:
    """The log and the checkpoint of a run. Its directory is made, and the state and other files of an outdated run are
    removed, only when the first of them is written: a run that fails before costs nothing.

    One process writes ``train.pt``, several a folder (see ``checkpoints``); either replaces what was there before, and
    any number of processes reads both. Of several the first one writes the log.
    """

    def __init__(self, out: Path, outdated: Sequence[Path], world: World | None = None, board: bool = False) -> None:
        self.checkpoint, self.log, self._out = out / CHECKPOINT, out / LOG, out
        self._outdated, self._begun, self._world = outdated, False, world or World()
        self._board: Any = None
        self._new_board = _board_of(out / TENSORBOARD) if board and self._world.first else None
        self._writer = None
        if self._world.size > 1:
            self._writer = checkpoints.Writer(out, self._world, lambda: self.checkpoint.unlink(missing_ok=True))

    def load(self, state: TrainState) -> float:
        """Takes over what was saved last, and cuts the log off after it; returns the seconds that the run took so far.

        Raises:
            FileNotFoundError, ValueError: See ``TrainState.load``.
        """
        folders = checkpoints.finished(self._out)
        if self.checkpoint.exists() or not folders:
            state.load(self.checkpoint)
        if folders and checkpoints.step_of(folders[-1]) > (state.saved or -1):
            state.load_folder(folders[-1], self._world)
        return self.resume(state.step)

    def resume(self, step: int) -> float:
        """Goes on after ``step``; returns the seconds that the run took so far."""
        self._begun = True
        return _cut_log(self.log, step) if self._world.first else 0.0

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record to the log."""
        if not self._world.first:
            return
        self._begin()
        try:
            with self.log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
        except OSError as error:  # a full disk names no file
            raise OSError(error.errno, error.strerror, str(self.log)) from error
        if self._new_board is not None:
            self._board = self._board or self._new_board(record["step"])
            for name in record.keys() - {"step"}:
                if isinstance(record[name], int | float):
                    self._board.add_scalar(name, record[name], record["step"])
            self._board.flush()

    def save(self, state: TrainState) -> None:
        """Writes the checkpoint; of several processes, begins to.

        Raises:
            OSError: It cannot be written, or the one before; that before it is there.
        """
        if self._world.first:
            self._begin()
        if self._writer is None:
            state.save(self.checkpoint)
            for older in checkpoints.finished(self._out):
                shutil.rmtree(older)
        else:
            self._writer.save(state.tensors(), state.about, state.step)
            state.saved = state.step

    @property
    def failed(self) -> bool:
        """Whether what was begun to be written has failed."""
        return self._writer is not None and self._writer.failed

    def finish(self) -> None:
        """Until all is written.

        Raises:
            OSError: See ``save``.
        """
        if self._writer is not None:
            self._writer.wait()
        if self._board is not None:
            self._board.close()

    def _begin(self) -> None:
        if not self._begun:
            self._out.mkdir(parents=True, exist_ok=True)
            # A state of an older run could be of a later step, and would be taken for this one's.
            for path in (*self._outdated, self.checkpoint, *checkpoints.finished(self._out)):
                if path.is_dir():
                    shutil.rmtree(path)
                path.unlink(missing_ok=True)
            _cut_log(self.log, 0)
            self._begun = True


def _board_of(folder: Path) -> Any:
    """What makes the writer for TensorBoard when the run has got to a step.

    Raises:
        ImportError: It is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard is not installed; pip install 'igpt_fast[train]', or leave it out") from error
    return lambda step: SummaryWriter(str(folder), purge_step=step)


def _cut_log(path: Path, step: int) -> float:
    """Drops records after ``step``, written by a run that was killed later; returns the seconds of the last kept."""
    kept, seconds = "", 0.0
    if path.is_file() and step > 0:
        with files.open_input(path) as file:
            while line := file.readline(_MAX_LINE).decode("utf-8", "replace"):
                try:
                    record = json.loads(line)
                    whole_number("step", record["step"], 1, step)
                    seconds = finite_number("seconds", record["seconds"], 0)
                except (ValueError, TypeError, KeyError, RecursionError):
                    break  # half a line, from a kill; or a record after the step
                kept += line.rstrip("\n") + "\n"
    with files.replacing(path) as partial:
        partial.write_text(kept, encoding="utf-8")
    return seconds
