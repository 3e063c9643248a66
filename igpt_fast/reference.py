"""The specification: one plain-PyTorch function per op.

Each function is the definition that the C++ and CUDA twins are tested against (evaluated in float64) and the fallback
where no twin applies. They aim at being read; ``igpt_fast.ops`` adds checks and dispatch, and what is said there of
shapes, dtypes and sources is not said again here.
"""

from __future__ import annotations

import math
import struct

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_TEMPERATURE = 2.0**-149  # float32's; what is below it is 0, the likeliest
MAX_TEMPERATURE = torch.finfo(torch.float32).max  # sampling divides in fp32
LARGEST_E4M3 = 448.0
# Devices that have no float64, or may have none: what is defined in it is computed on the CPU for their tensors.
WITHOUT_FLOAT64 = {"mps", "xpu"}


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Norms, softmax and losses keep their statistics in fp32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x * rsqrt(mean(x^2) + eps) * weight`` over the last dimension; iGPT's norm, not mean-centred.

    The statistics and the product are in fp32 and rounded once, so an fp16 input of magnitude 300 does not
    overflow as it does in transformers.

    Source: openai/image-gpt src/model.py ``norm``; transformers ``ImageGPTLayerNorm``.
    """
    wide = x.to(_statistics_dtype(x.dtype))
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """``(x - mean(x)) * rsqrt(var(x) + eps) * weight + bias`` over the last dimension.

    The variance is the mean of the squares, not that over n - 1. In fp32 and rounded once, as ``rms_norm``.

    Source: "Layer Normalization" (Ba, Kiros & Hinton, 2016).
    """
    wide = x.to(_statistics_dtype(x.dtype))
    centred = wide - wide.mean(dim=-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    out = centred * scale * weight.to(wide.dtype)
    return (out if bias is None else out + bias.to(wide.dtype)).to(x.dtype)


def quick_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``z * sigmoid(1.702 z)`` of ``z = x + bias``. Source: openai/image-gpt src/model.py ``gelu``."""
    z = x if bias is None else x + bias
    return (z * torch.sigmoid(1.702 * z)).to(x.dtype)


def gelu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``0.5 z (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3)))``, ``z = x + bias``. Source: Hendrycks & Gimpel, 2016."""
    z = x if bias is None else x + bias
    return (0.5 * z * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z.pow(3))))).to(x.dtype)


def gelu_erf(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``0.5 z (1 + erf(z / sqrt(2)))`` of ``z = x + bias``. Source: Hendrycks & Gimpel, 2016."""
    z = x if bias is None else x + bias
    return (0.5 * z * (1.0 + torch.erf(z / math.sqrt(2.0)))).to(x.dtype)


def laplace(x: Tensor) -> Tensor:
    """``0.5 (1 + erf((x - mu) / (sigma sqrt(2))))``, a bounded ``relu2``. Source: Mega (Ma et al., 2022)."""
    mu, sigma = 0.707107, 0.282095  # sqrt(1/2) and sqrt(1/(4 pi)), to the digits that transformers has
    return 0.5 * (1.0 + torch.erf((x - mu) / (sigma * math.sqrt(2.0))))


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """``-log softmax(logits)[label]`` in nats over the last dimension, in fp32 at least; see ``ops.cross_entropy``."""
    rows = logits.to(_statistics_dtype(logits.dtype)).reshape(-1, logits.shape[-1])
    loss = F.cross_entropy(rows, labels.reshape(-1), ignore_index=ignore_index, reduction=reduction)
    return loss.reshape(labels.shape) if reduction == "none" else loss


def visible_keys(t_q: int, t_k: int, key_mask: Tensor | None, device: torch.device) -> Tensor:
    """Which key each query may see: (T_q, T_k), or (B, 1, T_q, T_k) with a ``key_mask`` of (B, T_k).

    The queries are the last ``t_q`` of ``t_k`` positions, as in a prefill behind a cache.
    """
    causal = torch.ones(t_q, t_k, dtype=torch.bool, device=device).tril(t_k - t_q)
    return causal if key_mask is None else causal & key_mask[:, None, None, :]


