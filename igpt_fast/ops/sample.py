"""Drawing tokens from logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.backend import OPS, Op
from igpt_fast.checks import whole_number
from igpt_fast.draws import Sampling
from igpt_fast.ops import dispatch

OPS["sample"] = Op(
    ("cuda", "cpu"),
    "logits fp32, bf16, fp16; 1,024 tokens at most; fp32 numbers",
    covers_cpu="logits fp32, bf16, fp16; fp32 numbers",
)
OPS["sample_next"] = Op(("cuda",), "logits and embeddings fp32, bf16, fp16; 1,024 tokens at most")


def sample(
    logits: Tensor,
    uniform: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Draws a token of each row: temperature, top-k, top-p, min-p, then the inverse of the cumulative distribution.

    A row's token depends on nothing but the row and its number. The kernel's tokens are the definition's but where
    ``uniform`` times the total lies within the rounding of the exponential of a boundary.

    Args:
        logits: (N, K), floating point. A row with a NaN or an infinity gives token 0, unless ``temperature`` is 0.
        uniform: (N,) float32 in [0, 1), on the device of ``logits``; see ``reference.uniform``.
        temperature, top_k, top_p, min_p: See ``Sampling``; ties are decided as ``reference.sample`` has it.

    Returns:
        (N,) int64. Not differentiable. Bytes: the logits, once.

    Raises:
        ValueError: Shapes that do not fit, or a setting out of its range.
        BackendUnavailableError: The chosen backend does not serve the device.

    Source: see ``reference.sample``.
    """
    return draw(logits, uniform, Sampling(temperature, top_k, top_p, min_p))


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """``sample`` with its settings as one, which are checked already."""
    _check_draw(logits, uniform)
    logits, uniform = logits.detach(), uniform.detach()
    if _covered_draw(logits, uniform) and dispatch.kernel_kind("sample", logits, uniform) is not None:
        op = _sample if dispatch.is_plain(logits, uniform) else torch.ops.igpt_fast.sample
        return op(logits, uniform, *sampling_numbers(sampling))
    return reference.sample(logits, uniform, **sampling.keywords())


