"""Decoding on the CPU against its peers: milliseconds a token, and a whole image.

    python benchmarks/bench_generate.py --json benchmarks/results/generate.json

iGPT-S with seeded weights. Peers: transformers' cached step, what an expert writes in plain PyTorch (SDPA on a static
cache), eager and under torch.compile, and this project's own PyTorch model. Every candidate's logits are checked first,
against transformers in float32. ``of_read`` is the time in which the same number of bytes, weights and cache, streams
through the processor, measured in turn with the candidates, over the candidate's time: 1 is the limit at batch 1.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling, backend
from igpt_fast.decoders import CpuDecoder, TorchDecoder
from igpt_fast.generation import Sampling, decode

COLUMNS = ("work", "batch", "position", "dtype", "threads", "name", "ms", "ms_spread", "cpu_ms", "times_hf", "of_read")
COLUMNS += ("error",)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Relative root-mean-square error of logits that still counts as the same computation.
ERRORS = {"float32": 1e-4, "bfloat16": 3e-2, "int8": 5e-2}


class Candidate(Protocol):
    """Reads tokens, and can go back to where it was."""

    def prefill(self, tokens: Tensor) -> Tensor: ...
    def step(self, tokens: Tensor) -> Tensor: ...
    def back(self, position: int) -> None: ...


class Ours(CpuDecoder):
    def back(self, position: int) -> None:
        self._decoder.rewind(position)


class OursInTorch(TorchDecoder):
    def back(self, position: int) -> None:
        self._cache._lengths = [position] * len(self._cache)


class Transformers:
    """``forward`` with a growing cache, as its ``generate`` calls it."""

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        self.model, self.cache = model, DynamicCache()

    def prefill(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, past_key_values=self.cache, use_cache=True).logits[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        return self.prefill(tokens[:, None])

    def back(self, position: int) -> None:
        if surplus := self.cache.get_seq_length() - position:
            self.cache.crop(-surplus)


class Expert:
    """Plain PyTorch as one would write it for speed: no modules, a static cache, SDPA.

    Args:
        model: Where the weights come from.
        batch: Sequences.
        capacity: Positions of the cache.
        compiled: Under torch.compile, which wants fixed shapes: attention runs over the whole cache with a mask.
    """

    def __init__(self, model: ImageGPTForCausalImageModeling, batch: int, capacity: int, compiled: bool) -> None:
        config, body = model.config, model.transformer
        self.heads, self.eps, self.compiled = config.n_head, config.layer_norm_epsilon, compiled
        self.wte, self.wpe, self.norm, self.head = (
            t.detach() for t in (body.wte.weight, body.wpe.weight, body.ln_f.weight, model.lm_head.weight)
        )
        self.layers = []
        for block in body.h:
            linear = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
            pairs = [(layer.weight.detach().t().contiguous(), layer.bias.detach()) for layer in linear]
            shape = (batch, self.heads, capacity, config.head_dim)
            cache = torch.zeros(shape, dtype=model.dtype), torch.zeros(shape, dtype=model.dtype)
            self.layers.append((block.ln_1.weight.detach(), block.ln_2.weight.detach(), pairs, cache))
        self.position = 0
        self.run: Callable[..., Tensor] = torch.compile(self._run) if compiled else self._run

    def _run(self, tokens: Tensor, where: Tensor, mask: Tensor | None, seen: int) -> Tensor:
        batch, length = tokens.shape
        x = self.wte[tokens] + self.wpe[where]
        for norm_1, norm_2, (qkv, proj, fc, fc_proj), (keys, values) in self.layers:
            parts = F.linear(F.rms_norm(x, x.shape[-1:], norm_1, self.eps), *qkv)
            q, k, v = parts.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            keys.index_copy_(2, where, k)
            values.index_copy_(2, where, v)
            if mask is None:
                attended = F.scaled_dot_product_attention(q, keys[:, :, :seen], values[:, :, :seen])
            else:
                attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            x = x + F.linear(attended.transpose(1, 2).reshape(batch, length, -1), *proj)
            inner = F.linear(F.rms_norm(x, x.shape[-1:], norm_2, self.eps), *fc)
            x = x + F.linear(inner * torch.sigmoid(1.702 * inner), *fc_proj)
        return F.linear(F.rms_norm(x[:, -1], x.shape[-1:], self.norm, self.eps), self.head)

    def _mask(self, where: Tensor) -> Tensor:
        return torch.arange(self.layers[0][3][0].shape[2]) <= where[:, None]

    def prefill(self, tokens: Tensor) -> Tensor:
        where = torch.arange(self.position, self.position + tokens.shape[1])
        self.position += tokens.shape[1]
        return self._run(tokens, where, self._mask(where), 0)

    def step(self, tokens: Tensor) -> Tensor:
        where = torch.tensor([self.position])
        self.position += 1
        mask = self._mask(where) if self.compiled else None
        return self.run(tokens[:, None], where, mask, 0 if self.compiled else self.position)

    def back(self, position: int) -> None:
        self.position = position


class Reader:
    """Streams memory through the processor."""

    def __init__(self, most: int) -> None:
        # Private, as shared memory has no huge pages, and a walk through small ones is slower than the memory.
        self.block = mmap.mmap(-1, (most + 4096) // 4096 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.block.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, len(self.block), 1 << 24):  # untouched pages are all one page of zeros
            self.block[start : start + (1 << 24)] = b"\1" * min(1 << 24, len(self.block) - start)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.block))
        source = Path(__file__).with_name("streaming_read.cpp")
        library = Path(tempfile.mkdtemp()) / "streaming_read.so"
        # Loads of 64 bytes where there are: those of 32 read memory at four fifths of its rate.
        level = "x86-64-v4" if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else "x86-64-v3"
        flags = ["-O3", f"-march={level}", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"]
        subprocess.run(["g++", *flags, "-o", str(library), str(source)], check=True)
        self.read = ctypes.CDLL(str(library)).streaming_read
        self.read.argtypes, self.read.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_uint64

    def __call__(self, count: int) -> None:
        self.read(self.address, count // 4096 * 4096, torch.get_num_threads())


def make_model(dtype: torch.dtype) -> ImageGPTForCausalImageModeling:
    torch.manual_seed(0)
    return ImageGPTForCausalImageModeling(ImageGPTConfig()).eval().to(dtype)


def candidates(batch: int, capacity: int, compiled: bool) -> dict[tuple[str, str], Candidate]:
    """(dtype, name) -> candidate."""
    import transformers

    found: dict[tuple[str, str], Candidate] = {}
    for name, dtype in DTYPES.items():
        model = make_model(dtype)
        theirs = transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(**model.config.to_dict()))
        theirs.load_state_dict(model.state_dict())
        found[name, "transformers"] = Transformers(theirs.to(dtype).eval())
        found[name, "expert's PyTorch"] = Expert(model, batch, capacity, compiled=False)
        if compiled:
            found[name, "expert's, compiled"] = Expert(model, batch, capacity, compiled=True)
        found[name, "igpt_fast TorchDecoder"] = OursInTorch(model, batch, capacity)
        found[name, "igpt_fast"] = Ours(model, batch, capacity)
        if dtype == torch.float32:
            found["int8", "igpt_fast"] = Ours(model, batch, capacity, "int8")
    return found


def moved(config: ImageGPTConfig, batch: int, position: int, dtype: str) -> int:
    """Bytes that a step must read: the weights once and the cache of every sequence."""
    size = {"float32": 4, "bfloat16": 2, "int8": 1}[dtype]
    weights = config.n_layer * 12 * config.n_embd**2 + (config.vocab_size - 1) * config.n_embd
    return size * (weights + 2 * config.n_layer * batch * position * config.n_embd)


def bench_steps(batch: int, position: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of a step at a position."""
    common.say(f"decode: batch {batch}, position {position}, {torch.get_num_threads()} thread(s)")
    config, length = ImageGPTConfig(), options.steps
    tokens = torch.randint(512, (batch, position + length), generator=torch.Generator().manual_seed(1))
    runs: dict[Any, Callable[[], Any]] = {}
    errors, want = {}, None
    for key, candidate in candidates(batch, position + length, options.compiled).items():
        common.say(f"  checking {key[1]}, {key[0]}")
        candidate.prefill(tokens[:, :position])
        logits = torch.stack([candidate.step(column) for column in tokens[:, position:].unbind(1)], 1).float()
        want = logits if want is None else want  # transformers in float32 comes first
        errors[key] = float((logits - want).square().mean().sqrt() / want.square().mean().sqrt())
        if not errors[key] <= ERRORS[key[0]]:
            raise SystemExit(f"{key}: logits differ by {errors[key]:.1e}; its time means nothing")

        def run(candidate: Candidate = candidate) -> None:
            candidate.back(position)
            for column in tokens[:, position:].unbind(1):
                candidate.step(column)

        runs[key] = run
    sizes = {dtype: moved(config, batch, position, dtype) for dtype in ERRORS}
    reader = Reader(max(sizes.values()))
    for dtype, count in sizes.items():
        runs[dtype, "streaming read"] = lambda count=count: [reader(count) for _ in range(length)]
    times = common.interleave(runs, options.rounds)
    times = {key: {k: v / length if "ms" in k else v for k, v in time.items()} for key, time in times.items()}
    best = min(times[dtype, "transformers"]["ms"] for dtype in DTYPES)
    return [
        {
            "work": "step",
            "batch": batch,
            "position": position,
            "dtype": dtype,
            "threads": torch.get_num_threads(),
            "name": name,
            **time,
            "times_hf": best / time["ms"],
            "of_read": times[dtype, "streaming read"]["ms"] / time["ms"],
            "error": errors.get((dtype, name)),
        }
        for (dtype, name), time in times.items()
    ]


