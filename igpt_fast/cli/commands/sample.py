"""``igpt sample`` and ``igpt complete``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, arg

from igpt_fast import processes
from igpt_fast.checks import whole_number
from igpt_fast.cli import checks
from igpt_fast.cli.checks import Paths
from igpt_fast.cli.draw import options
from igpt_fast.cli.draw.exports import Exports, file_hash
from igpt_fast.cli.draw.job import Job, load_pipeline, run
from igpt_fast.cli.draw.options import DrawOptions, Files
from igpt_fast.draws import MAX_IMAGES
from igpt_fast.world import world


def sample(
    n: Annotated[int, arg(aliases=["-n"])] = 16,
    out: Path | None = None,
    files: OmitArgPrefixes[Files] = Files(),  # noqa: B008 - a frozen value
    columns: int | None = None,
    drawing: OmitArgPrefixes[DrawOptions] = DrawOptions(),  # noqa: B008
    json: bool = False,
) -> None:
    """Draw images and write them as a grid; under torchrun, with all its processes.

    Example: igpt sample -n 16 --seed 3 --gif growing.gif --preview

    Args:
        n: Number of images.
        out: Grid to write; .png, .jpg, .webp or .bmp; samples.png if not given.
        files: What is written.
        columns: Images in a row of the grid.
        drawing: How they are drawn.
        json: Print one JSON object.
    """
    with checks.as_usage():
        whole_number("n", n, 1, MAX_IMAGES)
    classes = options.labels(drawing.label, n, drawing.model)
    names = [f"{i:05}.png" for i in range(n)] if files.singles is not None else ()
    exports = Exports.of(out, "samples.png", files, n, names=names, columns=columns)
    with world() as together:
        if together.first:
            exports.check()
            exports.check_size(checks.read_processor(drawing.model), n)
        pipeline = load_pipeline(drawing, processes.local_rank())
        with checks.as_usage():  # before anything is computed
            request = pipeline.request(n, labels=classes, **drawing.requested(together))
        values = {"model": drawing.model or "bundled"}
        run(Job("sample", request, exports, values, pipeline, together, json), drawing.preview)


def complete(
    images: Paths,
    keep: str | None = None,
    mask: Path | None = None,
    n: Annotated[int, arg(aliases=["-n"])] = 4,
    candidates: int = 1,
    fit: Literal["crop", "pad", "stretch"] = "crop",
    out: Path | None = None,
    files: OmitArgPrefixes[Files] = Files(),  # noqa: B008 - a frozen value
    labels: bool = True,
    drawing: OmitArgPrefixes[DrawOptions] = DrawOptions(),  # noqa: B008
    json: bool = False,
) -> None:
    """Complete images of which a part is kept; one row each: input, kept part, completions, original.

    Example: igpt complete photo.jpg --keep 0.5 -n 4 --out completions.png

    Args:
        images: Image files of any size, directories that are searched for them, or - for the standard input.
        keep: What is kept: a fraction of the rows, 0 or above and below 1, or a number of them like 12rows; 0.5 if
            neither this nor a mask is given.
        mask: Image file that says what is kept instead: white is kept, black is drawn; fitted like the images, and
            resized by nearest neighbour.
        n: Completions of each image.
        candidates: Draw so many for each completion, and choose one by how well it goes with what is kept below it;
            approximate, for masks.
        fit: How an image gets the model's aspect: crop, its middle is cut out; pad, white is put around it; stretch.
        out: Grid to write; .png, .jpg, .webp or .bmp; completions.png if not given.
        files: What is written.
        labels: Names over the columns of the grid: input, kept, 1 and so on, original.
        drawing: How they are drawn.
        json: Print one JSON object.
    """
    with checks.as_usage():
        whole_number("n", n, 1, MAX_IMAGES)
    paths = checks.find_pictures(images)
    classes = options.labels(drawing.label, len(paths), drawing.model)
    names = [f"{i:05}-{j:02}.png" for i in range(len(paths)) for j in range(n)] if files.singles is not None else ()
    exports = Exports.of(out, "completions.png", files, n * len(paths), names=names, labels=labels)
    with world() as together:
        if together.first:
            exports.check()
            exports.check_size(checks.read_processor(drawing.model), n * len(paths), len(paths))
        pipeline = load_pipeline(drawing, processes.local_rank())
        given = options.kept(keep, mask, pipeline.processor.height, pipeline.processor.width, fit)
        asked = drawing.requested(together)
        with checks.as_usage():  # before an image is read
            request = pipeline.request(
                n, images=paths, keep=given, candidates=candidates, labels=classes, fit=fit, **asked
            )
        values: dict[str, Any] = {"model": drawing.model or "bundled"}
        values |= {"inputs": list(map(str, paths)), "mask": mask and str(mask)}
        if together.first and files.sidecar is not None:
            values |= {"inputs_sha256": [file_hash(path) for path in paths], "mask_sha256": mask and file_hash(mask)}
        run(Job("complete", request, exports, values, pipeline, together, json), drawing.preview)
