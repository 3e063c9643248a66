"""Whole passes on a GPU against their peers: logits, likelihoods and features, of iGPT-S, M and L.

    python benchmarks/bench_model_cuda.py --json benchmarks/results/model_cuda.json
    python benchmarks/bench_model_cuda.py --device cpu --quick --json /tmp/rows.json

1,024 tokens an image, seeded weights, bfloat16. Ours and an expert's plain PyTorch (peers.py), and transformers, whose
attention writes all scores out, in turns; ``compiled``: the forward pass of all of them under torch.compile.

- ``forward``: the logits of every position.
- ``score``: the nats of every pixel, as ``igpt score`` computes them; the others' with ``F.cross_entropy`` in float32.
- ``features``: the mean over positions of every layer's normalised states, as ``igpt features`` computes them; the
  others' likewise, of transformers its ``hidden_states``, without the norm, which it has no place for.

Each result is checked first, against float32, by the rule of the ops: an error of at most twice that of the plain
expression in bfloat16, and one unit of rounding. What is right is the expert's, which the tests hold against the model.

``path``: whose kernels ran; of ours on a GPU the CUDA ones, or an op raises. ``ms``: of a batch, the median over turns;
``img_s``, ``tflop_s`` (of multiplications, the half of attention that is not masked); ``of_ceiling``: that over what a
large product in bfloat16 was measured to do; ``memory_gib``: the most that it allocated, weights included;
``times_hf``: as many times faster than transformers, ``times_peer``: than the fastest of the others, in the same part;
``interleaved``: whether all candidates had room in memory together, and took turns; ``off``: relative error;
``prepared_s``: seconds until the first result was checked, compiling among them; ``error``: why a row has no time.
Every row is in the file as soon as it is known.

``--quick``: a tiny model, two turns; where the device is no GPU, torch.compile traces and compiles nothing.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import peers
import torch
import torch.nn.functional as F
from torch import Tensor
from whole_models import DTYPE, OURS, SUFFIX, Case, Work, close, limit_of, program, transformers_model

from igpt_fast.learning.extraction import feature_batches, fed
from igpt_fast.likelihood.nats import image_nats

EAGER = ("transformers", "PyTorch", OURS)
COMPILED = tuple(f"{name}{SUFFIX}" for name in EAGER)
# Model -> images of a batch: as many as leave transformers room for its scores.
SIZES = {"S": 32, "M": 16, "L": 8}


# ---- Forward ------------------------------------------------------------------------------------------------


def forward(case: Case, name: str) -> Callable[[], Tensor]:
    """The call that makes a candidate's (B, T, K) logits."""
    model, tokens = case.make(DTYPE), case.tokens
    who = name.removesuffix(SUFFIX)
    if who == "PyTorch":
        return functools.partial(case.compiled(peers.Expert(model).requires_grad_(False), name), tokens)
    network: Any = transformers_model(model) if who == "transformers" else model
    call = case.compiled(lambda ids: network(ids, use_cache=False).logits, name)
    return lambda: call(tokens)


def right_logits(case: Case) -> tuple[Tensor, float]:
    """The logits in float32 of an eighth of the batch, and how far from them a result may be."""
    model = case.make(DTYPE)
    plain = peers.Expert(model)(case.some).float()
    want = peers.Expert(model.float())(case.some)
    return want, limit_of(plain, want)


# ---- Likelihoods --------------------------------------------------------------------------------------------


def score(case: Case, name: str) -> Callable[[], Tensor]:
    """The call that makes a candidate's (B, T) nats. Compared is what they have beside those of equal chances, which
    are nearly all that a network without training has.
    """
    model, tokens = case.make(DTYPE), case.tokens
    if name == "PyTorch":
        return functools.partial(expert_nats, peers.Expert(model), tokens)
    if name == "transformers":
        return functools.partial(peers.transformers_nats, transformers_model(model), tokens)
    return functools.partial(image_nats, model, tokens)


def expert_nats(expert: peers.Expert, tokens: Tensor) -> Tensor:
    sos = torch.full_like(tokens[:, :1], len(expert.wte) - 1)
    logits = expert(torch.cat([sos, tokens[:, :-1]], dim=1)).float()
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)


def right_nats(case: Case) -> tuple[Tensor, float, float]:
    model = case.make(DTYPE)
    plain = expert_nats(peers.Expert(model), case.some)
    want, equal = expert_nats(peers.Expert(model.float()), case.some), math.log(case.config.n_colours)
    return want, limit_of(plain - equal, want - equal), equal


def check_nats(run: Callable[[], Tensor], right: tuple[Tensor, float, float]) -> dict[str, float]:
    want, limit, equal = right
    return close(run() - equal, (want - equal, limit), "nats")


# ---- Features -----------------------------------------------------------------------------------------------


def features(case: Case, name: str) -> Callable[[], Tensor]:
    """The call that makes a candidate's (B, L, n_embd) features, of layers 1 to L."""
    model, tokens = case.make(DTYPE), case.tokens
    inputs = fed(case.config, tokens)
    if name == "PyTorch":
        return functools.partial(expert_features, peers.Expert(model), inputs)
    if name == "transformers":
        theirs = transformers_model(model).transformer
        # Their last state has the norm; the others are as they come out of the blocks, which the check leaves out.
        return lambda: torch.stack(
            [
                state.float().mean(dim=1)
                for state in theirs(inputs, use_cache=False, output_hidden_states=True).hidden_states[1:]
            ],
            dim=1,
        )
    layers = list(range(1, case.config.n_layer + 1))
    return lambda: torch.cat([b for _, b in feature_batches(model, tokens, layers, batch_size=len(tokens))])


def expert_features(expert: peers.Expert, inputs: Tensor) -> Tensor:
    found: list[Tensor] = []
    x = F.embedding(inputs, expert.wte) + expert.wpe[: inputs.shape[1]]
    norms = [*(block.norm_1 for block in expert.blocks[1:]), expert.norm]
    for block, norm in zip(expert.blocks, norms, strict=True):
        x = block(x, peers.causal)
        found.append(F.rms_norm(x, x.shape[-1:], norm, expert.eps).float().mean(dim=1))
    return torch.stack(found, dim=1)


def right_features(case: Case) -> tuple[Tensor, float]:
    model, inputs = case.make(DTYPE), fed(case.config, case.some)
    plain = expert_features(peers.Expert(model), inputs)
    want = expert_features(peers.Expert(model.float()), inputs)
    return want[:, -1:], limit_of(plain[:, -1:], want[:, -1:])


def check_features(run: Callable[[], Tensor], right: tuple[Tensor, float]) -> dict[str, float]:
    """Of the last layer, which everybody norms alike."""
    return close(run()[:, -1:], right, "features")


def check_forward(run: Callable[[], Tensor], right: tuple[Tensor, float]) -> dict[str, float]:
    return close(run(), right, "logits")


WORKS = {
    "forward": Work(forward, right_logits, check_forward),
    "score": Work(score, right_nats, check_nats),
    "features": Work(features, right_features, check_features),
}
PARTS = {work: ((work,), EAGER) for work in WORKS} | {"compiled": (("forward",), (EAGER[0], *COMPILED))}


def main() -> int:
    return program(__doc__, WORKS, PARTS, dict.fromkeys(WORKS, SIZES))


if __name__ == "__main__":
    sys.exit(main())
