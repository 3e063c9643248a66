"""Configuration of an iGPT: the fields, defaults and JSON of transformers' ``ImageGPTConfig``.

Standard library only, as what it takes from ``files`` is, so that ``igpt --help`` and tools that read a
``config.json`` stay light.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from igpt_fast import files, keywords, kin
from igpt_fast.checks import finite_number, plain_dtype, whole_number
from igpt_fast.files import listed, shown

# Layers, width and heads of the published models. Source: "Generative Pretraining from Pixels"
# (Chen et al., 2020), section 4.1, and openai/image-gpt src/run.py. The paper gives no head count
# for XL; 48 keeps head_dim at 64, as in S.
PRESETS: dict[str, dict[str, int]] = {
    "s": {"n_layer": 24, "n_embd": 512, "n_head": 8},
    "m": {"n_layer": 36, "n_embd": 1024, "n_head": 8},
    "l": {"n_layer": 48, "n_embd": 1536, "n_head": 16},
    "xl": {"n_layer": 60, "n_embd": 3072, "n_head": 48},
}

_FILE_NAME = "config.json"
_MAX_CONFIG_BYTES = 4 << 20
_MAX_SIZE = 1 << 24  # of every size and number of tokens
# What every configuration of transformers has, of no use to the network; read as attributes, these are there
# even where the file had none.
_COMMON: dict[str, Any] = {"_name_or_path": "", "chunk_size_feed_forward": 0, "is_encoder_decoder": False}
_COMMON |= {"architectures": None, "dtype": None, "transformers_version": None}
_PROBLEMS = (None, "regression", "single_label_classification", "multi_label_classification")
# How transformers would compute attention and experts: neither is a choice here, so there is one value of each.
IMPLEMENTATIONS = {"attn_implementation": "eager", "experts_implementation": "eager"}
_NO_CHOICE = "the fastest kernel that covers the input is taken by itself; see igpt_fast.show_config()"

C = TypeVar("C")


def _with_keywords_of_transformers(cls: type[C]) -> type[C]:
    """Has the constructor take what transformers' takes: other names of fields, and entries for ``extra``."""
    init: Any = cls.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **given: Any) -> None:
        kin.meet()
        extra = given.pop("extra", None) or {}
        for name, only in IMPLEMENTATIONS.items():
            value = given.pop(name, None)
            if value not in (None, only):
                raise ValueError(f"{cls.__name__}: {name} can be {only!r} alone, got {shown(value)}: {_NO_CHOICE}")
        known, others = _split(given)
        number, names = known.get("num_labels"), known.get("id2label")
        if number is not None and isinstance(names, Mapping) and len(names) != number:
            what = f"num_labels={number} gives way to the {len(names)} of id2label"
            warnings.warn(f"{cls.__name__}: {what}", stacklevel=2)
        init(self, *args, **known, extra={**extra, **others})

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


