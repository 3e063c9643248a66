"""The settings of a drawing to take away: the command and the Python that draw the same."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from igpt_fast.draws import PLAIN
from igpt_fast.sampling.request import Request


@dataclass(frozen=True)
class Setup:
    """What the page was started with, as far as it was said."""

    model: str | None = None
    device: str | None = None
    dtype: str | None = None  # that the model is loaded in
    rounded: str | None = None  # dtype of the decoder, where weights are not stored in it


def recipe(asked: Request, setup: Setup) -> dict[str, str]:
    """``command`` and ``python``, of files ``picture.png`` and ``mask.png`` if there are some."""
    drawn: dict[str, Any] = {"n": len(asked) * asked.n, "seed": asked.seed}
    drawn |= {name: value for name, value in asked.sampling.keywords().items() if value != getattr(PLAIN, name)}
    drawn |= {"candidates": asked.candidates} if asked.candidates > 1 else {}
    drawn |= {"cfg_scale": asked.scale} if asked.scale != 1.0 else {}
    label = None if asked.labels is None else int(asked.labels[0])
    return {"command": _command(asked, setup, drawn, label), "python": _python(asked, setup, drawn, label)}


def _command(asked: Request, setup: Setup, drawn: dict[str, Any], label: int | None) -> str:
    words = ["igpt", "sample"]
    if asked.images is not None:
        words = ["igpt", "complete", "picture.png"]
        words += ["--mask", "mask.png"] if asked.keep is None else ["--keep", f"{int(asked.keep)}rows"]
    options = {**drawn, "label": label, "model": setup.model, "device": setup.device}
    for name, value in {**options, "dtype": setup.rounded or setup.dtype}.items():
        if value is not None:
            words += ["-n" if name == "n" else f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _python(asked: Request, setup: Setup, drawn: dict[str, Any], label: int | None) -> str:
    loaded = {"device": setup.device, "dtype": setup.dtype}
    load = [repr(setup.model)] if setup.model is not None else []
    load += [f"{name}={value!r}" for name, value in loaded.items() if value is not None]
    options = {**drawn, "labels": label, "dtype": setup.rounded}
    call = [f"{name}={value!r}" for name, value in options.items() if value is not None]
    name, file = "sample", "samples.png"
    if asked.images is not None:
        mask = "igpt_fast.to_rgb(igpt_fast.open_image('mask.png'))[..., 0] > 127"
        call = ["'picture.png'", f"keep={mask if asked.keep is None else int(asked.keep)}", *call]
        name, file = "complete", "completions.png"
    lines = ("import igpt_fast", f"pipeline = igpt_fast.Pipeline.from_pretrained({', '.join(load)})")
    return "\n".join([*lines, f"pipeline.{name}({', '.join(call)}).save_grid({file!r})"])
