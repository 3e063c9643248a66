"""TensorFlow's bundles, written for the tests from the format's description, and OpenAI's network in numpy."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = {torch.float32: 1, torch.float64: 2, torch.int64: 9, torch.bfloat16: 14, torch.float16: 19}
Entries = list[tuple[bytes, bytes]]
Damage = Callable[[int, bytes], bytes]


# --- the format --------------------------------------------------------------------------------------------------


@functools.cache
def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


def crc32c(data: bytes) -> int:
    """Byte by byte."""
    table, crc = _crc_table(), 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % (1 << 32)


def varint(number: int) -> bytes:
    number %= 1 << 64
    out = []
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def message(*fields: tuple[int, int | bytes]) -> bytes:
    """A protocol buffer; a field's value is a number, or bytes. Zeros are left out, as TensorFlow does."""
    parts = []
    for number, value in fields:
        if isinstance(value, bytes):
            parts += [varint(number << 3 | 2), varint(len(value)), value]
        elif value:
            parts += [varint(number << 3), varint(value)]
    return b"".join(parts)


def header(shards: int = 1, endianness: int = 0, oldest: int = 0) -> bytes:
    return message((1, shards), (2, endianness), (3, message((1, 1), (2, oldest))))


def entry(dtype: int, shape: Iterable[int], shard: int, offset: int, size: int, checksum: int, *more: Any) -> bytes:
    axes = b"".join(message((2, message((1, n)) if n else b"")) for n in shape)
    fields = message((1, dtype), (2, axes), (3, shard), (4, offset), (5, size))
    return fields + bytes([6 << 3 | 5]) + checksum.to_bytes(4, "little") + message(*more)


def _block(entries: Entries, interval: int) -> bytes:
    out, restarts, before = bytearray(), [], b""
    for i, (key, value) in enumerate(entries):
        shared = 0
        if i % interval == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    restarts = restarts or [0]
    return bytes(out) + b"".join(n.to_bytes(4, "little") for n in [*restarts, len(restarts)])


def table(
    entries: Entries,
    block_bytes: int = 200,
    kind: int = 0,
    damage: Damage = lambda number, block: block,
    gap: bytes = b"",
) -> bytes:
    """An index. ``damage`` changes a block, given its number, before its checksum is computed; ``gap`` follows each."""
    out, handles, numbers = bytearray(), [], itertools.count()

    def add(rows: Entries) -> bytes:
        content = damage(next(numbers), _block(rows, interval=3))
        place = varint(len(out)) + varint(len(content))
        out.extend(content + bytes([kind]))
        out.extend(masked(crc32c(content + bytes([kind]))).to_bytes(4, "little") + gap)
        return place

    rows: Entries = []
    for key, value in entries:
        rows.append((key, value))
        if sum(len(k) + len(v) for k, v in rows) > block_bytes:
            handles.append((key, add(rows)))
            rows = []
    if rows:
        handles.append((rows[-1][0] + b"~", add(rows)))  # any key from the last one on will do
    about = add([])
    footer = about + add(handles)
    return bytes(out) + footer.ljust(40, b"\0") + 0xDB4775248B80FB57.to_bytes(8, "little")


def raw(value: Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_bundle(
    prefix: Path, variables: dict[str, Tensor], shards: int = 2, crc: Callable[[bytes], int] = crc32c
) -> Entries:
    """Writes a checkpoint, a variable's values in one shard after another; gives the entries of its index."""
    contents: list[list[bytes]] = [[] for _ in range(shards)]
    entries = [(b"", header(shards))]
    for (name, value), shard in zip(sorted(variables.items()), itertools.cycle(range(shards)), strict=False):
        data, offset = raw(value), sum(map(len, contents[shard]))
        fields = (DTYPES[value.dtype], value.shape, shard, offset, len(data), masked(crc(data)))
        entries.append((name.encode(), entry(*fields)))
        contents[shard].append(data)
    for shard, parts in enumerate(contents):
        Path(f"{prefix}.data-{shard:05}-of-{shards:05}").write_bytes(b"".join(parts))
    Path(f"{prefix}.index").write_bytes(table(entries))
    return entries


# --- the network -------------------------------------------------------------------------------------------------


def network(
    bert: bool = False,
    dtype: torch.dtype = torch.float32,
    colours: int = 9,
    positions: int = 12,
    width: int = 16,
    heads: int = 2,
    layers: int = 2,
    inner: int = 64,
) -> dict[str, Tensor]:
    """Random variables of OpenAI's, with an optimizer's slots, a classifier and a step."""
    generator = torch.Generator().manual_seed(layers + heads)

    def draw(*shape: int, spread: float = 0.5, about: float = 0.0) -> Tensor:
        return (about + spread * torch.randn(*shape, generator=generator)).to(dtype)

    projection = (heads, width // heads, width)
    found = {"wte": draw(colours, width), "wtet": draw(colours, width), "wpe": draw(positions, width)}
    found |= {} if bert else {"sos": draw(width)}
    found["ln_f/g"] = draw(width, about=1.0)
    for i in range(layers):
        layer = {f"attn/{name}_proj": draw(*projection) for name in "qkvc"}
        layer |= {"ln_1/g": draw(width, about=1.0), "ln_2/g": draw(width, about=1.0)}
        layer |= {"mlp/c_fc/w": draw(width, inner), "mlp/c_proj/w": draw(inner, width)}
        found |= {f"h{i}/{name}": value for name, value in layer.items()}
    slots = {f"{name}/{slot}": draw(*value.shape) for name, value in found.items() for slot in ("Adam", "Adam_1")}
    named = {f"model/{name}": value for name, value in {**found, **slots, "clf/wclf": draw(3, width)}.items()}
    return named | {"global_step": torch.tensor(7), "beta1_power": torch.tensor(0.5)}


def logits(variables: dict[str, Tensor], tokens: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray:
    """(B, T, V) of (B, T) tokens, in float64; of a BERT with ``hidden``, (B, T) bool, where pixels are masked.

    Source: openai/image-gpt src/model.py.
    """
    w = {name.removeprefix("model/"): value.double().numpy() for name, value in variables.items()}
    n = tokens.shape[1]

    def norm(x: np.ndarray, g: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * g

    h = w["wte"][tokens]
    if hidden is None:
        start = np.broadcast_to(w["sos"], (len(tokens), 1, w["sos"].size))
        h = np.concatenate([start, h[:, :-1]], axis=1)
    else:
        h = h * ~hidden[..., None]
    h = h + w["wpe"][:n]
    for i in _layers(w):
        at = f"h{i}/"
        x = norm(h, w[at + "ln_1/g"])
        q, k, v = (np.einsum("bsf,hef->bhse", x, w[f"{at}attn/{name}_proj"]) for name in "qkv")
        scores = np.einsum("bhqe,bhke->bhqk", q, k) / np.sqrt(q.shape[-1])
        if hidden is None:
            scores = np.where(np.tril(np.ones((n, n), bool)), scores, -1e10)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        a = np.einsum("bhqk,bhke->bhqe", scores / scores.sum(axis=-1, keepdims=True), v)
        h = h + np.einsum("bhse,hef->bsf", a, w[at + "attn/c_proj"])
        x = norm(h, w[at + "ln_2/g"]) @ w[at + "mlp/c_fc/w"]
        h = h + (x / (1 + np.exp(-1.702 * x))) @ w[at + "mlp/c_proj/w"]
    return norm(h, w["ln_f/g"]) @ w["wtet"].T


def _layers(w: dict[str, np.ndarray]) -> Iterator[int]:
    return itertools.takewhile(lambda i: f"h{i}/ln_1/g" in w, itertools.count())