def mask_keys(k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Zeros in place of the masked keys and values: a weight of 0 does not silence a NaN."""
    if key_mask is None:
        return k, v
    hidden = ~key_mask[:, None, :, None]
    return k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)


def shown_keys(starts: Tensor, t_k: int, key_mask: Tensor | None) -> Tensor:
    """The ``key_mask``, (B, T_k) bool, that hides all keys before ``starts``, (B,) integer, as well."""
    shown = torch.arange(t_k, device=starts.device) >= starts[:, None]
    return shown if key_mask is None else shown & key_mask


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    upcast: bool = False,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T + causal mask) v``, and the softmax itself (after dropout, as transformers has it).

    Shapes, masks and source: ``ops.causal_attention``. The softmax is in fp32; ``upcast`` computes the scores in fp32
    as well.
    """
    if starts is not None:
        key_mask = shown_keys(starts, k.shape[-2], key_mask)
    k, v = mask_keys(k, v, key_mask)
    visible = visible_keys(q.shape[-2], k.shape[-2], key_mask, q.device)
    return _attention(q, k, v, scale, visible, dropout_p, upcast)


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    upcast: bool = False,
) -> tuple[Tensor, Tensor]:
    """``causal_attention`` without the causal mask: every query sees all keys but those that ``key_mask`` hides."""
    k, v = mask_keys(k, v, key_mask)
    visible = torch.ones((), dtype=torch.bool, device=q.device) if key_mask is None else key_mask[:, None, None, :]
    return _attention(q, k, v, scale, visible, dropout_p, upcast)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor, dropout_p: float, upcast: bool
) -> tuple[Tensor, Tensor]:
    wide = _statistics_dtype(q.dtype)
    if upcast:
        with torch.autocast(q.device.type, enabled=False):
            scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    else:
        scores = (q @ k.transpose(-1, -2)).to(wide) * scale
    scores = scores.to(wide).masked_fill(~visible, torch.finfo(wide).min)
    weights = (torch.softmax(scores, dim=-1) * visible).to(v.dtype)
    weights = F.dropout(weights, dropout_p, training=dropout_p > 0.0)
    return weights @ v, weights


def quantize_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in 8 bits, (..., D) float8_e4m3fn, and their float32 scales, (...,): ``x`` is about codes times scales.

    The scale is that of the largest element, ``max |x| / 448``; codes are those of ``x / scale``, to nearest, ties to
    even, no larger than 448, and 0 where all elements are 0. A NaN or an infinity in ``x`` makes its scale and all its
    codes NaN, so that it is not lost.

    Source: OCP 8-bit Floating Point Specification, E4M3.
    """
    wide = x.to(torch.float32)
    largest = wide.abs().amax(dim=-1)
    # By a tensor: on a GPU torch multiplies by the inverse of a Python number.
    scales = (largest / torch.full_like(largest, LARGEST_E4M3)).masked_fill(~largest.isfinite(), math.nan)
    each = scales[..., None]
    codes = (wide / each).clamp(-LARGEST_E4M3, LARGEST_E4M3)
    codes = codes.masked_fill(each == 0.0, 0.0).masked_fill(each.isnan(), math.nan)
    return codes.to(torch.float8_e4m3fn), scales


def dequantize_e4m3(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``quantize_e4m3`` has kept, in a dtype."""
    wide = _statistics_dtype(dtype)
    return (codes.to(wide) * scales[..., None].to(wide)).to(dtype)


# Their names from when values alone were kept so.
quantize_values, dequantize_values = quantize_e4m3, dequantize_e4m3


