"""Our classes become subclasses of transformers' ones when it is loaded, before or after our instances are made."""

import subprocess
import sys
import types
import warnings

import pytest
import torch

from igpt_fast import hf, kin


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("transformers.of_a_test")
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_a_class_gets_its_kin_once_it_is_there(other: types.ModuleType) -> None:
    @kin.stands_for("transformers.of_a_test", "Theirs")
    class Ours(kin.Root):
        shared = "ours"

    instance = Ours()
    kin.meet()
    assert Ours.__bases__ == (kin.Root,)

    class Theirs:
        shared = "theirs"
        more = "theirs"

    other.Theirs = Theirs  # type: ignore[attr-defined]
    kin.meet()
    kin.meet()
    assert Ours.__bases__ == (kin.Root, Theirs)
    assert isinstance(instance, Theirs)
    assert (instance.shared, instance.more) == ("ours", "theirs")


def test_a_base_that_they_share_gives_way(other: types.ModuleType) -> None:
    class Module(kin.Root):
        pass

    class Theirs(Module):
        pass

    @kin.stands_for("transformers.of_a_test", "Theirs")
    class Ours(Module):
        pass

    other.Theirs = Theirs  # type: ignore[attr-defined]
    kin.meet()
    assert Ours.__bases__ == (Theirs,)


def test_a_class_of_another_layout_is_left_as_it_is(other: types.ModuleType) -> None:
    class Theirs:
        __slots__ = ("more", "most")

    @kin.stands_for("transformers.of_a_test", "Theirs")
    class Ours(kin.Root, dict):  # type: ignore[type-arg]
        pass

    other.Theirs = Theirs  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match=r"igpt_fast: Ours is no transformers\.of_a_test\.Theirs: "):
        kin.meet()
    assert not issubclass(Ours, Theirs)


def test_an_older_transformers_is_no_kin_and_told(other: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kin, "_waiting", [])
    sys.modules["transformers"].__version__ = "4.57.3"  # type: ignore[attr-defined]
    other.Theirs = type("Theirs", (), {})  # type: ignore[attr-defined]

    @kin.stands_for("transformers.of_a_test", "Theirs")
    class Ours(kin.Root):
        pass

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kin.meet()
    assert Ours.__bases__ == (kin.Root,)
    assert not kin._waiting  # no lock is taken any more
    with pytest.raises(ImportError, match=r"^somebody needs transformers>=5\.0, found 4\.57\.3$"):
        kin.library("transformers", "somebody")
    with pytest.raises(ImportError, match=r"^igpt_fast\.hf\.accelerate needs transformers>=5\.0, found 4\.57\.3$"):
        hf.accelerate(torch.nn.Identity())
    sys.modules["transformers"].__version__ = "10.0.0.dev0"  # type: ignore[attr-defined]
    assert kin.library("transformers", "somebody") is sys.modules["transformers"]


def test_what_transformers_finds_in_a_model_that_is_older() -> None:
    """Nothing loads transformers here; a model made before it is one of its models after, and as fast."""
    code = """
import sys
import torch
import igpt_fast
from igpt_fast.engines.cpu.forward import why_not
config = igpt_fast.ImageGPTConfig(vocab_size=17, n_positions=80, n_embd=64, n_layer=2, n_head=1)
model = igpt_fast.ImageGPTForCausalImageModeling(config).eval().bfloat16().requires_grad_(False)
tokens = torch.zeros(1, 40, dtype=torch.long)
before, reason = model(tokens).logits, why_not(model.transformer, tokens)
model.generate(max_length=3)
list(model.modules())
assert "transformers" not in sys.modules
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from transformers.utils import ModelOutput
assert not isinstance(model, PreTrainedModel)
modules = list(model.modules())
kinds = (PreTrainedModel, GenerationMixin), (GradientCheckpointingLayer,), (Conv1D,)
found = model, model.transformer.h[0], model.transformer.h[0].mlp.c_fc
assert all(isinstance(one, kind) for one, each in zip(found, kinds) for kind in each)
assert isinstance(config, PreTrainedConfig) and isinstance(model(tokens), ModelOutput)
assert torch.equal(model(tokens).logits, before)
assert why_not(model.transformer, tokens) == reason
assert (config.num_labels, config.hidden_size, config.dtype, config.output_attentions) == (2, 64, None, False)
assert model.generation_config.max_length is None and model.config.get_text_config() is config
assert type(model)(config).config is config
assert model.transformer._no_split_modules == ["ImageGPTBlock"] and model.device.type == "cpu"
class Mine(igpt_fast.ImageGPTForCausalImageModeling):
    def __init__(self, config):
        super().__init__(config)
        self.extra = torch.nn.Linear(64, 3)
        self.post_init()
assert Mine(config)(tokens).logits.shape == (1, 40, 16)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
