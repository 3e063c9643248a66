"""The work of sample and complete: Ctrl-C at any moment, and parts that become a whole."""

import contextlib
import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from igpt_fast import interrupts as interrupts_module
from igpt_fast.cli import main as cli
from igpt_fast.cli.draw import job as job_module
from igpt_fast.cli.draw.exports import Exports
from igpt_fast.cli.draw.options import Files
from igpt_fast.engines import choice
from igpt_fast.pipeline import Pipeline
from igpt_fast.sampling import decoding, results, streaming
from igpt_fast.world import World


def written_under(interrupts: int) -> list[str]:
    """What a block gets done in which Ctrl-C is pressed."""
    done = []
    with contextlib.suppress(KeyboardInterrupt):
        with interrupts_module.delayed_interrupt():
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


def job_of(folder: Path, pipeline: Pipeline, **more: Any) -> job_module.Job:
    files = Exports(folder / "a.png", Files(tokens=folder / "a.npz", **more), ())
    return job_module.Job("sample", pipeline.request(2, seed=1), files, {}, pipeline, World())


def test_files_that_cannot_be_written_leave_the_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file has appeared meanwhile, the disk is full, Ctrl-C is pressed twice: the work is not lost."""
    pipeline = Pipeline.from_pretrained(device="cpu")
    (tmp_path / "a.png").write_text("appeared")
    with pytest.raises(RuntimeError, match=r"a\.png: exists already; the tokens alone are saved in \S+a\.\w{8}\.npz$"):
        job_module.run(job_of(tmp_path, pipeline))
    (saved,) = tmp_path.glob("*.npz")
    with np.load(saved) as arrays:
        assert np.array_equal(arrays["tokens"].reshape(2, -1), pipeline.sample(2, seed=1).tokens)
    saved.unlink()

    def pressed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Exports, "write", pressed)
    with pytest.raises(KeyboardInterrupt):
        job_module.run(job_of(tmp_path, pipeline))
    (saved,) = tmp_path.glob("*.npz")
    assert str(saved) in capsys.readouterr().err


@pytest.mark.parametrize("where", ["begins", "draws"])
def test_ctrl_c_before_the_first_image_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    pipeline = Pipeline.from_pretrained(device="cpu")

    def pressed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*(Pipeline, "start") if where == "begins" else (job_module.Progress, "__call__"), pressed)
    with pytest.raises(KeyboardInterrupt):
        job_module.run(job_of(tmp_path, pipeline))
    err = capsys.readouterr().err
    assert err == "igpt: no image is finished, nothing is saved; a smaller --batch-size saves more often\n"
    assert not list(tmp_path.iterdir())


@pytest.fixture
def third_is_broken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """From the third batch on the logits are no numbers; the batches so far."""
    made: list[Any] = []

    def make(*arguments: Any) -> Any:
        decoder = choice.make_decoder(*arguments)
        made.append(decoder)
        if len(made) >= 3:
            prefill = decoder.prefill
            decoder.prefill = lambda tokens: torch.full_like(prefill(tokens), torch.nan)  # type: ignore[method-assign]
        return decoder

    monkeypatch.setattr(decoding, "make_decoder", make)
    return made


def test_an_error_saves_what_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, third_is_broken: list[Any]
) -> None:
    def full(*_: Any) -> None:
        raise OSError("the disk is full")

    files = {"--out": "a.png", "--tokens": "a.npz", "--sidecar": "a.json"}
    paths = [str(word) for option, name in files.items() for word in (option, tmp_path / name)]
    command = ["sample", "-n", "6", "--batch-size", "2", "--seed", "1", "--device", "cpu", "--json", *paths]
    assert cli.main(command) == 1
    out, err = capsys.readouterr()
    saved, why = err.splitlines()
    assert saved == "igpt: 4 of 6 images are finished and saved"
    assert why.startswith("igpt sample: the logits are not finite (image 4, position 0)")
    for values in (json.loads(out), json.loads((tmp_path / "a.json").read_text())):
        assert (values["images"], values["interrupted"]) == (4, False)
        assert values["error"].startswith("the logits are not finite")
    third_is_broken.clear()
    monkeypatch.setattr(Exports, "write", full)
    assert cli.main([*command, "--force"]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("igpt: the finished images cannot be saved: the disk is full; the tokens alone are saved")
    assert told[1] == why
    third_is_broken.clear()
    want = Pipeline.from_pretrained(device="cpu").sample(4, seed=1).tokens
    with np.load(tmp_path / "a.npz") as arrays:
        assert np.array_equal(arrays["tokens"].reshape(4, -1), want)


class Process(World):
    """One of two, whose parts are gathered by hand."""

    def __init__(self, rank: int, others: list[Any]) -> None:
        self.rank, self.size, self.others = rank, 2, others

    def gather(self, part: Any, *_: Any) -> list[Any] | None:
        self.others.append(part)
        return self.others[::-1] if self.first else None


@pytest.mark.usefixtures("third_is_broken")
def test_an_error_of_another_process_saves_what_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, parts = Pipeline.from_pretrained(device="cpu"), []
    files = Exports(tmp_path / "a.png", Files(singles=tmp_path / "s"), [f"{i}.png" for i in range(8)])
    job = job_module.Job("sample", pipeline.request(8, seed=1, batch_size=1), files, {}, pipeline, Process(1, parts))
    job_module.run(job)  # with an error it would end the first
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(decoding, "make_decoder", choice.make_decoder)
    with pytest.raises(RuntimeError, match="rank 1: the logits are not finite"):
        job_module.run(dataclasses.replace(job, world=Process(0, parts)))
    assert capsys.readouterr().err == "igpt: 6 of 8 images are finished and saved\n"
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [f"{i}.png" for i in range(6)]


@pytest.mark.parametrize("where", [(streaming, "_joined"), (World, "gather"), (job_module.Progress, "close")])
def test_a_second_ctrl_c_before_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[Any, str]
) -> None:
    """While what is finished is put together, gathered, or the bar closed."""
    pipeline, show, real = Pipeline.from_pretrained(device="cpu"), job_module.Progress.show, getattr(*where)

    def pressed(progress: job_module.Progress, images: float) -> None:
        show(progress, images)
        if images > 1.5:
            os.kill(os.getpid(), signal.SIGINT)

    def again(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(job_module.Progress, "show", pressed)
    monkeypatch.setattr(*where, again)
    job = dataclasses.replace(job_of(tmp_path, pipeline), request=pipeline.request(2, seed=1, batch_size=1))
    with pytest.raises(KeyboardInterrupt):
        job_module.run(job)
    with np.load(tmp_path / "a.npz") as arrays:
        assert len(arrays["tokens"]) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("candidates", [1, 2])
def test_ctrl_c_saves_the_completions_that_are_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, candidates: int
) -> None:
    """A signal, when five completions are drawn of three inputs with three each, batches of one image."""
    show = job_module.Progress.show

    def pressed(progress: job_module.Progress, images: float) -> None:
        show(progress, images)
        if images > (5.5 if candidates == 1 else 4.5):  # of candidates nothing is shown before one is chosen
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(job_module.Progress, "show", pressed)
    mask = np.full((16, 16), 255, np.uint8)
    mask[13, 3:9] = 0
    images = [tmp_path / f"in{i}.png" for i in range(3)]
    for path, array in zip((*images, tmp_path / "mask.png"), (mask // 2, mask // 3, mask, mask), strict=True):
        Image.fromarray(array).save(path)
    command = ["complete", *images, "--mask", tmp_path / "mask.png", "-n", "3", "--seed", "1", "--upscale", "1"]
    command += ["--candidates", candidates, "--batch-size", candidates, "--device", "cpu", "--json"]
    files = {"--out": "a.png", "--gif": "a.gif", "--tokens": "a.npz", "--sidecar": "a.json", "--singles": "s"}
    command += [word for option, name in files.items() for word in (option, tmp_path / name)]
    assert cli.main(list(map(str, command))) == 130
    out, err = capsys.readouterr()
    assert err == "igpt complete: interrupted\n"
    report, sidecar = json.loads(out), json.loads((tmp_path / "a.json").read_text())
    for values in (report, sidecar):
        assert (values["images"], values["completions"], values["interrupted"]) == (5, [3, 2, 0], True)
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [
        *(f"00000-{j:02}.png" for j in range(3)),
        *(f"00001-{j:02}.png" for j in range(2)),
    ]
    whole = Pipeline.from_pretrained(device="cpu").complete(
        list(map(str, images)), keep=mask > 0, n=3, seed=1, candidates=candidates, batch_size=candidates
    )
    with np.load(tmp_path / "a.npz") as arrays:
        assert np.array_equal(arrays["tokens"].reshape(5, -1), whole.tokens[:5])
    with Image.open(tmp_path / "a.png") as grid, Image.open(tmp_path / "a.gif") as animation:
        cells, expected = np.asarray(grid), np.asarray(whole.grid(scale=1))
        assert animation.size == grid.size == (6 * 17 - 1, 2 * 17 - 1)
    missing = (slice(17, 33), slice(4 * 17, 4 * 17 + 16))
    assert (cells[missing] == 255).all()
    cells = cells.copy()
    cells[missing] = expected[missing]
    assert np.array_equal(cells, expected[:33])


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
    assert merged.counts == [2, 2, 2]
    late = results.merge(parts[1:], pipeline.processor)  # the first process had finished nothing
    assert late.settings == merged.settings
    assert torch.equal(late.tokens, whole.tokens[2:])


def test_what_was_guessed_is_added_up() -> None:
    pipeline = Pipeline.from_pretrained(device="cpu")
    drawn = pipeline.sample(1, seed=0).tokens
    parts = [
        results.Generation(drawn, drawn.float(), pipeline.processor, 0, {"batch_size": 1, **rate}, guessed=guessed)
        for rate, guessed in (({"kept_per_step": 2.0}, (128, 256)), ({"kept_per_step": 1.0}, (256, 256)), ({}, (0, 0)))
    ]
    assert results.merge(parts, pipeline.processor).settings == {"batch_size": 1, "kept_per_step": 1.333}
    merged = results.merge(parts[2:] + parts[:2], pipeline.processor)
    assert (merged.settings["kept_per_step"], merged.guessed) == (1.333, (384, 512))
    assert results.merge(parts[2:], pipeline.processor).settings == {"batch_size": 1}


def test_interrupted_parts_are_merged() -> None:
    """Of each process a prefix of its own: three of four completions of two inputs, one of two of the third."""
    pipeline = Pipeline.from_pretrained(device="cpu")
    images = [np.full((16, 16, 3), 60 * i, np.uint8) for i in range(3)]
    request, parts = pipeline.request(2, images=images, keep=14, seed=3, batch_size=1), []
    for part, finished in ((range(2), 3), (range(2, 3), 1)):
        stream = pipeline.start(request.shard(part))
        for event in stream:
            if event.first == finished:
                break
        parts.append(stream.partial)
    merged, whole = results.merge(parts, pipeline.processor), pipeline.start(request).drained()
    assert merged.counts == [2, 1, 1]
    assert torch.equal(merged.tokens, whole.tokens[[0, 1, 2, 4]])
    cells, expected = np.array(merged.grid(scale=1)), np.asarray(whole.grid(scale=1))
    missing = slice(17, None), slice(3 * 17, 4 * 17)
    assert (cells[missing] == 255).all()
    cells[missing] = expected[missing]
    assert np.array_equal(cells, expected)


def test_the_palette_is_what_the_tokens_become() -> None:
    pipeline = Pipeline.from_pretrained(device="cpu")
    generation = pipeline.sample(2, seed=1)
    palette, pixels = job_module._palette(pipeline), np.stack([np.asarray(image) for image in generation.images])
    assert palette.shape == (128, 3)
    assert (palette[generation.tokens.view(2, 16, 16)] == pixels).all()
