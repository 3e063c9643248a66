"""``igpt train``: images, colour clusters, tokens, network."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from igpt_fast.cli import checks as terminal
from igpt_fast.learning.settings import TrainConfig


def train(
    data: Positional[Path | None] = None,
    out: Path = Path("runs/train"),
    side: int | None = None,
    n_clusters: Annotated[int | None, arg(aliases=["-k"])] = None,
    clusters: Path | None = None,
    all_pixels: bool = False,
    holdout: float | None = None,
    skip_unreadable: bool = False,
    classes: bool = False,
    resume: bool = False,
    device: str | None = None,
    dtype: str = "float32",
    backend: str = "auto",
    config: OmitArgPrefixes[TrainConfig] = TrainConfig(),  # noqa: B008 - a frozen value
    json: bool = False,
    force: bool = False,
) -> None:
    """Train a model: images, colour clusters, tokens, network; writes a checkpoint that all commands take.

    Args:
        data: A directory of images, or a token file (.npz with tokens, clusters, heldout); the bundled emoji if
            not given.
        out: Directory for model/, samples.png, log.jsonl and the training state.
        side: For a directory: edge that the square in the middle of each image is resized to; 32 if not given.
        n_clusters: For a directory: how many colours are fitted to its images; 512 if not given.
        clusters: For a directory: a .npy file of colours to use instead of fitting some.
        all_pixels: For a directory: fit to every pixel, and not to a sample of 400,000; see igpt clusters.
        holdout: For a directory: fraction of the images that is held out for evaluation; 0.1 if not given.
        skip_unreadable: For a directory: leave out files that are not readable images, instead of failing.
        classes: Learn to draw images of a class on demand. The classes are the sub-directories of a directory, or
            stand in a token file that has labels (and class_names).
        resume: Continue an interrupted run bit for bit; the settings must be the same.
        device: cpu, cuda or cuda:N; cuda if torch has it, if not given.
        dtype: float32, bfloat16 or float16, of the weights in model/; the training itself keeps float32 ones.
        backend: auto, reference, cpu or cuda; see igpt env.
        config: The run.
        json: Print one JSON object.
        force: Start afresh in a directory that holds a run.
    """
    if resume and force:
        raise terminal.UsageError("--resume goes on with a run, --force starts afresh; give one of them")
    preparation = {"--side": side, "--n-clusters": n_clusters, "--clusters": clusters, "--holdout": holdout}
    given = [name for name, value in preparation.items() if value is not None]
    given += [
        name for name, value in {"--all-pixels": all_pixels, "--skip-unreadable": skip_unreadable}.items() if value
    ]
    if (data is None or data.is_file()) and given:
        names = ", ".join(given)
        raise terminal.UsageError(f"{names}: only for a directory of images; a token file is taken as it is")
    if classes and data is None:
        raise terminal.UsageError(
            "--classes: the bundled emoji have none; give a directory or a token file with labels"
        )
    if not classes and config.label_dropout != TrainConfig.label_dropout:
        raise terminal.UsageError("--label-dropout: only with --classes")
    if clusters is not None and n_clusters is not None:
        raise terminal.UsageError("give --clusters or --n-clusters, not both")
    if clusters is not None and all_pixels:
        raise terminal.UsageError("--all-pixels: only where colours are fitted, without --clusters")
    if n_clusters is not None:
        terminal.check_clusters(n_clusters)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise terminal.UsageError(f"--dtype is {dtype!r}; want float32, bfloat16 or float16")
    if side is not None and not 1 <= side <= 256:
        raise terminal.UsageError(f"--side is {side}; want 1..256")
    if holdout is not None and not 0.0 <= holdout < 1.0:
        raise terminal.UsageError(f"--holdout is {holdout}; want a fraction in [0, 1)")
    terminal.choose_backend(backend)
    device_ = terminal.choose_device(device)
    import torch

    from igpt_fast.files import BUNDLED
    from igpt_fast.image import load_clusters
    from igpt_fast.learning import data as data_module
    from igpt_fast.learning import folders, run

    if classes and data is not None and data.is_file() and not data_module.has_labels(data):
        raise terminal.UsageError(f"--classes: {data} has no labels; train without, or write some into it")
    run.check_directory(out, resume=resume, overwrite=force)  # before the images are read, which takes its time
    if data is not None and data.is_dir():
        palette = None if clusters is None else load_clusters(clusters)
        tokens = folders.tokens_from_images(
            data,
            side or 32,
            len(palette) if palette is not None else n_clusters or 512,
            holdout=0.1 if holdout is None else holdout,
            seed=config.seed,
            clusters=palette,
            skip_unreadable=skip_unreadable,
            classes=classes,
            all_pixels=all_pixels,
        )
    else:
        tokens = data_module.load_tokens(BUNDLED.parent / "emoji16.npz" if data is None else data, classes=classes)

    def progress(record: dict[str, Any]) -> None:
        print(json_module.dumps(record), file=sys.stderr, flush=True)

    summary = run.run(
        tokens,
        out,
        config,
        device=device_,
        resume=resume,
        overwrite=force,
        save_dtype=getattr(torch, dtype),
        progress=progress,
    )
    terminal.report(
        json,
        summary,
        f"{out / 'model'}: {summary['parameters'] / 1e6:.2f} M parameters, {summary['steps']} steps,"
        f" held out {terminal.nats(summary['heldout_nats'])} nats/token"
        + (f", {terminal.nats(summary['heldout_class_nats'])} given the class" if classes else "")
        + f" (left+up lookup table {terminal.nats(summary['lookup_table_nats'])})",
    )