def bench_images(batch: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole images, 1,024 tokens with sampling; transformers by its own ``generate``."""
    import transformers

    common.say(f"whole images: batch {batch}")
    uniforms = torch.rand(batch, 1024, generator=torch.Generator().manual_seed(1))
    context = torch.full((batch, 1), 512)
    runs: dict[Any, Callable[[], Any]] = {}
    for name, dtype in DTYPES.items():
        model = make_model(dtype)
        theirs = transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(**model.config.to_dict()))
        theirs.load_state_dict(model.state_dict())
        theirs = theirs.to(dtype).eval()
        runs[name, "transformers"] = lambda theirs=theirs: theirs.generate(
            context, max_length=1025, do_sample=True, top_k=0, attention_mask=torch.ones_like(context)
        )
        runs[name, "igpt_fast"] = lambda model=model: decode(model, context, uniforms, Sampling())
        if dtype == torch.float32:
            runs["int8", "igpt_fast"] = lambda model=model: decode(model, context, uniforms, Sampling(), dtype="int8")
    times = common.interleave(runs, max(1, options.rounds // 3))
    best = min(times[dtype, "transformers"]["ms"] for dtype in DTYPES)
    row = {"work": "image", "batch": batch, "position": None, "threads": torch.get_num_threads()}
    return [
        {**row, "dtype": dtype, "name": name, **time, "times_hf": best / time["ms"]}
        for (dtype, name), time in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=16, help="tokens of a turn")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--position", type=int, nargs="+", default=[512])
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    parser.add_argument("--images", action="store_true", help="whole images as well; minutes")
    options = parser.parse_args()
    if reason := backend.no_native_decoder():
        raise SystemExit(f"there is no native decoder to measure: {reason}")
    torch.set_num_threads(options.threads)
    rows = []
    with torch.no_grad():
        for batch in options.batch:
            for position in options.position:
                rows += bench_steps(batch, position, options)
        if options.images:
            for batch in options.batch:
                rows += bench_images(batch, options)
    print(common.table(rows, COLUMNS))
    if options.json:
        common.write(options.json, rows)


if __name__ == "__main__":
    main()
