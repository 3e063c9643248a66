"""The calls of the ops that are measured on the CPU, each with its peers, at the sizes of iGPT, and their rows.

Bytes are the least that a call can do with: what it must read and write once. Their speed is compared with that of a
copy into memory that is there already; a call has to ask for its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor
from workloads import OURS, Function, Workload, check, everybody, gradients, passes, prepare

from igpt_fast import ops, reference


@dataclass(frozen=True)
class Size:
    """A model's, the positions that are worked on at a time, and the dtype."""

    name: str
    n_embd: int
    rows: int
    dtype: torch.dtype
    colours: int = 512

    def __str__(self) -> str:
        return f"{self.name}, {str(self.dtype).removeprefix('torch.')}"


DTYPES = (torch.float32, torch.bfloat16)
# S: one token; a short primer; an image; 8 images. M and L: an image.
SHAPES = (("S", 512, 1), ("S", 512, 64), ("S", 512, 1024), ("S", 512, 8192), ("M", 1024, 1024), ("L", 1536, 1024))
SIZES = tuple(Size(*shape, dtype) for shape in SHAPES for dtype in DTYPES)
QUICK = tuple(Size("S", 512, 1024, dtype) for dtype in DTYPES)
TINY = tuple(Size("tiny", 72, 33, dtype, colours=24) for dtype in DTYPES)  # for --dry-run

# (heads, head_dim, positions) of each model.
HEADS = {"S": (8, 64, 1024), "M": (8, 128, 1024), "L": (16, 96, 1024), "tiny": (2, 32, 33)}


def normal(*shape: int, size: Size, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + len(shape) + sum(shape))
    return torch.randn(shape, generator=generator).to(size.dtype)


