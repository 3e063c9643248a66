"""How far a training is: a bar on a terminal, elsewhere a JSON line for each record, the first one at once."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from igpt_fast.cli import terminal

_REST = "{rate_noinv_fmt}, {remaining} left{postfix} |{bar}|"
_PAUSE = 0.5  # seconds between two looks at the figures, for which the device is waited for


class Training:
    """Both callbacks of a run: of its records, and, of one process, of its steps: of several, one that looks at the
    figures by itself would be the only one to find that they are not finite.

    Args:
        steps: Of the whole run.
        images: Of a step.
    """

    def __init__(self, steps: int, images: int, first: bool = True) -> None:
        self._bar = terminal.bar(
            "training",
            steps,
            "images",
            first,
            unit_scale=images,
            bar_format=f"{{desc}} {{percentage:.0f}}% of {steps} steps, {_REST}",
        )
        self._begun = False
        self._figures: dict[str, float] = {}
        self._looked = 0.0
        self.close = self._bar.close

    def record(self, record: dict[str, Any]) -> None:
        """A record of the log."""
        if self._bar.disable:
            terminal.note(json.dumps(record))
        self._show(record)
        self._advance(record["step"])

    def step(self, number: int, figures: Callable[[], dict[str, Any]]) -> None:
        """A step has been made."""
        if self._bar.disable:
            if not self._begun:
                self.record(figures())
            return
        if time.monotonic() - self._looked >= _PAUSE:
            self._show(figures())
        self._advance(number)

    def _advance(self, number: int) -> None:
        if not self._begun:  # a run that is resumed begins where it was
            self._begun, self._bar.n, self._bar.initial = True, number - 1, number - 1
        self._bar.update(number - self._bar.n)

    def _show(self, record: dict[str, Any]) -> None:
        self._looked = time.monotonic()
        self._figures |= {name: value for name, value in record.items() if "nats" in name or name == "heldout_accuracy"}
        text = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in self._figures.items())
        self._bar.set_postfix_str(text, refresh=False)


@contextlib.contextmanager
def training(out: Path, steps: int, images: int, first: bool = True) -> Iterator[Training]:
    """``Training`` of a run in a directory, for the length of a block; of one that Ctrl-C ends, says what is saved."""
    told = Training(steps, images, first)
    try:
        with contextlib.closing(told):
            yield told
    except KeyboardInterrupt as error:
        if first:
            _say_what_is_saved(error, out, steps)
        raise


@contextlib.contextmanager
def preparing(what: str, first: bool = True) -> Iterator[None]:
    """A line on a terminal that says what is being done, for the length of a block."""
    with contextlib.closing(terminal.bar(what, None, "", first, bar_format="{desc} ...")):
        yield


def _say_what_is_saved(error: KeyboardInterrupt, out: Path, steps: int) -> None:
    from igpt_fast.learning.checkpoints import finished
    from igpt_fast.learning.state import CHECKPOINT

    step = getattr(error, "step", None)
    if not ((out / CHECKPOINT).exists() or finished(out)):
        terminal.say("igpt: nothing is saved yet")
        return
    what = "what was saved last is" if step is None else f"step {step} of {steps} is saved"
    terminal.say(f"igpt: {what} in {out}; the same command with --resume, without --force, goes on")