@kin.stands_for("transformers.configuration_utils", "PreTrainedConfig")
@_with_keywords_of_transformers
@dataclass
class ImageGPTConfig(kin.Root):
    """Hyper-parameters of an iGPT; field for field those of transformers' class of the same name.

    The constructor also takes the other names of ``attribute_map`` (``hidden_size`` for ``n_embd``; given both,
    this one counts, as in transformers) and what every configuration of transformers has, which goes to ``extra``:
    ``ImageGPTConfig(**theirs.to_dict())`` works.

    Args:
        vocab_size: Input vocabulary: the colour clusters, the class tokens, and one start-of-sequence (SOS)
            token, which is the last id. The head has ``vocab_size - 1`` outputs, of which the first ``n_colours``
            are colours.
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
        id2label, label2id: Names of the classes, ``LABEL_0`` and so on by default. They count, not
            ``num_labels``, where the two differ; setting ``num_labels`` anew brings the default names back.
        n_classes: Classes that the model draws images of on demand; not a field of transformers, and in
            ``config.json`` only if it is not 0. Class ``c`` has the token ``n_colours + c``, which stands in place
            of SOS in front of its images; SOS in front means an image of any class.
        bidirectional: Whether every position attends to all others, as in OpenAI's BERT models, and not to those before
            it alone; not a field of transformers, which ignores it, and in ``config.json`` only if it is true. Such a
            model predicts what stands where SOS does, which is its mask; it cannot draw.
        classify_with_sos: Whether ``ImageGPTForImageClassification`` was tuned on SOS in front of an image, and so puts
            it there by itself; not a field of transformers, which ignores it, and in ``config.json`` only if true.
        extra: Every other entry of a ``config.json`` (``architectures``, ``dtype`` as a name, ...), kept so
            that writing the file back loses nothing, and readable as attributes; unknown keywords as well, as in
            transformers. Names with a leading underscore are no entries but attributes, which no file has.

    The model's modules take their settings when they are made, as in transformers: a change afterwards is one of the
    next model's, except of ``use_cache``, ``return_dict``, ``output_*`` and ``problem_type``.

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
    # An instance stores num_labels or id2label, never both, and label2id if it was asked for; __getattr__ makes
    # the rest, so that a file with an absurd num_labels costs nothing. Factories: a plain default would be an
    # attribute of the class, which __getattr__ never sees.
    num_labels: int = field(default_factory=lambda: 2)
    id2label: dict[int, str] | None = field(default_factory=lambda: None)
    label2id: dict[str, int] | None = field(default_factory=lambda: None)
    problem_type: str | None = None
    n_classes: int = 0
    bidirectional: bool = False
    classify_with_sos: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    model_type: ClassVar[str] = "imagegpt"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    sub_configs: ClassVar[dict[str, Any]] = {}
    base_model_tp_plan: ClassVar[None] = None
    base_model_pp_plan: ClassVar[None] = None
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {"wte": "free_full_weight", "h.*": "free_full_weight"}
    # What transformers' methods keep on an instance.
    _attn_implementation_internal: ClassVar[str | None] = "eager"
    _experts_implementation_internal: ClassVar[str | None] = None
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    def __post_init__(self) -> None:
        whole_number("ImageGPTConfig: num_labels", self.num_labels, 1, _MAX_SIZE)
        for name in ("n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            if name != "n_inner" or self.n_inner is not None:
                self._set_whole(name, 1, _MAX_SIZE)
        self._set_whole("vocab_size", 2, _MAX_SIZE)  # one colour and the SOS token, which classes leave
        self._set_whole("n_classes", 0, self.vocab_size - 2)
        tokens = -_MAX_SIZE, _MAX_SIZE  # negative ones stand for none in some files
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            ids = getattr(self, name)
            if isinstance(ids, list | tuple) and name == "eos_token_id":
                self.eos_token_id = [whole_number(f"ImageGPTConfig: {name}", value, *tokens) for value in ids]
            elif ids is not None:
                self._set_whole(name, *tokens)
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            setattr(self, name, finite_number(f"ImageGPTConfig: {name}", getattr(self, name), 0, 1))
        for name in ("layer_norm_epsilon", "initializer_range"):
            setattr(self, name, finite_number(f"ImageGPTConfig: {name}", getattr(self, name), 0))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"ImageGPTConfig: {name} must be true or false, got {shown(getattr(self, name))}")
        width, heads, activation = self.n_embd, self.n_head, self.activation_function
        for wrong, message in (
            (width % heads, f"n_embd must be divisible by n_head, got n_embd={width} n_head={heads}"),
            (not isinstance(activation, str), f"activation_function must be a name, got {shown(activation)}"),
            (self.problem_type not in _PROBLEMS, f"unknown problem_type {shown(self.problem_type)}"),
            (self.tie_word_embeddings, "tie_word_embeddings=True is not supported: wte has one row more than the head"),
        ):
            if wrong:
                raise ValueError(f"ImageGPTConfig: {message}")
        if "id2label" not in self.__dict__:
            self.label2id = None  # as in transformers: names in this direction alone do not count

    def _set_whole(self, name: str, least: int, most: int) -> None:
        setattr(self, name, whole_number(f"ImageGPTConfig: {name}", getattr(self, name), least, most))

    @property
    def use_return_dict(self) -> bool:
        """Older name of ``return_dict``."""
        return self.return_dict

    @property
    def head_dim(self) -> int:
        """``n_embd / n_head``."""
        return self.n_embd // self.n_head

    @property
    def inner(self) -> int:
        """Width of the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def sos_token_id(self) -> int:
        """Id of the start-of-sequence token: the last row of ``wte``."""
        return self.vocab_size - 1

    @property
    def n_colours(self) -> int:
        """Number of colours: tokens ``0 .. n_colours - 1``, and the outputs of the head that can be drawn."""
        return self.vocab_size - 1 - self.n_classes

    def check_causal(self, caller: str) -> None:
        """Raises ValueError, which begins with ``caller``, where a position attends to those that follow it."""
        if self.bidirectional:
            raise ValueError(
                f"{caller}: the model's attention is bidirectional (a BERT): it predicts masked pixels from all others,"
                " and does not draw one after another"
            )

    __getattribute__ = object.__getattribute__  # transformers' has a Python function for every attribute

    def __getattr__(self, name: str) -> Any:
        """What ``__dict__`` lacks: other names of fields, labels (see there), and the entries of ``extra``."""
        own = self.__dict__
        if name in _ALIASES:
            return getattr(self, _ALIASES[name])
        if name == "num_labels" and "id2label" in own:
            return len(own["id2label"])
        if name == "id2label" and "num_labels" in own:
            self.id2label = {i: f"LABEL_{i}" for i in range(own["num_labels"])}
            return own["id2label"]
        if name == "label2id" and own:
            return own.setdefault("label2id", {label: i for i, label in (self.id2label or {}).items()})
        for entries in (own.get("extra", {}), _COMMON):
            if name in entries:
                return entries[name]
        raise AttributeError(f"ImageGPTConfig has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        name, own = _ALIASES.get(name, name), self.__dict__
        if name == "model_type":
            _check_model_type(value)
        elif name == "num_labels":
            if "id2label" not in own or len(own["id2label"]) != value:
                own.pop("id2label", None)  # as in transformers: the names no longer fit
                own.pop("label2id", None)
                own["num_labels"] = value
        elif name in ("id2label", "label2id"):
            self._set_names(name, value)
        elif name in _FIELDS or name == "extra" or (name not in _COMMON and hasattr(type(self), name)):
            object.__setattr__(self, name, value)
        elif name.startswith("_") and name not in _COMMON:
            own[name] = value
        else:
            self.extra[name] = plain_dtype(value) if name == "dtype" else value

    def __delattr__(self, name: str) -> None:
        if name in self.extra:
            del self.extra[name]
        else:
            object.__delattr__(self, name)

    def __iter__(self) -> Iterator[str]:
        """Names of the settings, as ``in`` asks for them."""
        yield from self.to_dict()

    def __contains__(self, name: object) -> bool:
        return name in _FIELDS or name in self.extra

    def _set_names(self, name: str, value: Any) -> None:
        own = self.__dict__
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"ImageGPTConfig: {name} must map integers and names, got {shown(value)}")
        if name == "label2id":
            own["label2id"] = dict(value or {})
        elif value is not None:
            texts = [int(key) if isinstance(key, str) else key for key in value]
            numbers = [whole_number("ImageGPTConfig: a key of id2label", key, 0, _MAX_SIZE) for key in texts]
            own["id2label"] = dict(zip(numbers, map(str, value.values()), strict=True))
            own.pop("num_labels", None)
        else:
            own["num_labels"] = self.num_labels
            own.pop("id2label", None)
        if name == "id2label" or value is None:
            own.pop("label2id", None)  # made anew from id2label

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
    def from_dict(cls, data: dict[str, Any], *, return_unused_kwargs: bool = False, **overrides: Any) -> Any:
        """Builds a configuration from the content of a ``config.json``; unknown entries go to ``extra``.

        Args:
            data: The content.
            return_unused_kwargs: Return a pair: the configuration, and those of ``overrides`` that no configuration
                has, which are left out of it.
            overrides: Entries that replace those of ``data``.
        """
        unused = {}
        if return_unused_kwargs:
            entries = {*_FIELDS, *_ALIASES, *_COMMON, *IMPLEMENTATIONS, *data, "model_type"}
            unused = {name: overrides.pop(name) for name in overrides.keys() - entries}
            unused |= {name: overrides[name] for name in ("dtype", "torch_dtype") if name in overrides}
            config = cls.from_dict(data, **{name: value for name, value in overrides.items() if value != "auto"})
            return config, unused
        chosen = {name: overrides.pop(name) for name in IMPLEMENTATIONS if name in overrides}
        given, given_extra = _split(overrides)
        known, extra = _split({name: value for name, value in data.items() if name not in IMPLEMENTATIONS})
        names, number = known.get("id2label"), given.get("num_labels")
        if "id2label" in given or number not in (None, len(names or ())):
            for name in ("num_labels", "id2label", "label2id"):
                known.pop(name, None)
        return cls(**{**known, **given, **chosen}, extra={**extra, **given_extra})

    @classmethod
    def of(cls, config: Any, caller: str) -> ImageGPTConfig:
        """``config`` itself; or what it says, where it is transformers' class of the same name.

        Raises:
            TypeError: It is neither; the message starts with ``caller``.
            ValueError: A field is out of its range.
        """
        if isinstance(config, cls):
            return config
        kind = type(config)
        if getattr(config, "model_type", None) == cls.model_type and callable(getattr(kind, "to_dict", None)):
            return cls.from_dict(config.to_dict())
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        raise TypeError(f"{caller}: config must be an ImageGPTConfig, got {name}")

    @classmethod
    @keywords.also_called(name_or_path="pretrained_model_name_or_path")
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        subfolder: str = "",
        return_unused_kwargs: bool = False,
        **overrides: Any,
    ) -> Any:
        """Reads the ``config.json`` of a folder, or of a repository of the hub.

        Args:
            name_or_path: A folder, or a hub name such as ``"openai/imagegpt-small"``.
            revision, cache_dir, local_files_only, token, subfolder: As in
                ``huggingface_hub.hf_hub_download``.
            return_unused_kwargs: See ``from_dict``.
            overrides: Keywords of the constructor, which replace the file's entries; and what transformers'
                ``from_pretrained`` takes, where it asks for nothing (``trust_remote_code=False``).

        Raises:
            FileNotFoundError: No such folder, repository or file, or no network.
            TypeError: A keyword that is no entry of a configuration.
            ValueError: As for ``from_json_file``.
        """
        overrides = keywords.without_neutral("from_pretrained", overrides)
        where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
        path = files.find_file(name_or_path, _FILE_NAME, **where, token=token, subfolder=subfolder)
        assert path is not None
        allowed = _COMMON.keys() | IMPLEMENTATIONS.keys()
        found = _split(files.read_json(path, _MAX_CONFIG_BYTES))[1] if not return_unused_kwargs and overrides else {}
        if not return_unused_kwargs and (unknown := _split(overrides)[1].keys() - allowed - found.keys()):
            raise TypeError(f"from_pretrained() got an unexpected keyword argument: {listed(unknown)}")
        return cls.from_json_file(path, return_unused_kwargs=return_unused_kwargs, **overrides)

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str], **overrides: Any) -> Any:
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
            raise ValueError(f"{path}: not a usable ImageGPT configuration: {files.first_line(error)}") from error

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values, in the form transformers reads: no ``num_labels`` beside the names.

        And none of ``n_classes``, ``bidirectional`` and ``classify_with_sos`` that is 0 or false: what transformers'
        own files hold.
        """
        own = ("n_classes", "bidirectional", "classify_with_sos")
        absent = {"num_labels"} | {name for name in own if not getattr(self, name)}
        data = {name: getattr(self, name) for name in _FIELDS if name not in absent}
        return copy.deepcopy({**self.extra, **data, "model_type": self.model_type})

    def update(self, values: Mapping[str, Any]) -> None:
        """Sets attributes, all or, where that raises, none.

        Raises:
            ValueError: A field would be out of its range.
        """
        twin = copy.deepcopy(self)
        for name, value in values.items():
            setattr(twin, name, value)
        twin.__post_init__()
        self.__dict__ = twin.__dict__

    def to_diff_dict(self) -> dict[str, Any]:
        """Those of ``to_dict`` that are not the defaults."""
        defaults = type(self)().to_dict()
        data = {name: value for name, value in self.to_dict().items() if defaults.get(name, self) != value}
        return {**data, "model_type": self.model_type}

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> ImageGPTConfig:
        """Itself: there is no configuration within this one."""
        return self

    def to_json_string(self, use_diff: bool = True) -> str:
        """``to_dict`` as indented JSON with sorted keys and a final newline; ``use_diff`` is for transformers' sake."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @keywords.also_called(path="json_file_path")
    def to_json_file(self, path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Writes ``to_json_string``; the file is whole before it gets its name.

        Raises:
            OSError: It cannot be written.
        """
        with files.replacing(path) as partial:
            partial.write_text(self.to_json_string(), encoding="utf-8")

    @keywords.also_called(directory="save_directory")
    def save_pretrained(self, directory: str | os.PathLike[str], **neutral: Any) -> None:
        """Writes ``config.json`` to a folder, which is made if it does not exist.

        ``neutral`` is what transformers takes, where it asks for nothing (``push_to_hub=False``).

        Raises:
            OSError: The folder or the file cannot be written.
        """
        keywords.refuse("save_pretrained", keywords.without_neutral("save_pretrained", neutral))
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / _FILE_NAME)


_FIELDS = tuple(f.name for f in dataclasses.fields(ImageGPTConfig) if f.name != "extra")
_FLAGS = tuple(f.name for f in dataclasses.fields(ImageGPTConfig) if f.type == "bool")
_ALIASES = {**ImageGPTConfig.attribute_map, "torch_dtype": "dtype", "name_or_path": "_name_or_path"}
for _name in ("num_labels", "id2label", "label2id", "torch_dtype", "name_or_path", *_COMMON):
    setattr(ImageGPTConfig, _name, kin.Own(_name))


def _split(entries: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields and other entries, under their own names; ``model_type`` is checked and dropped."""
    entries = dict(entries)
    _check_model_type(entries.pop("model_type", ImageGPTConfig.model_type))
    older = entries.pop("torch_dtype", None)  # the entry's name before transformers 5
    if older is not None and entries.get("dtype") is None:
        entries["dtype"] = older
    known: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for key in sorted(entries, key=_ALIASES.__contains__):  # other names last, so that they count
        name = _ALIASES.get(key, key)
        (known if name in _FIELDS else extra)[name] = entries[key]
    if "dtype" in extra:
        extra["dtype"] = plain_dtype(extra["dtype"])
    return known, extra


def _check_model_type(value: Any) -> None:
    if value != ImageGPTConfig.model_type:
        raise ValueError(f"model_type is {shown(value)}, expected {ImageGPTConfig.model_type!r}")
