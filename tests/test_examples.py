"""The examples do what they say, as far as that needs nothing that is not installed here."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from igpt_fast import Pipeline

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_space_draws_row_by_row() -> None:
    space = example("gradio_space")
    picture = Image.linear_gradient("L").convert("RGB")
    for given in (picture, None):
        steps = list(space.complete(given, 8.0, 2.0, 1.0, 3.0))
        assert len(steps) == 16
        how = {"n": 2, "seed": 3}
        pipeline = Pipeline.from_pretrained()
        want = pipeline.sample(**how) if given is None else pipeline.complete(given, keep=8, **how)
        got = [np.asarray(image.resize((16, 16), Image.Resampling.NEAREST)) for image in steps[-1]]
        np.testing.assert_array_equal(got, [np.asarray(image) for image in want.images])
        assert (np.asarray(steps[11][0])[-64:] == 224).all()  # not yet drawn
