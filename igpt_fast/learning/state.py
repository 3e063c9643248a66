"""What a training run writes while it goes on: its log, and its state, written whole and read with suspicion."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igpt_fast import files
from igpt_fast.checkpoint.pickles import scan_torch_file
from igpt_fast.checks import finite_number, whole_number
from igpt_fast.files import printable, shown
from igpt_fast.learning.objectives.protocol import Data, Objective
from igpt_fast.learning.settings import TrainConfig
from igpt_fast.model import ImageGPTForCausalImageModeling

CHECKPOINT, LOG = "train.pt", "log.jsonl"
_MAX_LINE = 1 << 16  # bytes of a record of the log
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MAX_NUMBER = 1 << 32  # in the pickle: a seed may be as large


def same_run(config: TrainConfig, data: Data, objective: Objective) -> dict[str, Any]:
    """What must agree between a run and its continuation."""
    settings = {**dataclasses.asdict(config), **objective.identity()}
    if not data.n_classes:
        del settings["label_dropout"]
    return {"config": settings, "data": data.fingerprint()}


@dataclass
class TrainState:
    """Model, optimizer and the number of steps done."""

    model: ImageGPTForCausalImageModeling
    optimizer: torch.optim.AdamW
    step: int
    identity: dict[str, Any]  # see ``same_run``
    saved: int | None = None  # the step that the file holds

    def save(self, path: Path) -> None:
        """Writes the file, replacing an older one."""
        state: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"step": self.step, "identity": self.identity}
        for left in path.parent.glob(f".{path.name}.*.partial*"):
            left.unlink(missing_ok=True)  # from a process that was killed while it wrote
        with files.replacing(path) as partial:
            torch.save(state, partial)
        self.saved = self.step

    def load(self, path: Path) -> None:
        """Takes over the state in a file.

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
            self._check_form(state)
        except PermissionError:
            raise
        except Exception as error:  # what a damaged file raises is not documented
            raise ValueError(f"{path}: not a usable training state: {files.first_line(error)}") from error
        if differences := _differences(state["identity"], self.identity):
            raise ValueError(f"{path}: written by another run: {differences}")
        try:
            self._check_tensors(state)
        except (ValueError, RuntimeError) as error:  # a tensor in place of a number has no truth value
            raise ValueError(f"{path}: not a usable training state: {files.first_line(error)}") from error
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = self.saved = state["step"]

    def _check_form(self, state: Any) -> None:
        if not isinstance(state, dict) or state.keys() != {"model", "optimizer", "step", "identity"}:
            raise ValueError("has other entries than model, optimizer, step and identity")
        if not all(isinstance(state[name], dict) for name in ("model", "optimizer", "identity")):
            raise ValueError("model, optimizer or identity is no dictionary")
        whole_number("step", state["step"], 0, _MAX_NUMBER)
        config, data = state["identity"].get("config"), state["identity"].get("data")
        if not isinstance(config, dict) or not isinstance(data, str):
            raise ValueError("identity names no configuration or no data")
        for name, value in config.items():
            if not isinstance(name, str) or not isinstance(value, bool | int | float):
                raise ValueError(f"identity's {printable(name)} is {shown(value)}; want a number")

    def _check_tensors(self, state: dict[str, Any]) -> None:
        """torch checks the shapes of a model's state, but not of an optimizer's."""
        if state["step"] > self.identity["config"]["steps"]:
            raise ValueError(f"step {state['step']} lies behind the end of the run")
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
    before, now = theirs["config"], ours["config"]
    words = [
        f"{printable(key)} was {shown(before.get(key))}, is {shown(now.get(key))}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if theirs["data"] != ours["data"]:
        words.append("the data differ")
    return "; ".join(words)[:500]


class Output:
    """The log and the checkpoint of a run. Its directory is made, and the files of an outdated run removed, only when
    the first of them is written: a run that fails before costs nothing.
    """

    def __init__(self, out: Path, outdated: Sequence[Path]) -> None:
        self.checkpoint, self.log = out / CHECKPOINT, out / LOG
        self._outdated, self._begun = outdated, False

    def resume(self, step: int) -> float:
        """Goes on after ``step``; returns the seconds that the run took so far."""
        self._begun = True
        return _cut_log(self.log, step)

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record to the log."""
        self._begin()
        with self.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")

    def save(self, state: TrainState) -> None:
        """Writes the checkpoint."""
        self._begin()
        state.save(self.checkpoint)

    def _begin(self) -> None:
        if not self._begun:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            for path in self._outdated:
                path.unlink(missing_ok=True)
            _cut_log(self.log, 0)
            self._begun = True


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
