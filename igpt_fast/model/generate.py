"""``generate`` in transformers' calling convention: on top of ``sampling.decoding``, or else by transformers itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor

from igpt_fast import kin
from igpt_fast.checks import true_or_false, whole_number
from igpt_fast.draws import Sampling, check_scale
from igpt_fast.engines.network import Model
from igpt_fast.model.settings import GenerationSettings, asks_for_nothing, check_names, over, set_in
from igpt_fast.sampling.batches import Batches
from igpt_fast.sampling.decoding import StepCallback, decode
from igpt_fast.sampling.rules import Guidance, RandomStreams


@kin.stands_for("transformers.generation.utils", "GenerationMixin")
class GenerationMixin(GenerationSettings):
    """``generate`` in transformers' calling convention."""

    def generate(
        self,
        input_ids: Tensor | None = None,
        generation_config: Any = None,
        *,
        inputs: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance_scale: float | None = None,
        negative_prompt_ids: Tensor | None = None,
        num_return_sequences: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        callback: StepCallback | None = None,
        dtype: str | None = None,
        speculate: bool | None = None,
        **theirs: Any,
    ) -> Any:
        """Continues contexts by drawn colours.

        Unlike transformers', ``max_length`` defaults to a whole image (``n_positions`` colours after SOS) instead
        of 20, and ``top_k`` to all colours instead of 50; both where ``generation_config`` does not say it. What else
        transformers' ``generate`` takes (beams, processors of logits, an assistant, ``return_dict_in_generate``, ...)
        it does itself, with this model and about as slowly as with its own; a warning says so once.

        Args:
            input_ids: (B, T_0) int64 with 1 <= T_0; SOS (``config.sos_token_id``) first, as the model was
                trained. ``None`` means one row of SOS alone.
            generation_config: transformers' ``GenerationConfig``: what is set in it stands for arguments that are not
                given, before what is set in the model's own.
            inputs: ``input_ids`` by its other name.
            attention_mask: (B, T_0); other than all ones is transformers' to do, and so is ``use_cache=False``.
            use_cache: Whether keys and values are kept.
            max_length: Length of the result, ``input_ids`` included; at most ``n_positions + 1``.
            max_new_tokens: The same, counted from the end of ``input_ids``; one of the two at most.
            do_sample: Draw the tokens; else take the most likely one each time.
            temperature, top_k, top_p, min_p: See ``Sampling``; ``top_k=0`` is ``None``, as in transformers. Without
                ``do_sample`` they must stay at their defaults.
            guidance_scale: Of classifier-free guidance, see ``Guidance``; ``None`` and 1 are none.
            negative_prompt_ids: (B, T_0) or (1, T_0) int64: what is guided away from. ``None``: ``input_ids`` with
                SOS in place of the first token, which is the class; the parts of an image that are given stay.
                (Transformers' default, the last token alone, is no beginning of an image.)
            num_return_sequences: Continuations of each row, which follow each other in the result; more than
                one needs ``do_sample``. The row is read, and kept in the cache, once for all of them.
            seed: Row i of the result draws from a stream of its own, made of (seed, i), whatever the batch; needs
                ``do_sample``, as ``generator`` does.
            generator: Draws from this generator instead, on its device; one of the two at most. Without either,
                a seed is drawn from torch's global generator.
            callback: Called after every position with its number, counted from 0, and the tokens of all rows of the
                result. Without it, rows for which memory does not suffice together are computed in parts.
            dtype: ``"int8"`` decodes with weights and cache rounded to 8 bits, faster and a little less exact (on
                the CPU; see ``engines.cpu.decoder``); ``"fp8_values"`` with cached values of 8 bits, ``"fp8_cache"``
                with keys as well (models in bfloat16 or float16 on a GPU; see ``engines.cuda.decoder``). ``None``
                decodes in the model's own dtype.
            speculate: ``False`` never guesses tokens ahead; else they are of an image that is drawn alone, where the
                decoder can verify them, which changes none; see ``sampling.speculation``.
            theirs: Further arguments of transformers' ``generate``, or of the model.

        Returns:
            (B * num_return_sequences, length) int64, on the model's device; where transformers does it, what that
            returns.

        Raises:
            ImportError: What only transformers does, which is not installed.
            BackendUnavailableError: Nothing here decodes this model in ``dtype``.
            FloatingPointError: The model's logits are not finite; see ``Drawn.check``.
            MemoryError, RuntimeError: Memory does not suffice for one row, or for all if there is a callback.
            TypeError: ``input_ids`` is not an integer tensor, ``speculate`` no bool, or an argument that nobody has,
                or that transformers has not (``seed``, ``generator``, ``callback``, ``dtype``, ``speculate``) beside
                one that only it has.
            ValueError: A bad shape, a token out of range, a length out of range, or contradicting options, such as
                guidance and beams, which transformers would mix up.

        Source: transformers ``GenerationMixin.generate``.
        """
        model = cast(Model, self)
        model.config.check_causal("generate")
        if model.transformer.wte.weight.ndim != 2:
            raise RuntimeError(
                "generate: the weights are in pieces, which FullyShardedDataParallel gathers only where it is called"
                " itself; generate inside FullyShardedDataParallel.summon_full_params(model, recurse=False)"
            )
        asked: dict[str, Any] = {
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "max_length": max_length,
            "max_new_tokens": max_new_tokens,
            "do_sample": do_sample,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "guidance_scale": guidance_scale,
            "negative_prompt_ids": negative_prompt_ids,
            "num_return_sequences": num_return_sequences,
        }
        asked = {name: value for name, value in asked.items() if value is not None}
        only_here: dict[str, Any] = {"seed": seed, "generator": generator, "callback": callback, "dtype": dtype}
        only_here["speculate"] = speculate
        if input_ids is not None and inputs is not None:
            raise ValueError("generate: give input_ids or inputs, which are the same, not both")
        context = inputs if input_ids is None else input_ids
        check_names(model, theirs)
        given = {} if generation_config is None else set_in(generation_config)
        given = over(given, {**asked, **theirs})
        settings = over(self._generation_settings(), given)
        for name in ("do_sample", "use_cache"):
            if settings.get(name) not in (None, False, True):
                raise ValueError(f"generate: {name} is {settings[name]!r}; want True or False")
        if not settings.get("do_sample"):
            settings = {name: value for name, value in settings.items() if name not in _OF_DRAWING or name in asked}
        if beyond := _beyond(model, settings):
            return self._generate_as_transformers(beyond, context, settings, given, only_here)
        ours = {name: value for name, value in settings.items() if name in _OURS - {"attention_mask", "use_cache"}}
        return _generate(model, context, **ours, **only_here)

    def _generate_as_transformers(
        self,
        beyond: list[str],
        context: Tensor | None,
        settings: dict[str, Any],
        given: dict[str, Any],
        only_here: dict[str, Any],
    ) -> Any:
        """transformers' own ``generate`` with this model, for the sake of the settings ``beyond`` ours.

        Of ``settings`` it gets those that are ``given``, and finds the others in ``generation_config``.
        """
        model, names = cast(Model, self), ", ".join(beyond)
        if mixed := sorted(name for name, value in only_here.items() if value is not None):
            raise TypeError(f"generate: {', '.join(mixed)} cannot be combined with {names}, which transformers does")
        theirs = kin.library("transformers", f"generate: {names}")
        if names not in _told:
            _told.add(names)
            warnings.warn(f"generate: {names}: transformers' own generate does this, step by step", stacklevel=3)
        embeddings = given.get("inputs_embeds")
        if embeddings is None:
            context = _check_context("input_ids", context, model)
        length = cast(Tensor, embeddings if context is None else context).shape[1]
        lengths = (settings.get("max_length"), settings.get("max_new_tokens"))
        arguments = {**given, **_guidance_of_transformers(settings, beyond, context, model)}
        # Our defaults; a stored max_length would count beside ours.
        arguments |= {"max_length": None, "max_new_tokens": _new_tokens(length, *lengths, model.config.n_positions)}
        if settings.get("do_sample") and settings.get("top_k") is None:
            arguments["top_k"] = 0
        if classes := self._no_classes().get("suppress_tokens"):
            arguments["suppress_tokens"] = sorted({*classes, *(settings.get("suppress_tokens") or ())})
        return theirs.GenerationMixin.generate(self, context, **arguments)


