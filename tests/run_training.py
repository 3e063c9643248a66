"""One of several processes that train (gloo): runs the jobs that it is told, one after the other.

``python run_training.py FOLDER JOBS``, JOBS a list of JSON objects. Prints a line of JSON: what each has raised, or "".
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from igpt_fast.learning import train as recipe
from igpt_fast.learning.data import TokenData
from igpt_fast.learning.settings import Execution, TrainConfig
from igpt_fast.learning.watch import Watch
from igpt_fast.world import World, world

SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 2, "steps": 14, "batch_size": 7, "lr": 1e-3, "warmup_steps": 3}


def data() -> TokenData:
    tokens = torch.randint(0, 6, (30, 16), generator=torch.Generator().manual_seed(1))
    clusters = np.linspace(-1, 1, 18, dtype=np.float32).reshape(6, 3)
    return TokenData(tokens, clusters, torch.arange(30) % 5 == 0)


def watch(late: bool) -> Callable[..., Watch]:
    def made(*arguments: Any) -> Watch:
        found = Watch(*arguments)
        found.prompt = not late
        return found

    return made


def job(folder: Path, together: World, name: str, **options: Any) -> Any:
    """Trains in ``folder/name``. ``limit``: no file may become larger; ``late``: the device skips steps that are not
    finite, as a GPU does; other options are those of ``Execution``, ``train`` and ``TrainConfig``."""
    execution = {key: options.pop(key) for key in ("parallel", "accumulate", "checkpointing") if key in options}
    how = {key: options.pop(key) for key in ("resume", "stop_after") if key in options}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (options.pop("limit", limit[0]), limit[1]))
    late = options.pop("late", False)
    config = TrainConfig(**(SIZES | {"dropout": 0.0, "bf16": False, "eval_every": 10, "save_every": 6} | options))
    try:
        with mock.patch.object(recipe, "LOG_EVERY", 1), mock.patch("igpt_fast.learning.stepping.Watch", watch(late)):
            model = recipe.train(data(), folder / name, config, execution=Execution(**execution), world=together, **how)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    if together.first:
        torch.save(model.state_dict(), folder / f"{name}.pt")


def main(folder: Path, jobs: list[dict[str, Any]]) -> None:
    said = []
    with world("what was saved is kept") as together:
        for options in jobs:
            try:
                job(folder, together, **options)
                said.append("")
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
