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

# The settings of transformers' GenerationConfig: what a generation_config.json may have for them, and which these are.
_ANY = "what transformers will judge"
_KINDS = {
    "true or false": "do_sample use_cache use_mtp renormalize_logits remove_invalid_values token_healing low_memory"
    " output_attentions output_hidden_states output_scores output_logits return_dict_in_generate is_assistant"
    " disable_compile",
    "an integer": "max_length max_new_tokens min_length min_new_tokens max_cache_len num_beams num_beam_groups top_k"
    " no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences num_assistant_tokens prefill_chunk_size"
    " prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit assistant_lookbehind target_lookbehind",
    "a number": "temperature top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty penalty_alpha"
    " encoder_repetition_penalty length_penalty diversity_penalty guidance_scale max_time"
    " assistant_confidence_threshold assistant_ensemble_weight",
    "an integer or integers": "pad_token_id bos_token_id eos_token_id decoder_start_token_id forced_bos_token_id"
    " forced_eos_token_id",
    "integers": "suppress_tokens begin_suppress_tokens",
    _ANY: "early_stopping stop_strings cache_implementation cache_config bad_words_ids"
    " exponential_decay_length_penalty sequence_bias watermarking_config num_assistant_tokens_schedule"
    " speculation_type compile_config continuous_batching_config dola_layers constraints force_words_ids"
    " transformers_version _from_model_config",
}
SETTINGS = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_TYPES: dict[str, tuple[type, ...]] = {"true or false": (bool,), "a number": (int, float)}  # exactly: True is an int
# What transformers' generate takes besides, which is neither a setting nor the model's.
GENERATE = {"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus", "assistant_model"}
GENERATE |= {"streamer", "negative_prompt_attention_mask", "custom_generate", "tokenizer", "assistant_tokenizer"}
GENERATE |= {"trust_remote_code", "use_model_defaults", "cache_position"}


def check_settings(where: str, found: Mapping[str, Any]) -> None:
    """Raises ValueError where an entry of a ``generation_config.json`` is known and not of its kind."""
    for name, value in found.items():
        kind = SETTINGS.get(name, _ANY)
        several = value if isinstance(value, list) and kind.endswith("integers") else [value]
        wanted = _TYPES.get(kind, (int,)) if kind != "integers" or several is value else ()
        if value is not None and kind != _ANY and not all(type(one) in wanted for one in several):
            raise ValueError(f"{where}: {name} is {shown(value)}; want {kind}")


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
