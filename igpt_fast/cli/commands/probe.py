"""``igpt probe``: how much of what images show can be read off a model's layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tyro.conf import OmitArgPrefixes, Positional

from igpt_fast.cli import checks, terminal
from igpt_fast.cli.commands.features import is_pictures

if TYPE_CHECKING:
    import numpy as np

    from igpt_fast.config import ImageGPTConfig

NO_EMOJI = (
    "the bundled emoji are not probed: their held-out part lacks whole kinds of pictures; give"
    " a directory whose sub-directories are classes, or a token file with labels"
)


@dataclass(frozen=True)
class Probing:
    """What is measured.

    Args:
        layers: all, or numbers with commas between: 4 is what stands behind four blocks, 0 before the first one.
        shots: Images of each class to learn from, numbers with commas between, or none; 1,10,100 as far as every class
            has more, if not given.
        tries: Draws of each number of shots, of which the mean and the standard deviation are told.
        knn: Nearest neighbours as well.
        concat: So many layers that follow each other as one feature, around the best one.
        attentive: A learned query that attends to all positions, of the best layer; up to twenty passes over the
            images, or 1,000 steps of a batch where these are more.
        bands: Horizontal bands of the image, whose means stand side by side.
        masks: Of a model that was trained on masked images: how many masks each image is seen under, whose mean the
            features are; 5 if not given, 0 shows the whole image.
        sos: The start token in front, with which a model was trained.
        seed: Of draws, parts of train and random weights.
        batch_size: Images that are computed together.
    """

    layers: str = "all"
    shots: str | None = None
    tries: int = 5
    knn: bool = False
    concat: int = 0
    attentive: bool = False
    bands: int = 1
    masks: int | None = None
    sos: bool = True
    seed: int = 0
    batch_size: int = 64

    def keywords(self, config: ImageGPTConfig) -> dict[str, Any]:
        """Of ``learning.probe.probe``; a value out of its range is a mistake of usage."""
        from igpt_fast.learning.extraction import check_bands, check_concat, check_layers, check_masks

        for option, value, least, most in (
            ("--tries", self.tries, 1, 1000),
            ("--seed", self.seed, 0, (1 << 32) - 1),
            ("--batch-size", self.batch_size, 1, 1 << 16),
        ):
            checks.check_range(option, value, least, most)
        with checks.as_usage():
            layers, masks = check_layers(self.layers, config.n_layer), check_masks(self.masks, config)
            check_concat(self.concat, layers)
            check_bands(self.bands, config)
            return {**vars(self), "layers": layers, "masks": masks, "shots": _shots(self.shots)}


def _shots(text: str | None) -> list[int] | None:
    if text is None or text == "none":
        return None if text is None else []
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part[:9]) > 0 and len(part) < 9 for part in parts):
        raise ValueError(f"shots is {text!r}; want none, or numbers in 1..99999999 with commas between")
    return [int(part) for part in parts]


class _Set(NamedTuple):
    """(N, T) tokens or (N, H, W, 3) pixels, and (N,) names of classes; which of them are held out."""

    images: Any
    labels: np.ndarray
    heldout: np.ndarray

    def part(self, chosen: np.ndarray) -> tuple[Any, np.ndarray]:
        return self.images[chosen], self.labels[chosen]


def probe(
    data: Positional[Path | None] = None,
    test: Path | None = None,
    model: str | None = None,
    probing: OmitArgPrefixes[Probing] = Probing(),
    holdout: float | None = None,
    skip_unreadable: bool = False,
    out: Path | None = None,
    plot: Path | None = None,
    device: str | None = None,
    dtype: checks.FloatsOrStored = "float32",
    backend: checks.Backend = "auto",
    json: bool = False,
    force: bool = False,
) -> None:
    """Probe a model: accuracy of a logistic regression on each layer, beside raw pixels and random weights.

    Example: igpt probe labelled/ --model runs/train/model --plot probe.png

    Args:
        data: A directory whose sub-directories are classes, or a token file (.npz) or shards with labels, in the
            model's colours.
        test: The same of images to test on, all of them; the held-out part of data, if not given.
        model: Directory or hub id; the bundled emoji model if not given.
        probing: What is measured.
        holdout: Fraction of the images of a directory that is tested on, without --test; 0.1 if not given.
        skip_unreadable: Leave out files of a directory that are not readable images, instead of failing.
        out: Write all figures to this .json file.
        plot: Draw accuracy by layer: .png, .svg or .pdf; needs matplotlib.
        device: cpu, cuda, cuda:N or mps; cuda if torch has it, if not given.
        dtype: float32, bfloat16, float16 or auto (the checkpoint's), of the features' computation.
        backend: auto, reference, cpu or cuda; see igpt env.
        json: Print one JSON object.
        force: Overwrite files.
    """
    _check(data, test, holdout, skip_unreadable)
    assert data is not None
    checks.check_output(out, force, (".json",))
    checks.check_output(plot, force, (".png", ".svg", ".pdf"))
    checks.choose_backend(backend)
    device_ = checks.choose_device(device)
    from igpt_fast import files
    from igpt_fast.learning.classifiers import need_sklearn
    from igpt_fast.learning.extraction import load_network
    from igpt_fast.learning.probe import probe as run
    from igpt_fast.learning.probe_result import need_matplotlib

    need_sklearn("igpt probe")
    if plot is not None:
        need_matplotlib()
    network = load_network(checks.model_name(model), device_, dtype)
    keywords = probing.keywords(network.config)
    share = 0.0 if test is not None else 0.1 if holdout is None else holdout
    own = _read(data, model, network, share, skip_unreadable)
    train = own.part(~own.heldout if test is None else own.heldout | True)
    if test is not None:
        other = _read(test, model, network, 0.0, skip_unreadable)
        tested = other.part(other.heldout | True)
    elif own.heldout.any():
        tested = own.part(own.heldout)
    else:
        raise ValueError(f"{data}: holds nothing out to test on; give --test, or a larger --holdout")
    with _progress() as progress:
        result = run(train, tested, network, checks.read_processor(model).clusters, progress=progress, **keywords)
    if out is not None:
        with files.replacing(out, overwrite=force) as partial:
            partial.write_text(result.to_json(), encoding="utf-8")
    if plot is not None:
        result.plot(plot, overwrite=force)
    if json:
        terminal.report(True, result.to_dict(), "")
    else:
        terminal.lines(result.table().splitlines())


def _check(data: Path | None, test: Path | None, holdout: float | None, skip_unreadable: bool) -> None:
    if data is None:
        raise checks.UsageError(NO_EMOJI)
    for path in (data, *([] if test is None else [test])):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or directory")
    if test is not None and test.samefile(data):
        raise checks.UsageError(f"--test {test}: is what is trained on; without --test the held-out part serves")
    if holdout is not None and not 0.0 < holdout < 1.0:
        raise checks.UsageError(f"--holdout is {holdout}; want a fraction in (0, 1)")
    if holdout is not None and (test is not None or not is_pictures(data)):
        raise checks.UsageError("--holdout: only of a directory, and without --test")
    if skip_unreadable and not any(is_pictures(path) for path in (data, test) if path is not None):
        raise checks.UsageError("--skip-unreadable: only for a directory of images")


def _read(path: Path, model: str | None, network: Any, holdout: float, skip: bool) -> _Set:
    """All images with their classes by name, in memory."""
    import numpy as np

    from igpt_fast.learning.feature_sources import Pictures, TokenImages, check_palette, open_tokens
    from igpt_fast.learning.folders import held_out
    from igpt_fast.learning.shards import has_labels

    if is_pictures(path):
        source = Pictures(path, checks.read_processor(model), classes=True, skip_unreadable=skip)
        readable, pixels = source.pixels(range(len(source)))
        if not len(pixels):
            raise ValueError(f"{path}: none of its {len(source)} images can be read")
        assert source.labels is not None
        labels = np.array(source.class_names)[source.labels.numpy()]
        heldout = np.array([held_out(name, holdout) for name in source.names])
        return _Set(pixels, labels[readable], heldout[readable])
    if path.is_file() and checks.is_bundled_data(path):
        raise checks.UsageError(NO_EMOJI)
    if not has_labels(path):
        raise checks.UsageError(f"{path}: has no labels: there is nothing to probe it for")
    data = open_tokens(path)
    if data.tokenizer.clusters is None:
        raise ValueError(f"{path}: its tokens are no colours, and a probe stands beside raw pixels; see igpt features")
    check_palette(path, data, checks.read_processor(model), network)
    assert data.labels is not None
    images = TokenImages(data).tokens(range(len(data.heldout)))[1].numpy()
    return _Set(images, np.array(list(data.class_names))[data.labels.numpy()], data.heldout.numpy())


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, of what is being done."""
    with contextlib.closing(terminal.bar("", None, "images")) as bar:

        def show(what: str, done: int, total: int) -> None:
            if bar.disable:
                return
            if bar.desc != f"{what}: ":
                bar.reset(total)
                bar.set_description(what)
            bar.update(done - bar.n)

        yield show
