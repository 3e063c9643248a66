"""transformers' keywords that methods here take for its sake: by another name, or where they ask for nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from igpt_fast.files import listed, shown

Function = TypeVar("Function", bound=Callable[..., Any])
# Keywords of transformers' from_pretrained and save_pretrained that ask for nothing new at these values, and what to
# do instead of any other.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "code_revision": ((None, "main"), "no code of a repository is ever run"),
    "distributed_config": ((None,), "shard the model by torch's fully_shard after it is loaded"),
    "force_download": ((False, None), "fetch anew by huggingface_hub.snapshot_download(..., force_download=True)"),
    "gguf_file": ((None,), "only safetensors and pytorch_model.bin are read"),
    "key_mapping": ((None,), "rename the entries of the file, or pass state_dict to load_state_dict"),
    "load_in_4bit": ((False, None), "use generate(dtype='int8'), or torchao.quantize_"),
    "load_in_8bit": ((False, None), "use generate(dtype='int8'), or torchao.quantize_"),
    "mirror": ((None,), "set the variable HF_ENDPOINT"),
    "offload_buffers": ((False, None), "the models have no buffers"),
    "offload_state_dict": ((None, False), "weights are read one by one as it is"),
    "proxies": ((None,), "set the variables HTTP_PROXY and HTTPS_PROXY"),
    "push_to_hub": ((False, None), "call huggingface_hub.upload_folder on the folder"),
    "quantization_config": ((None,), "use generate(dtype='int8'), or torchao.quantize_"),
    "resume_download": ((None, False, True), "downloads are resumed by themselves"),
    "save_peft_format": ((True, None), "save the adapter by PEFT's own save_pretrained"),
    "tp_plan": ((None,), "shard the model by torch's fully_shard after it is loaded"),
    "trust_remote_code": ((False, True, None), "a permission that is never used"),
    "use_auth_token": ((None,), "use token"),
    "use_fast": ((None, True, False), "there is one processor"),
    "use_kernels": ((None, False), "kernels are chosen by themselves; see igpt_fast.show_config()"),
    "variant": ((None,), "give the name of another folder or subfolder"),
    "weights_only": ((True, None), "no pickles are ever run"),
    "_commit_hash": ((None,), "use revision"),
    "_fast_init": ((True, False), "weights are read one by one as it is"),
}
# transformers' words to itself: who is calling, and where an adapter would be fetched from if there was one.
_INTERNAL = ("_from_auto", "_from_pipeline", "adapter_kwargs")


def also_called(**names: str) -> Callable[[Function], Function]:
    """Has a function take arguments by transformers' names as well, which are given by ours."""

    def wrap(function: Function) -> Function:
        @functools.wraps(function)
        def wrapper(*args: Any, **keywords: Any) -> Any:
            for ours, theirs in names.items():
                if theirs in keywords:
                    if ours in keywords:
                        raise TypeError(f"{function.__name__}: {ours} and {theirs} are the same; give one")
                    keywords[ours] = keywords.pop(theirs)
            return function(*args, **keywords)

        return wrapper  # type: ignore[return-value]

    return wrap


def without_neutral(who: str, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords but those of ``NEUTRAL`` that ask for nothing.

    Raises:
        ValueError: One of these asks for something; the message says what to do instead.
    """
    keywords = {name: value for name, value in keywords.items() if name not in _INTERNAL}
    for name, value in keywords.items():
        values, instead = NEUTRAL.get(name, ((value,), ""))
        if not any(type(value) is type(known) and value == known for known in values):
            raise ValueError(f"{who}: {name}={shown(value)} is not offered: {instead}")
    return {name: value for name, value in keywords.items() if name not in NEUTRAL}


def refuse(who: str, keywords: Mapping[str, Any]) -> None:
    """Raises TypeError where a keyword is left that nobody knows."""
    if keywords:
        raise TypeError(f"{who}() got an unexpected keyword argument: {listed(keywords)}")
