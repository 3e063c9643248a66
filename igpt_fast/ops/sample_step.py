"""Drawing tokens in place, by settings that stand in memory: what a captured step ends with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from igpt_fast import reference
from igpt_fast.backend import OPS, Op
from igpt_fast.checks import whole_number
from igpt_fast.draws import Sampling
from igpt_fast.ops import dispatch
from igpt_fast.ops.sample import check_logits, check_tables, covered, embedding_of, launch

OPS["sample_step"] = Op(("cuda",), "as sample_next; (N, T) tokens and logprobs")


def sample_settings(seed: int, sampling: Sampling, offset: int = 0, first: int = 0) -> Tensor:
    """What ``sample_step`` reads on its device: (7,) int64, here on the CPU.

    Args:
        seed: In 0..2^64-1.
        sampling: How tokens are drawn.
        offset: The index of a drawn token in its image less its row's ``position``.
        first: The index of the tokens in column 0.

    Raises:
        ValueError: A number out of its range.
    """
    whole_number("sample_settings: seed", seed, 0, (1 << 64) - 1)
    for name, value in (("offset", offset), ("first", first)):
        whole_number(f"sample_settings: {name}", value, -(1 << 31), (1 << 31) - 1)
    return reference.sample_settings(seed, **sampling.keywords(), offset=offset, first=first)


def sample_step(
    logits: Tensor,
    settings: Tensor,
    streams: Tensor,
    position: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    embedding: Tensor | None = None,
    wte: Tensor | None = None,
    wpe: Tensor | None = None,
) -> None:
    """``sample_next`` in place, with log-probabilities: all that a decode step has left to do, in one launch.

    Nothing of it is fixed by a launch but shapes and places: a captured CUDA graph that ends with it draws on when it
    is replayed, from another seed or by other filters once other ``settings`` stand in their memory. Row i's token has
    the index ``position[i] + offset`` in its image; it and its log-probability go into column ``index - first`` of
    ``tokens`` and ``logprobs``, nowhere if there is no such column; 1 is added to ``position[i]``.

    Where launches are dependent ones (``backend.Launching``), the kernel reads ``settings`` and ``streams`` before it
    waits for the launch before. Where no kernel runs, the host reads ``settings``.

    Args:
        logits: (N, K), floating point; as for ``sample``.
        settings: (7,) int64 on the device of ``logits``, as ``sample_settings`` makes them.
        streams: (N,) int64, contiguous: as for ``sample_next``.
        position: (N,) int32, contiguous; written.
        tokens: (N, T) int64, contiguous; written.
        logprobs: (N, T) float32, contiguous; written: ``log_softmax`` of the logits as they are, before temperature and
            filters, at the token; NaN where a logit of the row is NaN or infinity, or all are minus infinity.
        embedding: (N, n_embd) of the dtype of ``wte``, contiguous; written, as ``sample_next`` returns it. It comes
            with ``wte`` and ``wpe``, or none of them.
        wte, wpe: As for ``sample_next``.

    Raises:
        TypeError: Another dtype.
        ValueError: Shapes that do not fit, tensors that are not contiguous, one of the three without the others, or
            several devices.
        BackendUnavailableError: The chosen backend does not serve the device.

    Source: see ``reference.sample_step``.
    """
    tensors = logits, settings, streams, position, tokens, logprobs, embedding, wte, wpe
    _check_step(*tensors)
    logits, wte, wpe = logits.detach(), *(None if tensor is None else tensor.detach() for tensor in (wte, wpe))
    arguments = logits, settings, streams, position, tokens, logprobs, embedding, wte, wpe
    given = [tensor for tensor in arguments if tensor is not None]
    if covered(logits, wte) and dispatch.use_kernel("sample_step", *given):
        run = _sample_step if dispatch.is_plain(*given) else torch.ops.igpt_fast.sample_step
        run(*arguments)
    elif not settings.is_meta and not isinstance(settings, FakeTensor):  # else there is nothing to read, nor to write
        reference.sample_step(*arguments)


def _check_step(
    logits: Tensor,
    settings: Tensor,
    streams: Tensor,
    position: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    embedding: Tensor | None,
    wte: Tensor | None,
    wpe: Tensor | None,
) -> None:
    op = "sample_step"
    check_logits(op, logits)
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.shape[0] != logits.shape[0]:
        got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"{op}: tokens is {got}; want (N, T) with N = {logits.shape[0]}")
    n = (logits.shape[0],)
    operands: dict[str, tuple[Tensor, torch.dtype, tuple[int, ...]]] = {"settings": (settings, torch.int64, (7,))}
    operands |= {"streams": (streams, torch.int64, n), "position": (position, torch.int32, n)}
    operands |= {"tokens": (tokens, torch.int64, tokens.shape), "logprobs": (logprobs, torch.float32, tokens.shape)}
    if len({tensor is None for tensor in (embedding, wte, wpe)}) > 1:
        raise ValueError(f"{op}: of embedding, wte and wpe some are None; give all or none")
    if embedding is not None and wte is not None and wpe is not None:
        check_tables(op, logits, wte, wpe)
        operands["embedding"] = embedding, wte.dtype, (*n, wte.shape[1])
    for name, (tensor, dtype, shape) in operands.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} is {type(tensor).__name__}; want a tensor")
        dispatch.check_operand(op, name, tensor, logits, dtype, shape)
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} has strides {tensor.stride()}; want a contiguous tensor")


def _sample_step(
    logits: Tensor,
    settings: Tensor,
    streams: Tensor,
    position: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    embedding: Tensor | None,
    wte: Tensor | None,
    wpe: Tensor | None,
) -> None:
    if embedding is not None and embedding.data_ptr() % 16:
        raise ValueError(f"sample_step: embedding begins at {embedding.data_ptr():#x}; want a multiple of 16 bytes")
    wte, wpe = dispatch.dense(wte), dispatch.dense(wpe)
    launch(
        "sample_step",
        logits,
        (tokens.data_ptr(), logprobs.data_ptr(), tokens.shape[1]),
        settings=settings.data_ptr(),
        streams=streams.data_ptr(),
        position=(position.data_ptr(), 1, True),
        embedding=embedding_of(embedding, wte, wpe),
    )


def _check_launch_step(logits: Tensor, *others: Any) -> None:
    _check_step(logits, *others)
    dispatch.check_covered("sample_step", covered(logits, others[-2]), logits)


dispatch.register(
    "sample_step(Tensor logits, Tensor settings, Tensor streams, Tensor(a!) position, Tensor(b!) tokens, Tensor(c!)"
    " logprobs, Tensor(d!)? embedding, Tensor? wte, Tensor? wpe) -> ()",
    _sample_step,
    lambda *_: None,
    check=_check_launch_step,
)
