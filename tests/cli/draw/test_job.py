"""The work of sample and complete: Ctrl-C at any moment, and parts that become a whole."""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from igpt_fast import interrupts as interrupts_module
from igpt_fast.cli.draw import job as drawing
from igpt_fast.cli.draw.exports import Exports
from igpt_fast.cli.draw.options import Drawing, Files
from igpt_fast.cli.draw.sharding import World
from igpt_fast.pipeline import Pipeline
from igpt_fast.sampling import results


def written_under(interrupts: int) -> list[str]:
    """What a block gets done in which Ctrl-C is pressed."""
    done = []
    with contextlib.suppress(KeyboardInterrupt):
        with interrupts_module.undisturbed():
            for _ in range(interrupts):
                os.kill(os.getpid(), signal.SIGINT)
            done.append("written")
        done.append("behind")
    return done


def test_ctrl_c_waits_until_the_files_are_written() -> None:
    assert written_under(0) == ["written", "behind"]
    assert written_under(1) == ["written"]
    assert written_under(2) == []  # the second one does not wait
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def job_of(folder: Path, pipeline: Pipeline, stream: Callable[[], Any], **more: Any) -> tuple[Any, ...]:
    files = Exports(folder / "a.png", Files(tokens=folder / "a.npz", **more), ())
    return drawing.Job("sample", 2, range(2), stream, files, {}), pipeline, Drawing(), World()


def test_files_that_cannot_be_written_leave_the_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file has appeared meanwhile, the disk is full, Ctrl-C is pressed twice: the work is not lost."""
    pipeline = Pipeline.from_pretrained(device="cpu")

    def stream() -> Any:
        (tmp_path / "a.png").write_text("appeared")
        return pipeline.stream(2, seed=1)

    with pytest.raises(RuntimeError, match=r"a\.png: exists already; the tokens alone are saved in \S+a\.\w{8}\.npz$"):
        drawing.run(*job_of(tmp_path, pipeline, stream), json=False)
    (saved,) = tmp_path.glob("*.npz")
    with np.load(saved) as arrays:
        assert np.array_equal(arrays["tokens"].reshape(2, -1), pipeline.sample(2, seed=1).tokens)
    saved.unlink()

    def pressed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Exports, "write", pressed)
    with pytest.raises(KeyboardInterrupt):
        drawing.run(*job_of(tmp_path, pipeline, stream), json=False)
    (saved,) = tmp_path.glob("*.npz")
    assert str(saved) in capsys.readouterr().err


def test_ctrl_c_before_the_first_batch_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = Pipeline.from_pretrained(device="cpu")

    class Pressed:
        partial = None

        def __iter__(self) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drawing.run(*job_of(tmp_path, pipeline, Pressed), json=False)
    err = capsys.readouterr().err
    assert err == "igpt: no batch is finished, nothing is saved; a smaller --batch-size saves more often\n"
    assert not list(tmp_path.iterdir())


def test_parts_are_merged() -> None:
    """What one process draws is what its parts are together, in every field."""
    pipeline = Pipeline.from_pretrained(device="cpu")
    mask = torch.ones(16, 16, dtype=torch.bool)
    mask[14, 3:6] = False
    images = [torch.full((16, 16, 3), 60 * i, dtype=torch.uint8) for i in range(3)]
    options = {"keep": mask, "n": 2, "candidates": 2, "seed": 3}
    whole = pipeline.complete(images, **options)
    parts = [
        pipeline.complete(images[:1], batch_size=4, **options),
        pipeline.complete(images[1:], first_input=1, batch_size=4, **options),
    ]
    merged = results.merge(parts, pipeline.processor)
    assert torch.equal(merged.tokens, whole.tokens)
    assert merged.settings == whole.settings | {"batch_size": 4}
    for name in ("originals", "known", "given", "inputs", "seed", "labels"):
        ours, expected = getattr(merged, name), getattr(whole, name)
        assert torch.equal(ours, expected) if isinstance(ours, torch.Tensor) else ours == expected, name
    for name in ("logprobs", "known_logprobs", "effective_sample_size"):
        assert torch.allclose(getattr(merged, name), getattr(whole, name), atol=1e-3, equal_nan=True), name
    assert merged.grid().tobytes() == whole.grid().tobytes()
    late = results.merge(parts[1:], pipeline.processor)  # the first process had finished nothing
    assert late.settings == merged.settings
    assert torch.equal(late.tokens, whole.tokens[2:])


def test_the_palette_is_what_the_tokens_become() -> None:
    pipeline = Pipeline.from_pretrained(device="cpu")
    generation = pipeline.sample(2, seed=1)
    palette = drawing._palette(pipeline)
    assert palette.shape == (128, 3)
    assert (palette[generation.tokens.view(2, 16, 16)] == drawing._pixels(generation)).all()
