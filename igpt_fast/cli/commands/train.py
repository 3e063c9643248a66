"""``igpt train``: images, colour clusters, tokens, network."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from igpt_fast import processes
from igpt_fast.cli import checks, progress, terminal
from igpt_fast.learning.settings import REDUCE_OVERHEAD, Execution, TrainConfig
from igpt_fast.world import world

if TYPE_CHECKING:
    from igpt_fast.learning.data import ImageSet
    from igpt_fast.learning.objectives.protocol import Objective


@dataclass(frozen=True)
class Preparation:
    """How a directory of images becomes tokens.

    Args:
        side: Edge that the square in the middle of each image is resized to; 32 if not given.
        n_clusters: How many colours are fitted to the images; 512 if not given.
        clusters: A .npy file of colours to use instead of fitting some.
        all_pixels: Fit to every pixel, and not to a sample of 400,000; see igpt clusters.
        holdout: Fraction of the images that is held out for evaluation; 0.1 if not given.
        skip_unreadable: Leave out files that are not readable images, instead of failing.
    """

    side: int | None = None
    n_clusters: Annotated[int | None, arg(aliases=["-k"])] = None
    clusters: Path | None = None
    all_pixels: bool = False
    holdout: float | None = None
    skip_unreadable: bool = False

    def check(self, of_directory: bool) -> None:
        """Fails, as a mistake of usage, where a value is out of its range, or has nothing to work on."""
        given = [name.replace("_", "-") for name, value in vars(self).items() if value != getattr(Preparation, name)]
        if given and not of_directory:
            names = ", --".join(given)
            raise checks.UsageError(f"--{names}: only for a directory of images; tokens are taken as they are")
        if self.clusters is not None and self.n_clusters is not None:
            raise checks.UsageError("give --clusters or --n-clusters, not both")
        if self.clusters is not None and self.all_pixels:
            raise checks.UsageError("--all-pixels: only where colours are fitted, without --clusters")
        checks.check_clusters(self.n_clusters)
        checks.check_range("--side", self.side, 1, 256)
        if self.holdout is not None and not 0.0 <= self.holdout < 1.0:
            raise checks.UsageError(f"--holdout is {self.holdout}; want a fraction in [0, 1)")


def train(
    data: Positional[Path | None] = None,
    out: Path = Path("runs/train"),
    preparation: OmitArgPrefixes[Preparation] = Preparation(),
    objective: Literal["next_pixel", "masked"] = "next_pixel",
    classes: bool = False,
    init: str | None = None,
    resume: bool = False,
    plot: Path | None = None,
    device: str | None = None,
    dtype: checks.Floats = "float32",
    backend: checks.Backend = "auto",
    config: OmitArgPrefixes[TrainConfig] = TrainConfig(),  # noqa: B008 - a frozen value
    execution: OmitArgPrefixes[Execution] = Execution(),  # noqa: B008
    json: bool = False,
    force: bool = False,
) -> None:
    """Train a model: images, colour clusters, tokens, network; writes a checkpoint that all commands take.

    Example: igpt train pictures/ --side 32 -k 512 --out runs/mine

    Args:
        data: A directory of images, of shards (igpt tokenize), or a token file (.npz with tokens, clusters, heldout);
            the bundled emoji if not given. Shards are read as they are needed; so are more than 4,096 images, by
            every process of torchrun: give several of them shards.
        out: Directory for model/, samples.png, log.jsonl and the training state.
        preparation: How a directory of images becomes tokens.
        objective: What is learned. next_pixel: each pixel from those before it, to draw, to score, to read features
            of. masked: some pixels from all others (OpenAI's BERT), to read features of; samples.png then shows what
            it makes of masked images.
        classes: Learn to draw images of a class on demand. The classes are the sub-directories of a directory, or
            stand in a token file that has labels (and class_names); the bundled emoji have nine.
        init: A folder or hub name of a model to go on from, which gives the network's size. A directory of images gets
            its side and colours, unless others are asked for; new colours begin as the nearest old ones, positions are
            interpolated, new classes begin as an image of any.
        resume: Continue an interrupted run; the settings must be the same. Bit for bit with as many processes and the
            same --parallel and --accumulate; with others, dropout draws other masks, and a line says so.
        plot: Draw the log, the nats of training and held-out images by step: .png, .svg or .pdf; needs matplotlib.
        device: cpu, cuda, cuda:N or mps; cuda if torch has it, if not given. Under torchrun, cuda is the GPU
            LOCAL_RANK.
        dtype: float32, bfloat16 or float16, of the weights in model/; the training itself keeps float32 ones.
        backend: auto, reference, cpu or cuda; see igpt env.
        config: The run.
        execution: How it is computed: the result is the same up to rounding, and to the masks that dropout draws.
        json: Print one JSON object.
        force: Start afresh in a directory that holds a run.
    """
    collectives = _collectives(device) if processes.size() > 1 else ""
    with world("what was saved is kept; go on with --resume", collectives) as together:
        if resume and force:
            raise checks.UsageError("--resume goes on with a run, --force starts afresh; give one of them")
        if together.first:
            checks.check_output(plot, force or resume, (".png", ".svg", ".pdf"), made=out)
        if data is not None and not data.exists():
            raise FileNotFoundError(f"{data}: no such file or directory")
        preparation.check(data is not None and data.is_dir())
        _check_together(preparation, objective, classes, init)
        if not classes and config.label_dropout != TrainConfig.label_dropout:
            raise checks.UsageError("--label-dropout: only with --classes")
        if processes.size() == 1 and execution.parallel != Execution.parallel:
            raise checks.UsageError(f"--parallel {execution.parallel}: only for several processes, under torchrun")
        checks.choose_backend(backend)
        device_ = checks.choose_device(device, processes.local_rank())
        if config.compile == REDUCE_OVERHEAD and not str(device_).startswith("cuda"):
            raise checks.UsageError(f"--compile {REDUCE_OVERHEAD}: CUDA graphs of the steps, and --device is {device_}")
        import torch

        from igpt_fast.learning import curve, run
        from igpt_fast.learning.objectives.masked import Masked
        from igpt_fast.learning.probe_result import need_matplotlib
        from igpt_fast.learning.shards import has_labels, is_shards
        from igpt_fast.learning.state import LOG

        if plot is not None:
            need_matplotlib()
        if data is not None and is_shards(data):
            preparation.check(of_directory=False)
        if classes and data is not None and not has_labels(data):
            raise checks.UsageError(f"--classes: {data} has no labels; train without, or write some into it")
        how: dict[str, Any] = {"resume": resume, "overwrite": force}
        run.check_directory(out, **how)  # before the images are read, which takes its time
        how |= {"objective": Masked() if objective == "masked" else None, "device": device_, "execution": execution}
        how |= {"save_dtype": getattr(torch, dtype), "world": together}
        start = time.perf_counter()
        with progress.preparing("reading images, fitting colours", together.first):
            tokens = together.first_makes(lambda: _tokens(data, preparation, classes, config.seed, init))
        prepared = time.perf_counter() - start
        if init is not None:
            how["objective"], config = _continued(init, tokens, config)
        with progress.training(out, config.steps, config.batch_size, together.first) as told:
            how |= {"progress": told.record, "on_step": told.step if together.size == 1 else None}
            summary = run.run(tokens, out, config, **how)
    if together.first:
        summary |= {"preparation_share": round(prepared / (time.perf_counter() - start), 3)}
        if plot is not None:
            curve.plot(out / LOG, plot, overwrite=force or resume)
        _report(out, summary, objective, classes, json)


def _check_together(preparation: Preparation, objective: str, classes: bool, init: str | None) -> None:
    """Fails, as a mistake of usage, where one of them says what another makes no sense with."""
    if init is not None and preparation.all_pixels and preparation.n_clusters is None:
        raise checks.UsageError("--all-pixels: only where colours are fitted; with --init give --n-clusters too")
    if objective == "masked" and init is not None:
        raise checks.UsageError("--init: only with --objective next_pixel")
    if objective == "masked" and classes:
        raise checks.UsageError("--classes: a model of --objective masked cannot draw, so not of a class either")


def _collectives(device: str | None) -> str:
    """What the processes talk through; the device is not checked yet, so that one of them can say what is wrong."""
    import torch

    return "cpu:gloo,cuda:nccl" if device != "cpu" and torch.cuda.is_available() else "gloo"


def _report(out: Path, summary: dict[str, Any], objective: str, classes: bool, json: bool) -> None:
    text = f"{out / 'model'}: {summary['parameters'] / 1e6:.2f} M parameters, {summary['steps']} steps"
    if summary["preparation_share"] >= 0.01:
        text += f" ({summary['preparation_share']:.0%} of the time for images and colours)"
    text += ","
    if objective == "masked":
        text += f" held out {terminal.nats(summary['heldout_masked_nats'])} nats/masked pixel"
        terminal.report(json, summary, f"{text} (histogram {terminal.nats(summary['histogram_nats'])})")
        return
    text += f" held out {terminal.nats(summary['heldout_nats'])} nats/token"
    if classes:
        text += f", {terminal.nats(summary['heldout_class_nats'])} given the class"
    terminal.report(json, summary, f"{text} (left+up lookup table {terminal.nats(summary['lookup_table_nats'])})")


def _continued(init: str, data: ImageSet, config: TrainConfig) -> tuple[Objective, TrainConfig]:
    """What a run goes on from, made to fit the data, and the run with the network's size."""
    import torch

    from igpt_fast.learning.objectives.starting import Continued, adapted, load

    model = load(init)
    own = {name: getattr(model.config, name) for name in ("n_layer", "n_embd", "n_head")}
    for name, value in own.items():
        if (given := getattr(config, name)) not in (value, getattr(TrainConfig, name)):
            option = name.replace("_", "-")
            raise checks.UsageError(f"--{option} is {given}, but the model of --init has {value}")
    if data.tokenizer.clusters is None:
        raise checks.UsageError("--init: only for images of colours; the tokens of the data are other codes")
    processor = checks.read_processor(init)
    colours, size = checks.read_palette(None, init)[0], (processor.height, processor.width)
    clusters = torch.as_tensor(data.tokenizer.clusters)
    start = adapted(model, torch.as_tensor(colours, dtype=clusters.dtype), size, data, clusters)
    return Continued(config.label_dropout, start), dataclasses.replace(config, **own)


def _tokens(data: Path | None, preparation: Preparation, classes: bool, seed: int, init: str | None = None) -> ImageSet:
    """Of a directory of shards or of images (in the colours of ``init``), of a token file, or the bundled ones.

    Of as many images as a palette is fitted to, all are read first, so that one that is damaged shows before the first
    step; of more, each when its turn comes.
    """
    from igpt_fast.files import BUNDLED
    from igpt_fast.image import load_clusters
    from igpt_fast.learning.data import load_tokens
    from igpt_fast.learning.folders import tokens_from_images
    from igpt_fast.learning.lazy import FolderData
    from igpt_fast.learning.shards import ShardData, is_shards
    from igpt_fast.learning.sources.folder import Folder
    from igpt_fast.learning.taking import SAMPLE, Taking

    if data is not None and data.is_dir() and is_shards(data):
        return ShardData(data, classes=classes)
    if data is None or not data.is_dir():
        return load_tokens(BUNDLED.parent / "emoji16.npz" if data is None else data, classes=classes)
    palette = None if preparation.clusters is None else load_clusters(preparation.clusters)
    side = preparation.side or 32
    if init is not None:
        theirs, edge = checks.read_palette(None, init)
        palette = theirs if palette is None and preparation.n_clusters is None else palette
        side = preparation.side or edge
    count = len(palette) if palette is not None else preparation.n_clusters or 512
    holdout = 0.1 if preparation.holdout is None else preparation.holdout
    skip = preparation.skip_unreadable
    source = Folder.open(data)
    if len(source) > SAMPLE and not preparation.all_pixels:
        taking = Taking(side, side, palette, count, classes=classes, holdout=holdout, seed=seed)
        return FolderData(source, taking, skip_unreadable=skip)
    how = {"skip_unreadable": skip, "classes": classes, "all_pixels": preparation.all_pixels}
    return tokens_from_images(data, side, count, holdout, seed, palette, **how)