def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    scale: float,
    starts: Tensor | None = None,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
) -> Tensor:
    """``causal_attention`` of one new position of each row, whose key and value go into its cache at ``position``.

    Shapes, dtypes and which keys a row sees: ``ops.attention_decode``. Nothing depends on a value on the host, so the
    work is that of a full cache. With v_scale the values are those of the cache, the new one's among them; with k_scale
    the keys are as well.
    """
    rows, _, t_max, _ = k_cache.shape
    place = position.reshape(-1).long().expand(rows)
    keys, values = (
        _with_new(cache, scales, new, place, q.dtype)
        for cache, scales, new in ((k_cache, k_scale, k), (v_cache, v_scale, v))
    )
    before = 0
    if prefix_k is not None and prefix_v is not None:
        before = prefix_k.shape[2]
        group = rows // max(prefix_k.shape[0], 1)
        keys = torch.cat([prefix_k.repeat_interleave(group, dim=0), keys], dim=2)
        values = torch.cat([prefix_v.repeat_interleave(group, dim=0), values], dim=2)
    key = torch.arange(before + t_max, device=q.device)
    visible = key <= before + place[:, None]
    if starts is not None:
        visible = visible & (key >= starts[:, None])
    out, _ = causal_attention(q[:, :, None], keys, values, scale, visible)
    inside = (place >= 0) & (place < t_max)
    return out[:, :, 0].masked_fill(~inside[:, None, None], math.nan)


def _with_new(cache: Tensor, scales: Tensor | None, new: Tensor, place: Tensor, dtype: torch.dtype) -> Tensor:
    """Writes each row's new key or value at its place, if that is within the cache; returns what is cached then."""
    t_max = cache.shape[2]
    inside = ((place >= 0) & (place < t_max))[:, None, None]
    row, column = torch.arange(len(place), device=cache.device), place.clamp(0, t_max - 1)
    if scales is None:
        cache[row, :, column] = torch.where(inside, new, cache[row, :, column])
        return cache
    new, scale_of_new = quantize_e4m3(new)
    codes = cache.view(torch.uint8)  # torch does not select among float8
    codes[row, :, column] = torch.where(inside, new.view(torch.uint8), codes[row, :, column])
    scales[row, :, column] = torch.where(inside[..., 0], scale_of_new, scales[row, :, column])
    return dequantize_e4m3(cache, scales, dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight + bias``, as one product of matrices; see ``ops.linear``."""
    rows = x.reshape(-1, x.shape[-1])  # (rows, n_in)
    y = rows @ weight if bias is None else torch.addmm(bias, rows, weight)  # (rows, n_out)
    return y.view(*x.shape[:-1], weight.shape[1])


def gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(rms_norm(x) @ weight + bias) + residual``, each part rounded to the dtype; see ``ops.gemv``."""
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps)
    y = F.linear(x, weight.transpose(0, 1), bias)
    if activation is not None:
        y = {"quick_gelu": quick_gelu, "gelu_tanh": gelu_tanh, "gelu_erf": gelu_erf}[activation](y)
    return y if residual is None else y + residual


def quantize(x: Tensor, clusters: Tensor) -> Tensor:
    """Index of the nearest cluster: ``argmin_k sum_c (x_c - clusters_kc)^2``, the lowest index on ties.

    See ``ops.quantize``; a float dtype is evaluated in itself. Runs over the clusters, so that no (N, K) intermediate
    exists. transformers expands ``a^2 - 2ab + b^2`` instead, which rounds differently near ties.
    """
    if x.dtype == torch.uint8 and x.device.type in WITHOUT_FLOAT64:
        return quantize(x.cpu(), clusters.cpu()).to(x.device)
    if x.dtype == torch.uint8:
        x = x.double() / 127.5 - 1.0
    best = torch.full(x.shape[:-1], torch.inf, dtype=x.dtype, device=x.device)
    index = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
    for k, cluster in enumerate(clusters.to(x.dtype)):
        r, g, b = (x - cluster).square().unbind(-1)
        distance = (r + g) + b
        nearer = distance < best
        best = torch.where(nearer, distance, best)
        index = torch.where(nearer, k, index)
    return index


def dequantize(tokens: Tensor, clusters: Tensor) -> Tensor:
    """Colours of the tokens: ``rint(127.5 (clusters[token] + 1))`` clipped to 0..255; see ``ops.dequantize``."""
    palette = torch.round(127.5 * (clusters.to(torch.float32) + 1.0)).clamp(0, 255).to(torch.uint8)
    return palette[tokens.long()]


