"""The image processor among transformers': a kind of its own, with its methods, its keywords and what they mean."""

import copy
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.image_processing_utils import BaseImageProcessor, ImageProcessingMixin

from igpt_fast import ImageGPTImageProcessor

CLUSTERS = np.random.default_rng(0).uniform(-1, 1, (16, 3)).astype(np.float32)
IMAGE = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def processor(**settings: Any) -> ImageGPTImageProcessor:
    return ImageGPTImageProcessor(**{"clusters": CLUSTERS, "size": 4, **settings})


def test_older_instances_become_image_processors_too() -> None:
    code = """
import sys
import numpy as np
from igpt_fast import ImageGPTImageProcessor
older = ImageGPTImageProcessor(size=4, do_color_quantize=False)
features = older(np.zeros((5, 5, 3), np.uint8))
assert "transformers" not in sys.modules
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
ImageGPTImageProcessor()
assert isinstance(older, BaseImageProcessor) and isinstance(features, BatchFeature)
assert older(np.zeros((5, 5, 3), np.uint8)).keys() == features.keys() == {"pixel_values"}
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_what_it_returns_is_transformers_batch_feature() -> None:
    features = processor()(IMAGE)
    assert isinstance(processor(), BaseImageProcessor | ImageProcessingMixin)
    assert isinstance(features, transformers.BatchFeature)
    assert isinstance(features, dict)
    assert features.data["input_ids"] is features.input_ids is features["input_ids"]
    assert not hasattr(features, "labels")
    assert torch.is_tensor(features.convert_to_tensors("pt").input_ids)  # type: ignore[operator]
    assert features.to("meta").input_ids.device.type == "meta"


def test_features_can_be_copied_and_sent() -> None:
    features = processor()(IMAGE, return_tensors="pt")
    sent = pickle.loads(pickle.dumps(features))
    for other in (sent, copy.deepcopy(features), copy.copy(features), features.copy(), type(features)(data=features)):
        assert type(other) is type(features)
        assert other is not features
        assert (set(other), vars(other)) == ({"input_ids"}, {})
        assert torch.equal(other.to("cpu").input_ids, features.input_ids)
    assert torch.is_tensor(type(features)({"a": [1, 2]}, tensor_type="pt").a)


def test_a_lazy_import_of_the_class_is_noticed() -> None:
    code = """
import numpy as np
import transformers
from igpt_fast import ImageGPTImageProcessor
ours = ImageGPTImageProcessor(size=4, do_color_quantize=False)
from transformers import BatchFeature, BaseImageProcessor
assert isinstance(ours(np.zeros((5, 5, 3), np.uint8)), BatchFeature) and isinstance(ours, BaseImageProcessor)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_json_files_go_both_ways(tmp_path: Path) -> None:
    ours, path = processor(do_center_crop=True, crop_size=3), tmp_path / "p.json"
    ours.to_json_file(path)
    assert path.read_text() == ours.to_json_string()
    assert ImageGPTImageProcessor.from_json_file(path).to_dict() == ours.to_dict()
    path.write_text('{"size": -1}')
    with pytest.raises(ValueError, match=re.escape(f"{path}: not a usable processor")):
        ImageGPTImageProcessor.from_json_file(path)


def test_keywords_of_transformers(tmp_path: Path) -> None:
    processor().save_pretrained(save_directory=tmp_path, push_to_hub=False)
    options: dict[str, Any] = {"use_fast": True, "force_download": False, "trust_remote_code": True, "proxies": None}
    loaded = ImageGPTImageProcessor.from_pretrained(pretrained_model_name_or_path=tmp_path, size=5, **options)
    assert loaded.size == {"height": 5, "width": 5}
    assert ImageGPTImageProcessor.from_dict(image_processor_dict={"size": 3}).height == 3
    with pytest.raises(ValueError, match=r"force_download=True is not offered: .*snapshot_download"):
        ImageGPTImageProcessor.from_pretrained(tmp_path, force_download=True)
    with pytest.raises(ValueError, match=r"push_to_hub=True is not offered: .*upload_folder"):
        processor().save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(TypeError, match="unexpected keyword argument: overwrite"):
        processor().save_pretrained(tmp_path, overwrite=True)
    with pytest.raises(TypeError, match="'sise'"):
        ImageGPTImageProcessor.from_pretrained(tmp_path, sise=5)


def test_unused_keywords_come_back(tmp_path: Path) -> None:
    processor().save_pretrained(tmp_path)
    for made in (
        ImageGPTImageProcessor.from_pretrained(tmp_path, size=5, foo=1, return_unused_kwargs=True),
        ImageGPTImageProcessor.from_dict(processor().to_dict(), size=5, foo=1, return_unused_kwargs=True),
    ):
        assert (made[0].height, made[1]) == (5, {"foo": 1})


@pytest.mark.parametrize("name", ["do_resize", "do_rescale", "do_normalize"])
def test_none_switches_a_step_off_as_in_transformers(tmp_path: Path, name: str) -> None:
    settings = {"clusters": CLUSTERS, "size": {"height": 20, "width": 30}, "do_color_quantize": False, name: None}
    theirs = transformers.ImageGPTImageProcessor(**settings)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())[name] is None
    for ours in (ImageGPTImageProcessor(**settings), ImageGPTImageProcessor.from_pretrained(tmp_path)):
        assert getattr(ours, name) is None is ours.to_dict()[name]
        np.testing.assert_array_equal(ours(IMAGE).pixel_values, np.array(theirs(IMAGE).pixel_values))
    assert getattr(ImageGPTImageProcessor, name) is True is getattr(ImageGPTImageProcessor(), name)


@pytest.mark.parametrize("url", ["http://example.org/a.png", "HTTPS://example.org/a.png", "data:image/png;base64,AA"])
def test_urls_are_not_downloaded(url: str) -> None:
    with pytest.raises(ValueError, match=r"URL.*download it first"):
        processor()([IMAGE, url])


def test_push_to_hub_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import hub

    class Repository:
        repo_id = "me/mine"
        create_repo = lambda self, *_, **__: self  # noqa: E731
        save = lambda self, path: Path(path).write_text("card")  # noqa: E731

    sent: dict[str, str] = {}

    def upload(self: Any, folder: str, repo_id: str, **_: Any) -> str:
        sent.update({path.name: path.read_text() for path in Path(folder).iterdir()})
        return repo_id

    monkeypatch.setattr(hub, "hf_api", Repository)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: Repository())
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    assert processor().push_to_hub("mine") == "me/mine"
    assert sent == {"preprocessor_config.json": processor().to_json_string(), "README.md": "card"}
