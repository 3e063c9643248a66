"""Configuration of an iGPT: the fields, defaults and JSON of transformers' ``ImageGPTConfig``.

Standard library only, as what it takes from ``files`` is, so that ``igpt --help`` and tools that read a
``config.json`` stay light.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from igpt_fast import files

# Layers, width and heads of the published models. Source: "Generative Pretraining from Pixels"
# (Chen et al., 2020), section 4.1, and openai/image-gpt src/run.py. The paper gives no head count
# for XL; 48 keeps head_dim at 64, as in S.
PRESETS: dict[str, dict[str, int]] = {
    "s": {"n_layer": 24, "n_embd": 512, "n_head": 8},
    "m": {"n_layer": 36, "n_embd": 1024, "n_head": 8},
    "l": {"n_layer": 48, "n_embd": 1536, "n_head": 16},
    "xl": {"n_layer": 60, "n_embd": 3072, "n_head": 48},
}

_MAX_CONFIG_BYTES = 4 << 20
_FLAGS = (
    "scale_attn_weights",
    "use_cache",
    "tie_word_embeddings",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "add_cross_attention",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
)


@dataclass
class ImageGPTConfig:
    """Hyper-parameters of an iGPT; field for field those of transformers' class of the same name.

    Args:
        vocab_size: Input vocabulary: the colour clusters plus one start-of-sequence (SOS) token, which
            is the last id. The head predicts ``vocab_size - 1`` colours.
        n_positions: Length of the position table; 1024 for 32x32 images.
        n_embd, n_layer, n_head: Width, depth and attention heads; ``n_embd % n_head == 0``.
        n_inner: Width of the MLP; ``None`` means ``4 * n_embd``.
        activation_function: A key of ``igpt_fast.ops.ACTIVATIONS``.
        resid_pdrop, embd_pdrop, attn_pdrop: Dropout probabilities.
        layer_norm_epsilon: Added to the mean square in every norm.
        initializer_range: Standard deviation of the initial weights.
        scale_attn_weights: Divide the scores by ``sqrt(head_dim)``.
        scale_attn_by_inverse_layer_idx: Divide them by ``layer_idx + 1`` as well.
        reorder_and_upcast_attn: Compute the scores in fp32.
        use_cache: Whether ``forward`` returns its keys and values unless told otherwise.
        num_labels, problem_type: For classification; see ``ImageGPTForImageClassification``.
        extra: Every other entry of a ``config.json`` (``architectures``, ``transformers_version``, ...),
            kept so that writing the file back loses nothing. Unknown keywords land here too when the
            configuration comes from a file; the constructor itself refuses them.

    Raises:
        ValueError: A field is out of its range.

    Source: transformers ``ImageGPTConfig``.
    """

    vocab_size: int = 512 + 1
    n_positions: int = 32 * 32
    n_embd: int = 512
    n_layer: int = 24
    n_head: int = 8
    n_inner: int | None = None
    activation_function: str = "quick_gelu"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    add_cross_attention: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    num_labels: int = 2
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    model_type: ClassVar[str] = "imagegpt"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "num_labels"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 24:
                raise ValueError(f"ImageGPTConfig: {name} must be a positive integer, got {value!r}")
        if self.n_inner is not None and (not isinstance(self.n_inner, int) or not 1 <= self.n_inner <= 1 << 24):
            raise ValueError(f"ImageGPTConfig: n_inner must be a positive integer or None, got {self.n_inner!r}")
        if self.vocab_size < 2:
            raise ValueError("ImageGPTConfig: vocab_size must be at least 2 (one colour and the SOS token)")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"ImageGPTConfig: n_embd must be divisible by n_head, got n_embd={self.n_embd} n_head={self.n_head}"
            )
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if not 0.0 <= _number(name, getattr(self, name)) <= 1.0:
                raise ValueError(f"ImageGPTConfig: {name} must lie in [0, 1], got {getattr(self, name)!r}")
        for name in ("layer_norm_epsilon", "initializer_range"):
            if _number(name, getattr(self, name)) < 0:
                raise ValueError(f"ImageGPTConfig: {name} must not be negative, got {getattr(self, name)!r}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"ImageGPTConfig: {name} must be true or false, got {getattr(self, name)!r}")
        if not isinstance(self.activation_function, str):
            raise ValueError(f"ImageGPTConfig: activation_function must be a name, got {self.activation_function!r}")
        if self.problem_type not in (
            None,
            "regression",
            "single_label_classification",
            "multi_label_classification",
        ):
            raise ValueError(f"ImageGPTConfig: unknown problem_type {self.problem_type!r}")
        if self.tie_word_embeddings:
            raise ValueError(
                "ImageGPTConfig: tie_word_embeddings=True is not supported: wte has one row more than the head"
            )
        if self.add_cross_attention:
            raise ValueError("ImageGPTConfig: add_cross_attention=True is not supported")
        if self.id2label is not None:
            self.id2label = {int(key): str(value) for key, value in self.id2label.items()}
            self.num_labels = len(self.id2label)

    @property
    def head_dim(self) -> int:
        """``n_embd / n_head``."""
        return self.n_embd // self.n_head

    @property
    def sos_token_id(self) -> int:
        """Id of the start-of-sequence token: the last row of ``wte``."""
        return self.vocab_size - 1

    def __getattr__(self, name: str) -> Any:
        if name in type(self).attribute_map:
            return getattr(self, type(self).attribute_map[name])
        extra = self.__dict__.get("extra", {})
        if name in extra:
            return extra[name]
        raise AttributeError(f"ImageGPTConfig has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(type(self).attribute_map.get(name, name), value)
        labels = self.__dict__.get("id2label")
        if name == "num_labels" and isinstance(labels, dict) and len(labels) != value:
            self.id2label = self.label2id = None  # as in transformers: the names no longer fit
        elif name == "id2label" and isinstance(value, dict) and "num_labels" in self.__dict__:
            self.num_labels = len(value)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ImageGPTConfig:
        """The configuration of a published size: ``"s"``, ``"m"``, ``"l"`` or ``"xl"``.

        Raises:
            ValueError: ``name`` is not one of them.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, data: dict[str, Any], **overrides: Any) -> ImageGPTConfig:
        """Builds a configuration from the content of a ``config.json``; unknown entries go to ``extra``."""
        if data.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(f"model_type is {data['model_type']!r}, expected {cls.model_type!r}")
        data = dict(data)
        if "torch_dtype" in data:  # the entry's name before transformers 5
            older = data.pop("torch_dtype")
            data.setdefault("dtype", older)
        if "id2label" in overrides or overrides.get("num_labels") not in (None, len(data.get("id2label") or ())):
            data.pop("id2label", None)
            data.pop("label2id", None)
        names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        known: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        for key, value in {**data, **overrides}.items():
            key = cls.attribute_map.get(key, key)
            (known if key in names else extra)[key] = value
        extra.pop("model_type", None)
        return cls(**known, extra=extra)

    @classmethod
    def from_json_file(cls, path: str | Path, **overrides: Any) -> ImageGPTConfig:
        """Reads a ``config.json``; ``overrides`` are fields that replace its own.

        Raises:
            ValueError: Not JSON, not an object, for another model, or a field out of range; the message
                names the file.
        """
        path = Path(path)
        data = files.read_json(path, _MAX_CONFIG_BYTES)
        try:
            return cls.from_dict(data, **overrides)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: not a usable ImageGPT configuration: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values, in the form transformers reads."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        if self.id2label is None:
            # transformers derives num_labels from id2label and writes no num_labels of its own.
            data["id2label"] = {i: f"LABEL_{i}" for i in range(self.num_labels)}
        if self.label2id is None:
            data["label2id"] = {label: i for i, label in data["id2label"].items()}
        data.pop("num_labels")
        return {**self.extra, **data, "model_type": self.model_type}

    def to_json_string(self) -> str:
        """``to_dict`` as indented JSON with sorted keys and a final newline."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"ImageGPTConfig: {name} must be a finite number, got {value!r}")
    return float(value)
