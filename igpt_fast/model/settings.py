"""What ``generate`` is asked for, by its arguments and by ``generation_config``, and what of that asks for nothing."""

from __future__ import annotations

import inspect
import json
import sys
from typing import Any

from igpt_fast import keywords, kin

# Of a generation_config, about itself.
_ABOUT = {"transformers_version", "_from_model_config", "_commit_hash", "_original_object_hash"}
_ASKING = keywords.SETTINGS.keys() - _ABOUT
_LENGTHS = {"max_length", "max_new_tokens"}
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")  # of a configuration
# Tokens that stand for nothing in an image, and how transformers would compile: of no effect here.
_WITHOUT_EFFECT = {"pad_token_id", "bos_token_id", "length_penalty", "disable_compile", "use_model_defaults"}
# Settings of transformers at which they ask for nothing, as ``None``, ``False`` and what is empty do for all.
_NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "typical_p": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "diversity_penalty": 0.0,
    "cache_implementation": "dynamic",
}


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether a setting of transformers' ``generate`` is as if it had not been given."""
    if value is None or value is False or name in _WITHOUT_EFFECT:
        return True
    if name == "eos_token_id" and isinstance(value, int | list | tuple):  # negative: of no token
        return all(one < 0 for one in ([value] if isinstance(value, int) else value))
    if isinstance(value, list | tuple | dict):
        return not value
    return isinstance(value, int | float | str) and value == _NEUTRAL.get(name)


class GenerationSettings(kin.Root):
    """``generation_config``, transformers' object, made when it is asked for."""

    config: Any
    # A generation_config.json that from_pretrained has read.
    _generation_file: dict[str, Any] | None = None

    @property
    def generation_config(self) -> Any:
        """transformers' ``GenerationConfig``; what is set in it are the defaults of ``generate``."""
        if "_generation_config" not in self.__dict__:
            made = _made()
            if self._generation_file is not None:  # no entry of it hides a method
                file = {name: value for name, value in self._generation_file.items() if not hasattr(made, name)}
                self.__dict__["_generation_config"] = made.from_dict(file)
            else:
                found = made.from_model_config({name: getattr(self.config, name) for name in _IDS})
                for name, value in self._no_classes().items():
                    setattr(found, name, value)
                self.__dict__ |= {"_generation_config": found, "_generation_made": found.to_dict()}
        return self.__dict__["_generation_config"]

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.__dict__.pop("_generation_made", None)
        self.__dict__["_generation_config"] = value

    def __getattr__(self, name: str) -> Any:
        if name == "generation_config":  # what the property raises is lost: Python asks here next, and torch knows none
            _made()
        return super().__getattr__(name)  # type: ignore[misc]

    def _further_texts(self) -> dict[str, str]:
        """``generation_config.json``: of the object, if there is one, or as it was read, or what transformers makes."""
        if "_generation_config" in self.__dict__:
            return {"generation_config.json": self.__dict__["_generation_config"].to_json_string()}
        found = self._generation_file
        if found is None:
            ids = {name: getattr(self.config, name) for name in _IDS if getattr(self.config, name) is not None}
            found = {**ids, **(self._no_classes() or {"_from_model_config": True})}
        return {"generation_config.json": json.dumps(found, indent=2, sort_keys=True) + "\n"}

    def _no_classes(self) -> dict[str, Any]:
        """The setting by which transformers draws colours only."""
        classes = list(range(self.config.n_colours, self.config.sos_token_id))
        return {"suppress_tokens": classes} if classes else {}

    def _generation_settings(self) -> dict[str, Any]:
        """What is set in ``generation_config``, whether or not anybody has asked for it."""
        if "_generation_config" in self.__dict__:
            return set_in(self.__dict__["_generation_config"], self.__dict__.get("_generation_made"))
        file = self._generation_file or {}
        return {name: value for name, value in file.items() if value is not None and name in _ASKING}


def _made() -> Any:
    try:
        return kin.library("transformers", "generation_config").GenerationConfig
    except ImportError as error:
        raise AttributeError(str(error)) from error


def over(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The settings of both, the latter's first; a length in ``after`` replaces both that ``before`` may have."""
    gone = _LENGTHS if _LENGTHS & after.keys() else set()
    return {**{name: value for name, value in before.items() if name not in gone}, **after}


def check_names(model: Any, theirs: dict[str, Any]) -> None:
    """Raises TypeError where an argument is neither ``generate``'s, transformers' included, nor the model's."""
    unknown = theirs.keys() - keywords.SETTINGS.keys() - keywords.GENERATE
    if not unknown or theirs.get("custom_generate") is not None:
        return
    forward = inspect.signature(model.forward).parameters
    unknown -= forward.keys()
    if loaded := sys.modules.get("transformers.generation.configuration_utils"):  # a newer one has more
        unknown -= vars(loaded.GenerationConfig()).keys()
    if not any(each.kind is each.VAR_KEYWORD for each in forward.values()):  # else it is transformers' to ask
        keywords.refuse("generate", dict.fromkeys(unknown))


def set_in(config: Any, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """What is set in a ``GenerationConfig``: differs from ``before``, or from one without arguments."""
    before = type(config)().to_dict() if before is None else before
    names = (_ASKING | before.keys()) - _ABOUT  # a newer transformers has more of them
    now = {name: getattr(config, name, None) for name in names}  # objects, of which to_dict makes dicts
    return {name: value for name, value in now.items() if value not in (None, before.get(name))}