def _guidance_of_transformers(
    settings: dict[str, Any], beyond: list[str], context: Tensor | None, model: Model
) -> dict[str, Any]:
    """The arguments by which transformers guides as ``_guidance`` says."""
    scale, negative = settings.get("guidance_scale"), settings.get("negative_prompt_ids")
    if scale in (None, 1.0) and negative is None:
        return {}
    if negative is None and (context is None or "attention_mask" in beyond):
        raise ValueError("generate: guidance_scale beside inputs_embeds or an attention_mask needs negative_prompt_ids")
    if (settings.get("num_beams") or 1) > 1:
        raise ValueError(
            "generate: guidance_scale and num_beams do not go together: transformers, which does beams, would guide"
            " each away from what other beams have drawn"
        )
    if context is None:
        return {}
    guided_away = cast(Guidance, _guidance(scale, negative, context, model)).context
    # A row for each of the result, which transformers does not see to.
    return {"negative_prompt_ids": guided_away.repeat_interleave(settings.get("num_return_sequences") or 1, dim=0)}


_told: set[str] = set()
_OF_DRAWING = {"temperature", "top_k", "top_p", "min_p"}
# The settings that are ours to do.
_OURS = _OF_DRAWING | {
    "attention_mask",
    "use_cache",
    "max_length",
    "max_new_tokens",
    "do_sample",
    "guidance_scale",
    "negative_prompt_ids",
    "num_return_sequences",
}


