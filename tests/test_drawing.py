"""The work of sample and complete: Ctrl-C at any moment, and parts that become a whole."""

import contextlib
import os
import signal

import torch

from igpt_fast import drawing
from igpt_fast.pipeline import Pipeline


def written_under(interrupts: int) -> list[str]:
    """What a block gets done in which Ctrl-C is pressed."""
    done = []
    with contextlib.suppress(KeyboardInterrupt):
        with drawing._undisturbed():
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
    merged = drawing.merge(parts, pipeline)
    assert torch.equal(merged.tokens, whole.tokens)
    assert merged.settings == whole.settings | {"batch_size": 4}
    for name in ("originals", "known", "given", "inputs", "seed", "labels"):
        ours, expected = getattr(merged, name), getattr(whole, name)
        assert torch.equal(ours, expected) if isinstance(ours, torch.Tensor) else ours == expected, name
    for name in ("logprobs", "known_logprobs", "effective_sample_size"):
        assert torch.allclose(getattr(merged, name), getattr(whole, name), atol=1e-3, equal_nan=True), name
    assert merged.grid().tobytes() == whole.grid().tobytes()
    late = drawing.merge(parts[1:], pipeline)  # the first process had finished nothing
    assert late.settings == merged.settings
    assert torch.equal(late.tokens, whole.tokens[2:])


def test_the_palette_is_what_the_tokens_become() -> None:
    pipeline = Pipeline.from_pretrained(device="cpu")
    generation = pipeline.sample(2, seed=1)
    palette = drawing._palette(pipeline)
    assert palette.shape == (128, 3)
    assert (palette[generation.tokens.view(2, 16, 16)] == drawing._pixels(generation)).all()
