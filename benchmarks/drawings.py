"""Who draws in bench_sample_cuda.py: each reads a context and goes on by a token a time, or some at a call."""

from __future__ import annotations

from typing import Any

import common
import torch
from torch import Tensor

from igpt_fast import ops, reference

SEED = 5


class Drawing:
    """Somebody who goes on drawing from where he was.

    Attributes:
        path: How he draws.
        logits: (B, K) of the next position.
    """

    path = ""
    logits: Tensor

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder

    def begin(self, context: Tensor) -> Tensor:
        """Reads (B, T) tokens, the last of them by a step; the (B, K) logits."""
        self.decoder.prefill(context[:, :-1])
        self.logits = self.decoder.step(context[:, -1])
        return self.logits

    def token(self) -> Tensor:
        """Draws a token of each image, and reads it; the (B,) tokens."""
        raise NotImplementedError

    def turn(self, count: int) -> None:
        for _ in range(count):
            self.token()


class Ours(Drawing):
    """One of this project's engines. On a GPU it draws there, as generation has it do: numbers, draw and the next input
    are one kernel.

    Raises:
        TypeError: The decoder is on a GPU and does not draw there: timing another way would say nothing about it.
    """

    def __init__(self, decoder: Any, device: str) -> None:
        super().__init__(decoder)
        self.draws = decoder.name == "cuda"
        if device == "cuda" and not self.draws:
            raise TypeError(f"{type(decoder).__name__} does not draw on the GPU; want a decoder that does")

    @property
    def path(self) -> str:
        """With what has failed since, on a GPU."""
        how = f"{self.decoder.name}: " + ("draw, step_drawn" if self.draws else "sample, step")
        return f"{how}; {self.decoder.reason}" if self.draws and self.decoder.reason else how

    def begin(self, context: Tensor) -> Tensor:
        self.streams = torch.arange(len(context), device=context.device)
        self.unused = torch.zeros(len(context), device=context.device)  # numbers, which the decoder makes by itself
        self.index = context.shape[1] - 1  # in its image, of the token that is drawn next
        return super().begin(context)

    def token(self) -> Tensor:
        if self.draws:
            drawn, _ = self.decoder.draw(self.logits, self.unused, (SEED, self.streams), as_they_came=True)
            self.logits = self.decoder.step_drawn()
        else:
            drawn = ops.sample(self.logits, self._uniform())
            self.logits = self.decoder.step(drawn)
        self.index += 1
        return drawn

    def _uniform(self) -> Tensor:
        return reference.uniform(SEED, self.streams, self.index, 1)[:, 0]

    def check_tokens(self, count: int) -> Tensor:
        """The (B, count) tokens that it draws next; raises Refused unless the same numbers give the definition's.

        One of them, and of 2,000 more each, may be another: a number beside the border of two colours.
        """
        others, drawn = 0, []
        for _ in range(count):
            want = reference.sample(self.logits.float(), self._uniform())
            drawn.append(self.token().clone())
            others += int((drawn[-1] != want).sum())
        if others > 1 + count * len(self.streams) // 2000:
            raise common.Refused(f"{others} of {count * len(self.streams)} tokens are not those of the definition")
        return torch.stack(drawn, dim=1)


class TokenByToken(Drawing):
    """``prefill`` and ``step``, and torch's draw between them."""

    path = "multinomial, step"

    def token(self) -> Tensor:
        drawn = torch.multinomial(self.logits.float().softmax(dim=-1), 1)[:, 0]
        self.logits = self.decoder.step(drawn)
        return drawn


class Generate(Drawing):
    """transformers' ``generate``, a turn a call; it prepares and wraps up each, which is no token's."""

    path = "generate"

    def begin(self, context: Tensor) -> Tensor:
        logits = super().begin(context)
        self.tokens = torch.cat([context, logits.argmax(dim=-1, keepdim=True)], 1)
        return logits

    def turn(self, count: int) -> None:
        settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "use_cache": True, "pad_token_id": 0}
        settings["attention_mask"] = torch.ones_like(self.tokens)  # else token 0 would be padding
        self.tokens = self.decoder.model.generate(
            self.tokens, past_key_values=self.decoder.cache, min_new_tokens=count, max_new_tokens=count, **settings
        )


class Compiled(Drawing):
    """The form of gpt-fast, which draws within its compiled call."""

    @property
    def path(self) -> str:
        return self.decoder.path

    def begin(self, context: Tensor) -> Tensor:
        self.decoder.prefill(context[:, :-1])
        token, logits = self.decoder.token(context[:, -1])
        self.next, self.logits = token.clone(), logits.clone()
        return self.logits

    def token(self) -> Tensor:
        self.next = self.decoder.token(self.next)[0].clone()
        return self.next