def draw_scored(
    logits: Tensor, uniform: Tensor, sampling: Sampling, known: Tensor | None = None, *, weighted: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``draw``, what it thinks of the tokens, and what it drew them from. Nothing of it is differentiable.

    Args:
        logits, uniform, sampling: As of ``draw``.
        known: (N,) int64: tokens that are given, which are taken in place of drawn ones; below 0 where one is drawn.
        weighted: Whether the weights are wanted.

    Returns:
        tokens: (N,) int64.
        logprobs: (N,) float32, ``log_softmax`` of the logits as they are, before temperature and filters, at the token.
        weights: (N, K) float64, the cumulative weights: a row's token is the first id at which they exceed its number
            times their total, or 0 where they are NaN; ``None`` if they are not wanted, and at temperature 0.

    Raises:
        ValueError: Shapes that do not fit, or ``known`` of another dtype or device.
    """
    _check_draw(logits, uniform, known)
    weighted = weighted and sampling.temperature >= reference.LEAST_TEMPERATURE
    tensors = (logits, uniform) if known is None else (logits, uniform, known)
    served = logits.is_cpu and dispatch.is_plain(*tensors) and _covered_draw(logits, uniform)
    if served and dispatch.kernel_kind("sample", *tensors) == "cpu":
        return _launch_cpu(logits, uniform, sampling_numbers(sampling), known, scored=True, weighted=weighted)
    tokens = draw(logits, uniform, sampling)
    if known is not None:
        tokens = torch.where(known >= 0, known, tokens)
    logprobs = torch.log_softmax(logits.float(), dim=-1).gather(1, tokens[:, None])[:, 0]
    if not weighted:
        return tokens, logprobs, None
    least = reference.least_score(sampling.min_p)
    weights = reference.cumulative_weights(logits, sampling.temperature, sampling.top_k, sampling.top_p, least)
    return tokens, logprobs, weights


def sample_next(
    logits: Tensor,
    seed: int,
    streams: Tensor,
    position: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    wte: Tensor | None = None,
    wpe: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``sample`` with numbers of its own, and the input of the step that reads the drawn tokens, in one launch.

    The number of row i is ``reference.uniform(seed, streams[i], position, 1)``: it depends on the seed, the image and
    the position alone, so the images do not depend on the batch, but for the rounding of the logits, which the model's
    kernels choose by its size. ``position`` and ``streams`` are read on the device
    and nothing waits for the host: a captured CUDA graph draws the next token when it is replayed with another
    ``position`` in the same memory. The other settings are the graph's.

    Args:
        logits: (N, K), floating point; as for ``sample``.
        seed: In 0..2^64-1.
        streams: (N,) int64 on the device of ``logits``, not negative: the number of each row's image.
        position: (N,), or () or (1,) for all rows, int32 on the device of ``logits``, not negative: the index of the
            drawn token in its image. The first colour after SOS has index 0.
        temperature, top_k, top_p, min_p: As for ``sample``.
        wte: (V, n_embd), V >= K: the embeddings of the tokens. ``None``: no input is made.
        wpe: (n_positions, n_embd), of the dtype of ``wte``: the embeddings of the positions.

    Returns:
        (N,) int64 tokens, and with ``wte`` and ``wpe`` the (N, n_embd) sum ``wte[token] + wpe[position + 1]`` in their
        dtype, which is what ``ImageGPTModel`` feeds its first block (SOS stands at position 0); zeros where there is no
        position ``position + 1``. Else ``None``. Not differentiable. Bytes: the logits, and 3 times the input.

    Raises:
        TypeError: Another dtype.
        ValueError: Shapes that do not fit, ``wte`` or ``wpe`` alone, two devices, or a setting out of its range.
        BackendUnavailableError: The chosen backend does not serve the device.

    Source: see ``reference.sample_next``.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p)
    _check_next(logits, seed, streams, position, wte, wpe)
    logits = logits.detach()
    wte, wpe = None if wte is None else wte.detach(), None if wpe is None else wpe.detach()
    tensors = [tensor for tensor in (logits, streams, position, wte, wpe) if tensor is not None]
    if covered(logits, wte) and dispatch.use_kernel("sample_next", *tensors):
        op = _sample_next if dispatch.is_plain(*tensors) else torch.ops.igpt_fast.sample_next
        # The registry's integers are signed.
        signed = seed - (1 << 64) if seed >> 63 else seed
        tokens, embedding = op(logits, signed, streams, position, *sampling_numbers(sampling), wte, wpe)
        return tokens, None if wte is None else embedding
    return reference.sample_next(logits, seed, streams, position, **sampling.keywords(), wte=wte, wpe=wpe)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> None:
    """Raises ValueError unless the settings are ones that ``sample`` takes."""
    Sampling(temperature, top_k, top_p, min_p)


def _check_draw(logits: Tensor, uniform: Tensor, known: Tensor | None = None) -> None:
    if logits.ndim != 2 or uniform.shape != logits.shape[:1]:
        shapes = f"{tuple(logits.shape)}, {tuple(uniform.shape)}"
        raise ValueError(f"sample: logits and uniform have shapes {shapes}; want (N, K) and (N,)")
    if known is not None:
        wanted = logits.shape[:1], torch.int64, logits.device
        if (known.shape, known.dtype, known.device) != wanted:
            got = f"{tuple(known.shape)} {known.dtype} on {known.device}"
            raise ValueError(f"sample: known is {got}; want ({len(logits)},) int64 on {logits.device}")


def _check_next(
    logits: Tensor, seed: int, streams: Tensor, position: Tensor, wte: Tensor | None, wpe: Tensor | None
) -> None:
    op = "sample_next"
    check_logits(op, logits)
    whole_number(f"{op}: seed", seed, 0, (1 << 64) - 1)
    for name, tensor, dtype in (("streams", streams, torch.int64), ("position", position, torch.int32)):
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{op}: {name} is {got}; want an {str(dtype).removeprefix('torch.')} tensor")
        if tensor.device != logits.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, logits on {logits.device}; want one device")
    n = logits.shape[0]
    if streams.shape != (n,):
        raise ValueError(f"{op}: streams has shape {tuple(streams.shape)}; want (N,) = {(n,)}")
    if position.shape not in ((), (1,), (n,)):
        raise ValueError(f"{op}: position has shape {tuple(position.shape)}; want (N,) = {(n,)}, (1,) or ()")
    if (wte is None) != (wpe is None):
        raise ValueError(f"{op}: {'wte' if wte is None else 'wpe'} is None; give both or neither")
    if wte is not None and wpe is not None:
        check_tables(op, logits, wte, wpe)


def check_logits(op: str, logits: Tensor) -> None:
    dispatch.check_floating(op, logits=logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"{op}: logits has shape {tuple(logits.shape)}; want (N, K) with K >= 1")


def check_tables(op: str, logits: Tensor, wte: Tensor, wpe: Tensor) -> None:
    dispatch.check_floating(op, logits=logits, wte=wte, wpe=wpe)
    if wte.dtype != wpe.dtype:
        raise TypeError(f"{op}: wte is {wte.dtype}, wpe {wpe.dtype}; want one dtype")
    if wte.ndim != 2 or wte.shape[0] < logits.shape[1]:
        raise ValueError(f"{op}: wte has shape {tuple(wte.shape)}; want (V, n_embd) with V >= {logits.shape[1]}")
    if wpe.ndim != 2 or wpe.shape[1] != wte.shape[1] or wpe.shape[0] < 1:
        raise ValueError(f"{op}: wpe has shape {tuple(wpe.shape)}; want (n_positions, {wte.shape[1]})")


def covered(logits: Tensor, wte: Tensor | None = None) -> bool:
    """Whether the kernel takes it; the rule is in ``OPS`` in words."""
    known = logits.dtype in dispatch.DTYPES and (wte is None or wte.dtype in dispatch.DTYPES)
    return known and 1 <= logits.shape[1] <= 1024


def _covered_draw(logits: Tensor, uniform: Tensor) -> bool:
    """As ``_covered``; there is no bound of tokens on the CPU."""
    if uniform.dtype != torch.float32 or uniform.device != logits.device or logits.dtype not in dispatch.DTYPES:
        return False
    return logits.shape[1] >= 1 and (logits.shape[1] <= 1024 or dispatch.native_kind(logits) == "cpu")


def sampling_numbers(sampling: Sampling) -> tuple[float, int, float, float]:
    """As the kernel takes them: 0, 1.0 and minus infinity keep all."""
    temperature = sampling.temperature
    temperature = 0.0 if temperature < reference.LEAST_TEMPERATURE else min(temperature, reference.MAX_TEMPERATURE)
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    return temperature, min(sampling.top_k or 0, 1 << 30), top_p, reference.least_score(sampling.min_p)


def _rows(logits: Tensor) -> Tensor:
    """Rows may stand at any distance from each other: the last positions of (N, T, K) logits are not copied."""
    return logits if logits.stride(1) == 1 and logits.stride(0) >= 0 else logits.contiguous()


def launch(
    op: str,
    logits: Tensor,
    tokens: tuple[int, int, int],
    numbers: tuple[float, int, float, float] = (1.0, 0, 1.0, -math.inf),
    uniform: int = 0,
    seed: int = 0,
    settings: int = 0,
    streams: int = 0,
    position: tuple[int, int, bool] = (0, 0, False),
    embedding: tuple[int, ...] = (0,) * 6,
) -> None:
    """Launches the kernel of the three ops."""
    kernels, logits = dispatch.native_kernels(op, logits), _rows(logits)
    temperature, top_k, top_p, min_score = numbers
    kernels.module.sample_cuda(
        logits=(logits.data_ptr(), logits.stride(0)),
        uniform=uniform,
        seed=seed,
        settings=settings,
        streams=streams,
        position=position,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_score=min_score,
        tokens=tokens,
        embedding=embedding,
        rows=logits.shape[0],
        k=logits.shape[1],
        dtype=dispatch.DTYPES[logits.dtype],
        # The others may have made copies that the kernel would read before it waits.
        dependent=kernels.dependent if settings else 0,
        place=kernels.place,
    )


def _launch_cpu(
    logits: Tensor,
    uniform: Tensor,
    numbers: tuple[float, int, float, float],
    known: Tensor | None = None,
    scored: bool = False,
    weighted: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, and log-probabilities and cumulative weights where they are asked for, of the compiled module."""
    n, k = logits.shape
    kernels, logits = dispatch.native_kernels("sample", logits), _rows(logits.float())
    uniform, known = uniform.contiguous(), None if known is None else known.contiguous()
    tokens = torch.empty(n, dtype=torch.int64, device="cpu")
    logprobs = torch.empty(n if scored else 0, dtype=torch.float32, device="cpu")
    weights = torch.empty(n, k, dtype=torch.float64, device="cpu") if weighted else None
    temperature, top_k, top_p, min_score = numbers
    kernels.module.sample_cpu(
        logits=(logits.data_ptr(), logits.stride(0)),
        uniform=uniform.data_ptr(),
        known=dispatch.address(known),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_score=min_score,
        tokens=tokens.data_ptr(),
        logprobs=logprobs.data_ptr() if scored else 0,
        cumulative=dispatch.address(weights),
        rows=n,
        k=k,
        place=kernels.place,
    )
    return tokens, logprobs, weights


def _sample(logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float, min_score: float) -> Tensor:
    if dispatch.native_kind(logits) == "cpu":
        return _launch_cpu(logits, uniform, (temperature, top_k, top_p, min_score))[0]
    uniform, tokens = uniform.contiguous(), _fake_sample(logits)
    launch("sample", logits, (tokens.data_ptr(), 0, 1), (temperature, top_k, top_p, min_score), uniform.data_ptr())
    return tokens


def _sample_next(
    logits: Tensor,
    seed: int,
    streams: Tensor,
    position: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_score: float,
    wte: Tensor | None,
    wpe: Tensor | None,
) -> tuple[Tensor, Tensor]:
    streams, position, tokens = streams.contiguous(), position.contiguous(), _fake_sample(logits)
    wte, wpe = dispatch.dense(wte), dispatch.dense(wpe)
    embedding = _fake_embedding(logits, wte)
    launch(
        "sample_next",
        logits,
        (tokens.data_ptr(), 0, 1),
        (temperature, top_k, top_p, min_score),
        seed=seed % (1 << 64),
        streams=streams.data_ptr(),
        # The number of rows says whether a position is one row's or all rows'.
        position=(position.data_ptr(), int(1 < position.numel() == len(logits)), False),
        embedding=embedding_of(embedding, wte, wpe),
    )
    return tokens, embedding


def embedding_of(embedding: Tensor | None, wte: Tensor | None, wpe: Tensor | None) -> tuple[int, ...]:
    """As the launcher takes the three."""
    if embedding is None or wte is None or wpe is None or embedding.numel() == 0:
        return (0,) * 6
    return *map(dispatch.address, (embedding, wte, wpe)), dispatch.DTYPES[wte.dtype], wte.shape[1], wpe.shape[0]


def _check_launch(logits: Tensor, uniform: Tensor, *_: Any) -> None:
    dispatch.check_covered("sample", logits.ndim == 2 and _covered_draw(logits, uniform), logits)
    dispatch.check_operand("sample", "uniform", uniform, logits, torch.float32, logits.shape[:1])


def _check_launch_next(logits: Tensor, _seed: int, streams: Tensor, position: Tensor, *others: Any) -> None:
    *_, wte, wpe = others
    _check_next(logits, 0, streams, position, wte, wpe)
    dispatch.check_covered("sample_next", covered(logits, wte), logits)


def _fake_sample(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)


def _fake_embedding(logits: Tensor, wte: Tensor | None) -> Tensor:
    return logits.new_empty(0) if wte is None else wte.new_empty((len(logits), wte.shape[1]))


def _fake_sample_next(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _fake_sample(logits), _fake_embedding(logits, others[-2])


dispatch.register(
    "sample(Tensor logits, Tensor uniform, float temperature, int top_k, float top_p, float min_score) -> Tensor",
    _sample,
    _fake_sample,
    check=_check_launch,
)
dispatch.register(
    "sample_next(Tensor logits, int seed, Tensor streams, Tensor position, float temperature, int top_k, float top_p,"
    " float min_score, Tensor? wte, Tensor? wpe) -> (Tensor, Tensor)",
    _sample_next,
    _fake_sample_next,
    check=_check_launch_next,
)