def rms_norm(size: Size) -> Iterator[Workload]:
    n, rows = size.n_embd, size.rows
    item = size.dtype.itemsize

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return reference.rms_norm(x, weight, 1e-5)

    def plain_add(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return reference.rms_norm(total, weight, 1e-5), total

    def fused_add(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, (n,), weight, 1e-5), total

    def inputs(_: torch.device, seed: int) -> tuple[Tensor, ...]:
        return tuple(normal(*shape, size=size, seed=seed + i) for i, shape in enumerate(((rows, n), (n,), (rows, n))))

    yield Workload(
        op="rms_norm",
        size=f"{size}: {rows} x {n}",
        inputs=lambda device, seed: inputs(device, seed)[:2],
        ours=lambda x, weight: ops.rms_norm(x, weight),
        definition=plain,
        peers={
            "F.rms_norm": lambda x, weight: F.rms_norm(x, (n,), weight, 1e-5),
            "torch.compile": compiled(plain),
        },
        differentiable=2,
        bytes=(2.0 * item * rows * n, 3.0 * item * rows * n),
    )
    yield Workload(
        op="rms_norm",
        size=f"{size}, residual: {rows} x {n}",
        inputs=inputs,
        ours=lambda x, weight, residual: ops.rms_norm(x, weight, residual=residual),
        definition=plain_add,
        peers={"F.rms_norm": fused_add, "torch.compile": compiled(plain_add)},
        differentiable=3,
        bytes=(4.0 * item * rows * n, 4.0 * item * rows * n),
    )


def layer_norm(size: Size) -> Iterator[Workload]:
    n, rows = size.n_embd, size.rows
    item = size.dtype.itemsize

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.layer_norm(x, weight, bias, 1e-5)

    yield Workload(
        op="layer_norm",
        size=f"{size}: {rows} x {n}",
        inputs=lambda _, seed: tuple(
            normal(*shape, size=size, seed=seed + i) for i, shape in enumerate(((rows, n), (n,), (n,)))
        ),
        ours=lambda x, weight, bias: ops.layer_norm(x, weight, bias),
        definition=plain,
        peers={
            "F.layer_norm": lambda x, weight, bias: F.layer_norm(x, (n,), weight, bias, 1e-5),
            "torch.compile": compiled(plain),
        },
        differentiable=3,
        bytes=(2.0 * item * rows * n, 3.0 * item * rows * n),
        not_compared=("F.layer_norm",),  # its gradient of the weight, in fp32, has several times the expression's error
    )


def _activation(name: str, fused: dict[str, Function], size: Size) -> Iterator[Workload]:
    """Without a bias, as the models call it, and with one."""
    n, rows = 4 * size.n_embd, size.rows
    item, definition, ours = size.dtype.itemsize, getattr(reference, name), getattr(ops, name)
    for text, count in (("", 1), (", bias", 2)):
        shapes = ((rows, n), (n,))[:count]

        def with_bias(function: Function) -> Function:
            return lambda x, *bias: function(x + bias[0] if bias else x)

        yield Workload(
            op=name,
            size=f"{size}{text}: {rows} x {n}",
            inputs=lambda _, seed, shapes=shapes: tuple(
                normal(*shape, size=size, seed=seed + i) for i, shape in enumerate(shapes)
            ),
            ours=ours,
            definition=definition,
            peers={
                **{peer: with_bias(function) for peer, function in fused.items()},
                "torch.compile": compiled(definition),
            },
            differentiable=count,
            bytes=(2.0 * item * rows * n, 3.0 * item * rows * n),
        )


def quick_gelu(size: Size) -> Iterator[Workload]:
    yield from _activation("quick_gelu", {}, size)


def gelu_tanh(size: Size) -> Iterator[Workload]:
    yield from _activation("gelu_tanh", {"F.gelu": lambda x: F.gelu(x, approximate="tanh")}, size)


def gelu_erf(size: Size) -> Iterator[Workload]:
    yield from _activation("gelu_erf", {"F.gelu": F.gelu}, size)


def cross_entropy(size: Size) -> Iterator[Workload]:
    if size.name in ("M", "L"):
        return  # the colours are as many
    rows, k = size.rows, size.colours
    item = size.dtype.itemsize

    def labels(seed: int) -> Tensor:
        return torch.randint(0, k, (rows,), generator=torch.Generator().manual_seed(seed))

    yield Workload(
        op="cross_entropy",
        size=f"{size}: {rows} x {k}",
        inputs=lambda _, seed: (normal(rows, k, size=size, seed=seed), labels(seed)),
        ours=lambda logits, labels: ops.cross_entropy(logits, labels),
        definition=lambda logits, labels: reference.cross_entropy(logits, labels),
        peers={
            "F.cross_entropy": lambda logits, labels: F.cross_entropy(logits, labels),
            "torch.compile": compiled(reference.cross_entropy),
        },
        differentiable=1,
        bytes=(1.0 * item * rows * k, 2.0 * item * rows * k),
    )


def dequantize(size: Size) -> Iterator[Workload]:
    if size.name in ("M", "L") or size.dtype != torch.float32:
        return
    n, k = size.rows, size.colours
    yield Workload(
        op="dequantize",
        size=f"{size.name}: {n} tokens, {k} clusters",
        inputs=lambda _, seed: (
            torch.randint(0, k, (n,), generator=torch.Generator().manual_seed(seed)),
            torch.rand(k, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1,
        ),
        ours=lambda tokens, palette: ops.dequantize(tokens, palette),
        definition=lambda tokens, palette: reference.dequantize(tokens, palette.float()),
        peers={"torch.compile": compiled(reference.dequantize)},
        bytes=(11.0 * n, 0.0),
    )


def causal_attention(size: Size) -> Iterator[Workload]:
    """Of a packed projection, so that the copies of its gradient count."""
    h, d, t = HEADS[size.name]
    b = min(size.rows // t, 4)  # a training step's batch at most: the definition writes all scores out
    if b == 0 or size.dtype != torch.bfloat16:
        return

    def inputs(_: torch.device, seed: int) -> tuple[Tensor]:
        return (torch.randn(b, t, 3, h, d, generator=torch.Generator().manual_seed(seed)).to(size.dtype),)

    def split(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        return q, k, v

    products = 4.0 * b * h * d * t * (t + 1) / 2
    yield Workload(
        op="causal_attention",
        size=f"{size}: {b} x {h} x {t} x {d}",
        inputs=inputs,
        ours=lambda packed: ops.causal_attention_packed(packed).transpose(1, 2),
        definition=lambda packed: reference.causal_attention(*split(packed), scale=d**-0.5)[0],
        peers={"SDPA": lambda packed: F.scaled_dot_product_attention(*split(packed), is_causal=True)},
        differentiable=1,
        flops=(products, 2.5 * products),
    )


def compiled(function: Function) -> Function:
    return torch.compile(function, dynamic=False)


Maker = Callable[[Size], Iterator[Workload]]
# Op -> its workloads; the order is the table's.
MAKERS: dict[str, Maker] = {
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "quick_gelu": quick_gelu,
    "gelu_tanh": gelu_tanh,
    "gelu_erf": gelu_erf,
    "cross_entropy": cross_entropy,
    "dequantize": dequantize,
    "causal_attention": causal_attention,
}


def copy_gb_s(threads: int, size: int = 1 << 24) -> float:
    """Read and written, of a tensor as large as those of 8 images."""
    torch.set_num_threads(threads)
    source, target = torch.ones(size // 4), torch.zeros(size // 4)
    time = common.interleave({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * size / time["ms"] / 1e6


def bench(workload: Workload, threads: int, rounds: int, ceiling: float) -> list[dict[str, Any]]:
    """The rows of a workload: one for each pass and candidate; ``error`` in place of a time where there is none."""
    torch.set_num_threads(threads)
    rows = []
    for number, direction in enumerate(passes(workload)):
        common.say(f"{workload.op} {direction}, {workload.size}, {threads} thread(s)")
        torch.compiler.reset()
        count = workload.differentiable if direction == "backward" else 0
        wrong = check(workload, torch.device("cpu"), direction)
        inputs = workload.inputs(torch.device("cpu"), 0)
        with gradients(bool(count)):
            calls = {
                name: prepare(function, inputs, count)
                for name, function in everybody(workload).items()
                if name not in wrong
            }
            times = common.interleave(calls, rounds, seconds=0.02)
        peers = [time["ms"] for name, time in times.items() if name != OURS]
        for name in everybody(workload):
            row = {"op": workload.op, "pass": direction, "size": workload.size, "threads": threads, "name": name}
            if name in wrong:
                rows.append(row | {"error": wrong[name]})
                continue
            gb_s = workload.bytes[number] / times[name]["ms"] / 1e6
            row |= times[name] | {"gb_s": gb_s, "of_copy": gb_s / ceiling}
            row["tflop_s"] = workload.flops[number] / times[name]["ms"] / 1e9
            if name == OURS and peers:
                row["times_best_peer"] = min(peers) / times[name]["ms"]
            rows.append(row)
    return rows
