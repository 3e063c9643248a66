"""``generate`` in transformers' calling convention, on top of ``generation.decode``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from igpt_fast.checks import whole_number
from igpt_fast.draws import Sampling, check_scale
from igpt_fast.engines.network import Model
from igpt_fast.sampling.batches import Batches
from igpt_fast.sampling.decoding import StepCallback, decode
from igpt_fast.sampling.rules import Guidance, RandomStreams, stream_uniforms


class GenerationMixin:
    """``generate`` in transformers' calling convention."""

    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = True,
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
        **unsupported: Any,
    ) -> Tensor:
        """Continues contexts by drawn colours.

        Unlike transformers', ``max_length`` defaults to a whole image (``n_positions`` colours after SOS) instead
        of 20, and ``top_k`` to all colours instead of 50. Options of transformers' ``generate`` that are not
        listed here raise TypeError; ``igpt_fast.hf.to_transformers(model).generate`` has them all.

        Args:
            input_ids: (B, T_0) int64 with 1 <= T_0; SOS (``config.sos_token_id``) first, as the model was
                trained. ``None`` means one row of SOS alone.
            inputs: The same, by its other name.
            attention_mask: (B, T_0), all ones: contexts have no padding here.
            use_cache: True; decoding without a cache is not offered.
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
                the CPU; see ``engines.cpu.decoder``); ``"fp8_values"`` with cached values of 8 bits (models in bfloat16
                or float16 on a GPU; see ``engines.cuda.decoder``). ``None`` decodes in the model's own dtype.

        Returns:
            (B * num_return_sequences, length) int64, on the model's device.

        Raises:
            BackendUnavailableError: Nothing here decodes this model in ``dtype``.
            FloatingPointError: The model's logits are not finite; see ``Drawn.check``.
            MemoryError, RuntimeError: Memory does not suffice for one row, or for all if there is a callback.
            TypeError: ``input_ids`` is not an integer tensor, or an argument that is not listed here.
            ValueError: A bad shape, a token out of range, a length out of range, or contradicting options.

        Source: transformers ``GenerationMixin.generate``.
        """
        model = cast(Model, self)
        if unsupported:
            names = ", ".join(sorted(unsupported))
            theirs = f"igpt_fast.hf.to_transformers(model).generate({names}=...)"
            raise TypeError(f"generate: {names} is not offered here; transformers' own generate may have it: {theirs}")
        if input_ids is not None and inputs is not None:
            raise ValueError("generate: give input_ids or inputs, which are the same, not both")
        if not use_cache:
            raise ValueError("generate: use_cache=False is not supported")
        if attention_mask is not None and not bool((attention_mask == 1).all()):
            raise ValueError("generate: attention_mask hides positions; contexts have no padding here")
        if model.config.eos_token_id is not None:
            raise ValueError(
                f"generate: the configuration has eos_token_id {model.config.eos_token_id}, but images end at their"
                " last pixel; set it to None"
            )
        top_k = None if top_k == 0 and not isinstance(top_k, bool) else top_k
        whole_number("generate: num_return_sequences", num_return_sequences)
        random = (temperature, top_k, top_p, min_p, num_return_sequences, seed, generator)
        if not do_sample and random != (1.0, None, None, None, 1, None, None):
            raise ValueError(
                "generate: temperature, top_k, top_p, min_p, seed, generator and num_return_sequences above 1 have no"
                " effect on greedy decoding; pass do_sample=True"
            )
        sampling = Sampling(temperature if do_sample else 0.0, top_k, top_p, min_p)
        context = _check_context("input_ids", inputs if input_ids is None else input_ids, model)  # (B, T_0)
        guidance = _guidance(guidance_scale, negative_prompt_ids, context, model)
        steps = _new_tokens(context.shape[1], max_length, max_new_tokens, model.config.n_positions)
        count = context.shape[0] * num_return_sequences
        if do_sample and seed is None and generator is None:
            seed = int(torch.randint(0, 1 << 62, ()))
        uniforms = _uniforms(count, steps, seed, generator, model.device)  # (B n, steps)
        ours = generator is None and context.shape[1] == 1  # whether numbers are of tokens' places in images
        parts = Batches(count, num_return_sequences, max(1, count))

        def part(start: int, stop: int, together: int) -> Iterator[Tensor]:
            rows = slice(start // num_return_sequences, -(-stop // num_return_sequences))
            away = None if guidance is None else Guidance(guidance.scale, guidance.context[rows])
            streams = RandomStreams(seed or 0, torch.arange(start, stop)) if ours else None
            numbers = uniforms[start:stop]
            options: dict[str, Any] = {"guidance": away, "streams": streams, "first": start}
            yield decode(model, context[rows], numbers, sampling, callback, dtype, **options).tokens

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
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"generate: {name} is {value!r}; want an integer")
    if max_new_tokens is not None:
        max_length = given + max_new_tokens
    elif max_length is None:
        max_length = n_positions + 1
    if max_length > n_positions + 1:
        most = f"{n_positions + 1}, SOS and the model's n_positions"
        raise ValueError(f"generate: a length of {max_length} tokens exceeds {most}")
    if max_length <= given:
        raise ValueError(f"generate: {given} tokens are given, which leaves none of a length of {max_length} to draw")
    return max_length - given


def _uniforms(n: int, steps: int, seed: int | None, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """(n, steps) uniform numbers on ``device``; zeros where neither seed nor generator is given."""
    if seed is not None and generator is not None:
        raise ValueError("generate: give seed or generator, not both")
    if generator is not None:
        return torch.rand(n, steps, generator=generator, device=generator.device).to(device)
    if seed is not None:
        return stream_uniforms(seed, torch.arange(n), 0, steps, device)
    return torch.zeros(n, steps, device=device)