def philox(counter: Tensor, key: int) -> Tensor:
    """Philox4x32-10: four random 32-bit words for a counter of four 32-bit words under a 64-bit key.

    counter: (..., 4) int64, each in 0..2^32-1. Returns (..., 4) int64 in the same range. A counter-based generator
    has no state: any device, thread or batch that asks for the same counter gets the same words.

    Source: "Parallel Random Numbers: As Easy as 1, 2, 3" (Salmon et al., 2011), table 2 and section 3.3.
    """
    low = 0xFFFFFFFF

    def multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
        """High and low word of a 64-bit product, by halves of 16 bits since int64 holds 63."""
        bottom = (word & 0xFFFF) * factor
        upper = (word >> 16) * factor + (bottom >> 16)
        return upper >> 16, ((upper & 0xFFFF) << 16) | (bottom & 0xFFFF)

    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key & low, (key >> 32) & low
    for _ in range(10):
        high0, low0 = multiply(c0, 0xD2511F53)
        high1, low1 = multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack([c0, c1, c2, c3], dim=-1)


def uniform(seed: int, streams: Tensor, first: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1) for positions ``first .. first + count - 1`` of each image's stream.

    streams: (N,) int64, not negative. Returns (N, count) float32, multiples of 2^-24. Number (i, t) depends on the
    seed, ``streams[i]`` and the position alone. Counter: (position, 0, low and high word of the stream).
    """
    return uniform_at(seed, streams[:, None], torch.arange(first, first + count, device=streams.device))


def uniform_at(seed: int, streams: Tensor, positions: Tensor) -> Tensor:
    """``uniform`` for integer tensors of streams and positions, which are broadcast."""
    stream, position = torch.broadcast_tensors(streams, positions.to(torch.int64))
    counter = torch.stack([position, torch.zeros_like(position), stream & 0xFFFFFFFF, stream >> 32], dim=-1)
    return (philox(counter, seed)[..., 0] >> 8).to(torch.float32) * 2.0**-24


def least_score(min_p: float | None) -> float:
    """log(min_p), which is compared as a float32: a token stays whose score, at most 0, is not below. -inf for all."""
    return math.log(min_p) if min_p else -math.inf


def sample(
    logits: Tensor,
    uniform: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Draws a token of each row by inverting the cumulative distribution, in the order of the ids.

    logits: (N, K) floating point; uniform: (N,) in [0, 1). Returns (N,) int64: the first id at which the cumulative
    weight exceeds ``uniform`` times the total. ``temperature`` 0, or one below the least float32, takes the largest
    logit, the lowest id on ties, and the first NaN before all numbers.
    ``top_k`` keeps the logits that are not below the k-th largest; ``top_p`` then the shortest run, from the most
    likely down (the lower id first on ties), whose probability among those reaches ``top_p``; ``min_p`` of these the
    tokens whose probability is at least ``min_p`` times the largest one's, which is a matter of their scores alone
    (``least_score``) and so not of the other two. What is left is drawn in proportion to its weight. Weights are in
    fp32 and their sums in fp64, so that the order of summation does not decide a draw. A row that has a NaN, an
    infinity, or nothing but minus infinity has no distribution: its token is 0 (at temperature 0 it is as any other).

    Source: temperature, top-k, top-p and min-p as transformers' logits processors define them, in that order; min-p:
    "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs" (Nguyen et al., 2024).
    """
    return _draw(logits, uniform, temperature, top_k, top_p, least_score(min_p))


def _draw(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float | None, min_score: float
) -> Tensor:
    if logits.device.type in WITHOUT_FLOAT64:
        drawn = _draw(logits.cpu(), uniform.cpu(), temperature, top_k, top_p, min_score)
        return drawn.to(logits.device)
    if temperature < LEAST_TEMPERATURE:
        return logits.to(torch.float32).argmax(dim=-1)
    return inverted(cumulative_weights(logits, temperature, top_k, top_p, min_score), uniform)


