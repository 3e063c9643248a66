"""The script that runs transformers' own tests puts our classes into them, and counts what comes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "compatibility" / "run_transformers_tests.py"
TESTS = """
import unittest
import transformers
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling, ImageGPTForImageClassification, ImageGPTModel
class ImageGPTModelTest(unittest.TestCase):
    all_model_classes = (ImageGPTForCausalImageModeling, ImageGPTForImageClassification, ImageGPTModel)
    pipeline_model_mapping = {"image-classification": ImageGPTForImageClassification}
    def test_classes(self):
        config = ImageGPTConfig(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=1)
        kinds = {cls(config).__class__ for cls in (*self.all_model_classes, *self.pipeline_model_mapping.values())}
        assert {kind.__module__.rpartition(".")[0] for kind in kinds} == {"PACKAGE"}
        assert all(isinstance(cls(config), transformers.PreTrainedModel) for cls in kinds)
    def test_wrong(self):
        assert ImageGPTConfig().n_layer == 23, "told"
    @unittest.skip("not now")
    def test_later(self):
        pass
"""


@pytest.mark.parametrize(
    ("target", "package"),
    [("ours", "igpt_fast.model"), ("bridge", "transformers.models.imagegpt")],
)
def test_the_script(target: str, package: str, tmp_path: Path) -> None:
    file = tmp_path / "tests" / "models" / "imagegpt" / "test_modeling_imagegpt.py"
    file.parent.mkdir(parents=True)
    file.write_text(TESTS.replace("PACKAGE", package))
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--target", target, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    reason = found.pop("reasons")["test_wrong"]
    assert found == {"target": target, "passed": ["test_classes"], "failed": ["test_wrong"], "skipped": ["test_later"]}
    assert "told" in reason