def _beyond(model: Model, settings: dict[str, Any]) -> list[str]:
    """The names of the settings that ask for what only transformers does."""
    others = {name: value for name, value in settings.items() if name not in _OURS}
    config = model.config
    suppressed = others.get("suppress_tokens")
    if isinstance(suppressed, list) and {*suppressed} <= {*range(config.n_colours, config.sos_token_id)}:
        del others["suppress_tokens"]
    if "eos_token_id" not in others:
        others["eos_token_id"] = config.eos_token_id
    names = {name for name, value in others.items() if not asks_for_nothing(name, value)}
    if not settings.get("use_cache", True):
        names.add("use_cache=False")
    prepare: Any = getattr(model, "prepare_inputs_for_generation", None)  # PEFT's prompts are put in front there
    if prepare is not None and not getattr(prepare, "__func__", prepare).__module__.startswith("transformers."):
        names.add("prepare_inputs_for_generation")
    mask = settings.get("attention_mask")
    if mask is not None and not bool((mask == 1).all()):
        names.add("attention_mask")
    return sorted(names)


def _generate(
    model: Model,
    input_ids: Tensor | None,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    guidance_scale: float | None = None,
    negative_prompt_ids: Tensor | None = None,
    num_return_sequences: int = 1,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    callback: StepCallback | None = None,
    dtype: str | None = None,
    speculate: bool | None = None,
) -> Tensor:
    """``GenerationMixin.generate`` of what the engines here do."""
    top_k = None if top_k == 0 and not isinstance(top_k, bool) else top_k
    num_return_sequences = whole_number("generate: num_return_sequences", num_return_sequences)
    random = (temperature, top_k, top_p, min_p, num_return_sequences, seed, generator)
    if not do_sample and random != (1.0, None, None, None, 1, None, None):
        raise ValueError(
            "generate: temperature, top_k, top_p, min_p, seed, generator and num_return_sequences above 1 have no"
            " effect on greedy decoding; pass do_sample=True"
        )
    sampling = Sampling(temperature if do_sample else 0.0, top_k, top_p, min_p)
    speculate = True if speculate is None else true_or_false("generate: speculate", speculate)
    context = _check_context("input_ids", input_ids, model)  # (B, T_0)
    guidance = _guidance(guidance_scale, negative_prompt_ids, context, model)
    steps = _new_tokens(context.shape[1], max_length, max_new_tokens, model.config.n_positions)
    count = context.shape[0] * num_return_sequences
    if do_sample and seed is None and generator is None:
        seed = int(torch.randint(0, 1 << 62, ()))
    uniforms = _uniforms(count, steps, seed, generator, context)  # (B n, steps)
    parts = Batches(count, num_return_sequences, max(1, count))

    def part(start: int, stop: int, together: int) -> Iterator[Tensor]:
        rows = slice(start // num_return_sequences, -(-stop // num_return_sequences))
        away = None if guidance is None else Guidance(guidance.scale, guidance.context[rows])
        options: dict[str, Any] = {"guidance": away, "first": start, "speculate": speculate}
        yield decode(model, context[rows], uniforms[start:stop], sampling, callback, dtype, **options).tokens

    whole = callback is not None or count == 0
    drawn = list(part(0, count, num_return_sequences) if whole else parts.run(part))
    return torch.cat([context.repeat_interleave(num_return_sequences, dim=0), torch.cat(drawn)], dim=1)


def _guidance(scale: float | None, negative: Any, context: Tensor, model: Model) -> Guidance | None:
    """What ``guidance_scale`` and ``negative_prompt_ids`` ask for, beside the guided context."""
    if scale is None or scale == 1.0:
        if negative is not None:
            raise ValueError("generate: negative_prompt_ids has no effect without a guidance_scale other than 1")
        return None
    check_scale("generate: guidance_scale", scale)
    if negative is None:
        without = context.clone()
        without[:, 0] = model.config.sos_token_id
        if context.numel() and torch.equal(without, context):
            raise ValueError(
                "generate: guidance_scale has no effect, for no row of input_ids begins with a class; give"
                " negative_prompt_ids"
            )
        return Guidance(scale, without)
    without = _check_context("negative_prompt_ids", negative, model)
    if without.shape not in (context.shape, (1, context.shape[1])):
        shapes = f"{tuple(without.shape)}, input_ids {tuple(context.shape)}"
        raise ValueError(f"generate: negative_prompt_ids has shape {shapes}; want one shape, or one row")
    return Guidance(scale, without.expand_as(context))


def _check_context(name: str, input_ids: Any, model: Model) -> Tensor:
    """The context as (B, T_0) int64 on the model's device."""
    sos = model.config.sos_token_id
    if input_ids is None:
        return torch.full((1, 1), sos, dtype=torch.int64, device=model.device)
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32, torch.uint8, torch.int16):
        got = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"generate: {name} is {got}; want an integer tensor")
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"generate: {name} has shape {tuple(input_ids.shape)}; want (B, T) with T >= 1, SOS first")
    if input_ids.numel():
        low, high = (int(end) for end in torch.aminmax(input_ids))
        if low < 0 or high > sos:
            raise ValueError(f"generate: token {low if low < 0 else high} is not in 0..{sos} (SOS is {sos})")
    return input_ids.to(model.device, torch.int64)


