"""What a training run writes while it goes on: its log and its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from igpt_fast import files
from igpt_fast.checks import finite_number, whole_number
from igpt_fast.learning.state import TrainState

CHECKPOINT, LOG = "train.pt", "log.jsonl"
_MAX_LINE = 1 << 16  # bytes of a record


class Output:
    """The log and the checkpoint of a run. Its directory is made, and an outdated run in it removed, only when the
    first of them is written: a run that fails before costs nothing.

    Args:
        out: The directory.
        outdated: Files to remove.
    """

    def __init__(self, out: Path, outdated: Sequence[Path]) -> None:
        self.checkpoint, self.log = out / CHECKPOINT, out / LOG
        self._outdated = outdated
        self._begun = False

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
    kept: list[str] = []
    seconds = 0.0
    if path.is_file() and step > 0:
        with files.open_input(path) as file:
            while line := file.readline(_MAX_LINE).decode("utf-8", "replace"):
                try:
                    record = json.loads(line)
                    whole_number("step", record["step"], 1, step)
                    seconds = finite_number("seconds", record["seconds"], 0)
                except (ValueError, TypeError, KeyError, RecursionError):
                    break  # half a line, from a kill; or a record after the step
                kept.append(line.rstrip("\n") + "\n")
    with files.replacing(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")
    return seconds
