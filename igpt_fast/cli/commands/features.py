"""``igpt features``: what a model makes of images, as a file of numbers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from igpt_fast import processes
from igpt_fast.cli import checks, terminal

if TYPE_CHECKING:
    from igpt_fast.learning.feature_files import FeatureRun
    from igpt_fast.learning.feature_sources import Source
    from igpt_fast.world import World


def features(
    data: Positional[Path],
    out: Path = Path("features.npz"),
    model: str | None = None,
    layers: str = "all",
    bands: int = 1,
    pool: Literal["mean", "none"] = "mean",
    sos: bool = True,
    masks: int | None = None,
    classes: bool = False,
    skip_unreadable: bool = False,
    batch_size: int = 64,
    device: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16", "auto", "int8"] = "float32",
    backend: checks.Backend = "auto",
    json: bool = False,
    force: bool = False,
) -> None:
    """Extract features of images, of any layers in one pass, into a .npz or .parquet file.

    Example: igpt features pictures/ --layers 4,8 --out features.npz

    Under torchrun every process makes some of them. The same command goes on where one was interrupted.

    Args:
        data: A directory of images, or a token file (.npz) or shards in the model's colours, whose labels are taken
            along.
        out: The file to write: layer_4 and so on, (images, features) float32, with names, labels, and what they were
            made of. While it is made, finished parts stand beside it in a directory.
        model: Directory or hub id; the bundled emoji model if not given.
        layers: all, or numbers with commas between: 4 is what stands behind four blocks, 0 before the first one.
        bands: Horizontal bands of the image, whose means stand side by side.
        pool: mean, over the positions; or none, every position of its own.
        sos: The start token in front, with which a model was trained.
        masks: Of a model that was trained on masked images: how many masks each image is seen under, whose mean the
            features are; 5 if not given, 0 shows the whole image.
        classes: The sub-directories of a directory are classes.
        skip_unreadable: Leave out files that are not readable images, instead of failing.
        batch_size: Images that are computed together.
        device: cpu, cuda, cuda:N or mps; cuda if torch has it, if not given.
        dtype: float32, bfloat16, float16 or auto (the checkpoint's), of the computation; int8 rounds weights and
            activations to 8 bits, on the CPU.
        backend: auto, reference, cpu or cuda; see igpt env.
        json: Print one JSON object.
        force: Overwrite files, and begin anew where there are parts of something else.
    """
    checks.check_output(out, force, (".npz", ".parquet"))
    checks.check_range("--batch-size", batch_size, 1, 1 << 16)
    if not data.exists():
        raise FileNotFoundError(f"{data}: no such file or directory")
    if (classes or skip_unreadable) and not is_pictures(data):
        raise checks.UsageError("--classes, --skip-unreadable: only for a directory of images")
    checks.choose_backend(backend)
    device_ = checks.choose_device(device, processes.local_rank())
    from igpt_fast.cli.draw.exports import weights_hash
    from igpt_fast.learning import feature_files
    from igpt_fast.learning.extraction import check_bands, check_layers, check_masks, load_network
    from igpt_fast.world import world as processes_of

    if out.suffix.lower() == ".parquet":
        feature_files.need_pyarrow()
    with processes_of("finished parts are kept") as world:
        network = load_network(checks.model_name(model), device_, "float32" if dtype == "int8" else dtype)
        with checks.as_usage():
            numbers = check_layers(layers, network.config.n_layer)
            masks = check_masks(masks, network.config)
            check_bands(bands, network.config, None if pool == "none" else pool)
        source = read_source(data, model, network, classes, skip_unreadable)
        how: dict[str, Any] = {"sos": sos, "bands": bands, "pool": None if pool == "none" else pool}
        how |= {"masks": masks, "dtype": "int8" if dtype == "int8" else None}
        run = feature_files.FeatureRun(
            network, weights_hash(network), source, numbers, batch_size=batch_size, about=_about(data, model), **how
        )
        begun = world.agree("features", feature_files.begin(run, out, force) if world.first else 0)
        try:
            _extract(run, out, world, force, json, begun)
        except BaseException:
            if world.first:
                feature_files.abandon(out)
            raise


def _about(data: Path, model: str | None) -> dict[str, str]:
    from igpt_fast import __version__

    return {"data": data.name, "model": Path(checks.model_name(model)).name, "igpt_fast": __version__}


def is_pictures(data: Path) -> bool:
    """Whether it is a directory of pictures, and none of shards."""
    from igpt_fast.learning.shards import is_shards

    return data.is_dir() and not is_shards(data)


def read_source(data: Path, model: str | None, network: Any, classes: bool, skip_unreadable: bool) -> Source:
    """The images of a directory, of a token file or of shards, for a model."""
    from igpt_fast.learning.feature_sources import Pictures, TokenImages, check_palette, open_tokens

    if is_pictures(data):
        return Pictures(data, checks.read_processor(model), classes, skip_unreadable)
    tokens = open_tokens(data)
    check_palette(data, tokens, None if tokens.tokenizer.clusters is None else checks.read_processor(model), network)
    return TokenImages(tokens)


def _extract(run: FeatureRun, out: Path, world: World, force: bool, json: bool, begun: int) -> None:
    """This process's share; the first one writes and reports."""
    from igpt_fast.learning import feature_files
    from igpt_fast.learning.feature_files import parts_folder

    if begun and world.first:
        terminal.note(f"igpt: goes on with {begun} of {len(run.source)} images that are done")
    start, parts, interrupted = time.perf_counter(), run.parts, False
    with progress_bar("features", len(run.source), world.first) as show:
        try:
            feature_files.make(run, out, world.share(len(parts)), lambda done: show(world.progress(done)))
        except KeyboardInterrupt:
            interrupted = True
        stopped = world.gather(interrupted, interrupted, show)
    if interrupted or (stopped is not None and any(stopped)):
        if world.first and any(parts_folder(out).glob("part-*.npy")):
            terminal.say(f"igpt: what is done is kept in {parts_folder(out)}; the same command goes on")
        raise KeyboardInterrupt
    if stopped is None:
        return
    count = feature_files.finish(run, out, force)
    seconds = time.perf_counter() - start
    values = {
        "out": str(out),
        "images": count,
        "skipped": len(run.source) - count,
        "layers": list(run.layers),
        "features": run.shape[1],
        "sos": run.sos and not run.model.config.bidirectional,
        "bands": run.bands,
        "pool": run.pool or "none",
        "masks": run.masks,
        "classes": len(run.source.class_names),
        "processes": world.size,
        "seconds": round(seconds, 3),
        "images_per_second": round((len(run.source) - begun) / seconds, 3) if seconds else None,
    }
    text = f"{out}: {count} images, {len(run.layers)} layers of {run.shape[1]} features, {seconds:.1f} s"
    terminal.report(json, values, text)


@contextlib.contextmanager
def progress_bar(what: str, total: int, wanted: bool = True) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal; yields what sets how much is done."""
    with contextlib.closing(terminal.bar(what, total, "images", wanted)) as bar:
        yield lambda done: bar.update(done - bar.n) and None