def _new_tokens(given: int, max_length: int | None, max_new_tokens: int | None, n_positions: int) -> int:
    """How many tokens to draw after ``given`` ones."""
    if max_length is not None and max_new_tokens is not None:
        raise ValueError("generate: give max_length or max_new_tokens, not both")
    for name, value in (("max_length", max_length), ("max_new_tokens", max_new_tokens)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise ValueError(f"generate: {name} is {value!r}; want an integer")
    if max_new_tokens is not None:
        max_length = given + int(max_new_tokens)
    elif max_length is None:
        max_length = n_positions + 1
    if max_length > n_positions + 1:
        most = f"{n_positions + 1}, SOS and the model's n_positions"
        raise ValueError(f"generate: a length of {max_length} tokens exceeds {most}")
    if max_length <= given:
        raise ValueError(f"generate: {given} tokens are given, which leaves none of a length of {max_length} to draw")
    return int(max_length) - given


def _uniforms(
    n: int, steps: int, seed: int | None, generator: torch.Generator | None, context: Tensor
) -> Tensor | RandomStreams:
    """(n, steps) uniform numbers; zeros where neither seed nor generator is given."""
    if seed is not None and generator is not None:
        raise ValueError("generate: give seed or generator, not both")
    if generator is not None:
        numbers = torch.rand(n, steps, generator=generator, dtype=torch.float32, device=generator.device)
        return numbers.to(context.device)
    streams = RandomStreams(seed, torch.arange(n, device="cpu"), 0, steps)
    # Behind a longer context they are not of the tokens' places in the images.
    return streams if context.shape[1] == 1 else streams.made(context.device)