def cumulative_weights(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, min_score: float
) -> Tensor:
    """(N, K) float64: what ``sample`` inverts, at a temperature above 0."""
    scores = logits.to(torch.float32)
    # At most 0, so that no temperature overflows; one of infinity would make NaN of a token that has -inf.
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / min(temperature, MAX_TEMPERATURE)
    if top_k is not None and top_k < scores.shape[-1]:
        smallest = scores.topk(top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, -math.inf)
    weights = torch.exp(scores).to(torch.float64)
    if top_p is not None and top_p < 1.0:
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        kept = before < top_p * ordered.sum(dim=-1, keepdim=True)
        weights = weights * torch.zeros_like(kept).scatter(-1, order, kept)
    if min_score > -math.inf:
        weights = weights.masked_fill(scores < min_score, 0.0)
    return weights.cumsum(dim=-1)


def inverted(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """(N,) int64: where the (N, K) cumulative weights exceed the (N,) numbers times their totals."""
    drawn = (cumulative <= uniform[:, None].to(torch.float64) * cumulative[:, -1:]).sum(dim=-1)
    return drawn.clamp(max=cumulative.shape[-1] - 1)


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
    """``sample`` with the uniform numbers of ``uniform``, and the input of the step that reads the drawn tokens.

    Shapes and dtypes: ``ops.sample_next``. SOS stands before the image, so token t is read at position t + 1. Zeros
    where wpe has no such row, behind the last token that is ever read.
    """
    tokens = sample(logits, uniform_at(seed, streams, position), temperature, top_k, top_p, min_p)
    return tokens, None if wte is None or wpe is None else _next_input(tokens, position, wte, wpe)


def _next_input(tokens: Tensor, position: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    following = position.to(torch.int64).expand(tokens.shape) + 1
    inside = (following >= 0) & (following < wpe.shape[0])
    hidden = F.embedding(tokens, wte) + F.embedding(following.clamp(0, wpe.shape[0] - 1), wpe)
    return hidden.masked_fill(~inside[:, None], 0.0)


def sample_settings(
    seed: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    offset: int = 0,
    first: int = 0,
) -> Tensor:
    """What ``sample_step`` reads, (7,) int64: the seed's bits; those of float64 top_p, 1 for none, temperature, and
    ``least_score`` of min_p; top_k, 0 for none; offset; first.
    """
    least = 0.0 if temperature < LEAST_TEMPERATURE else min(temperature, MAX_TEMPERATURE)
    numbers = struct.pack("=Q3d", seed, 1.0 if top_p is None else top_p, least, least_score(min_p))
    return torch.tensor([*struct.unpack("=4q", numbers), min(top_k or 0, 1 << 30), offset, first], device="cpu")


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
    """``sample_next`` in place, by ``sample_settings``; shapes and dtypes: ``ops.sample_step``.

    ``position + offset`` is the index of each row's token. The token and its log-probability under the logits as they
    are, before temperature and filters, go into column ``index - first`` of (N, T) tokens and logprobs, where there is
    one, the next input into ``embedding``; then 1 is added to ``position``.
    """
    settings = settings.cpu()
    seed, top_k, offset, first = (int(settings[i]) for i in (0, 4, 5, 6))
    top_p, temperature, min_score = settings[1:4].view(torch.float64).tolist()
    index = position.to(torch.int64) + offset
    uniform = uniform_at(seed % (1 << 64), streams, index)
    drawn = _draw(logits, uniform, temperature, top_k or None, top_p, min_score)
    column = index - first
    rows = torch.where((column >= 0) & (column < tokens.shape[1]))[0]
    tokens[rows, column[rows]] = drawn[rows]
    every = torch.log_softmax(logits.to(torch.float32), dim=-1)
    logprobs[rows, column[rows]] = every[rows, drawn[rows]]
    if embedding is not None and wte is not None and wpe is not None:
        embedding.copy_(_next_input(drawn, index, wte, wpe))
    position += 1
