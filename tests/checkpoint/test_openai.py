"""OpenAI's checkpoints: the same logits as their formulas give, and whatever is damaged is noticed."""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from igpt_fast import ImageGPTForCausalImageModeling, ImageGPTForImageClassification, backend
from igpt_fast.checkpoint import bundle, from_openai
from igpt_fast.checkpoint.converted import Converted

COLOURS, POSITIONS = 9, 12  # of bundles.network


def tokens(batch: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, COLOURS, (batch, POSITIONS))


def shifted(pixels: np.ndarray) -> Tensor:
    """SOS and all but the last pixel."""
    return torch.from_numpy(np.concatenate([np.full((len(pixels), 1), COLOURS), pixels[:, :-1]], axis=1))


def read_all(prefix: Path) -> Converted:
    converted = from_openai(prefix)
    for tensor in converted.tensors.values():
        tensor.read()
    return converted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a checkpoint of a small causal network."""
    (tmp_path / "given").mkdir()
    bundles.write_bundle(tmp_path / "given" / "model.ckpt-7", bundles.network())
    return tmp_path / "given"


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ["generic", "fastest"])
def test_checksums(isa: str) -> None:
    """Known values (RFC 3720, B.4), any length and alignment, and in parts."""
    assert backend._C is not None
    before = backend._C.cpu_isa()
    assert isa == "fastest" or backend._C.select_cpu_isa("generic")
    try:
        for data, want in [
            (b"123456789", 0xE3069283),
            (bytes(32), 0x8A9136AA),
            (b"\xff" * 32, 0x62A8AB43),
            (bytes(range(32)), 0x46DD794E),
        ]:
            assert bundle._crc32c(data) == bundles.crc32c(data) == want
        noise = np.random.default_rng(0).integers(0, 256, 600, dtype=np.uint8)
        for begin, end in itertools.product(range(9), (9, 10, 16, 17, 255, 600)):
            part = noise[begin:end]
            assert bundle._crc32c(part) == bundles.crc32c(part.tobytes())
            assert bundle._crc32c(part[5:], bundle._crc32c(part[:5])) == bundle._crc32c(part)
    finally:
        backend._C.select_cpu_isa(before)


@pytest.mark.parametrize("sizes", [{}, {"heads": 4, "layers": 3, "inner": 24}, {"heads": 1, "layers": 1, "width": 8}])
@pytest.mark.parametrize("shards", [1, 5])
def test_a_causal_network(tmp_path: Path, sizes: dict[str, int], shards: int) -> None:
    variables = bundles.network(**sizes)
    bundles.write_bundle(tmp_path / "model.ckpt-1000000", variables, shards)
    from_openai(tmp_path / "model.ckpt-1000000").save_pretrained(tmp_path / "out")
    ours = ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "out")
    theirs = transformers.ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "out").eval()
    want, pixels = bundles.logits(variables, tokens()), shifted(tokens())
    for model in (ours, theirs):
        with torch.no_grad():
            exact, plain = model.double()(input_ids=pixels).logits, model.float()(input_ids=pixels).logits
        np.testing.assert_allclose(exact.numpy(), want, rtol=0, atol=1e-10)
        np.testing.assert_allclose(plain.numpy(), want, rtol=1e-5, atol=1e-5)
    config = ours.config
    assert (config.n_head, config.n_layer) == (sizes.get("heads", 2), sizes.get("layers", 2))
    assert (config.vocab_size, config.n_positions, config.bidirectional) == (COLOURS + 1, POSITIONS, False)
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0.0
    assert config.n_inner == (24 if "inner" in sizes else 64 if sizes.get("width") == 8 else None)
    assert "bidirectional" not in (tmp_path / "out" / "config.json").read_text()
    assert ours.generate(do_sample=True, seed=0).shape == (1, POSITIONS + 1)


def test_a_bert(tmp_path: Path) -> None:
    """Masked pixels are SOS, whose embedding is zero; every position sees all others."""
    variables = bundles.network(bert=True)
    bundles.write_bundle(tmp_path / "bert", variables)
    from_openai(tmp_path).save_pretrained(tmp_path / "out")
    model = ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "out").double()
    assert model.config.bidirectional
    assert not model.transformer.wte.weight[-1].any()
    hidden = np.random.default_rng(1).random((3, POSITIONS)) < 0.3
    pixels = torch.from_numpy(np.where(hidden, COLOURS, tokens()))
    with torch.no_grad():
        np.testing.assert_allclose(
            model(pixels).logits, bundles.logits(variables, tokens(), hidden), rtol=0, atol=1e-10
        )
        plain = model.float()(pixels).logits
    np.testing.assert_allclose(plain, bundles.logits(variables, tokens(), hidden), rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="score"):
        classifier = ImageGPTForImageClassification.from_pretrained(tmp_path / "out")
    assert classifier(pixels).logits.shape == (3, 2)


@pytest.mark.parametrize("kind", ["causal", "bert"])
def test_what_tensorflow_has_written(tmp_path: Path, kind: str) -> None:
    """TensorFlow 2.21 ran openai/image-gpt's src/model.py: random weights, three steps of Adam, three shards; and its
    logits, and which pixels the BERT did not see.
    """
    given = Path(__file__).parent / "tensorflow" / kind
    with np.load(given / "want.npz") as want:
        pixels, hidden, expected = want["x"], want["mask"], want["out"]
    from_openai(given / "model.ckpt-1000000").save_pretrained(tmp_path)
    model = ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
    assert (model.config.n_head, model.config.bidirectional) == (2, kind == "bert")
    sos = model.config.sos_token_id
    given_pixels = np.where(hidden, sos, pixels) if kind == "bert" else np.insert(pixels[:, :-1], 0, sos, axis=1)
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.from_numpy(given_pixels)).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(tmp_path: Path, stored: torch.dtype) -> None:
    variables = bundles.network(dtype=stored)
    bundles.write_bundle(tmp_path / "model", variables)
    for wanted in (None, torch.float32, torch.float16, torch.bfloat16):
        from_openai(tmp_path).save_pretrained(tmp_path / "out", dtype=wanted)
        model = ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "out")
        assert model.dtype == (wanted or stored)
        assert model.config.dtype == str(model.dtype).removeprefix("torch.")
        assert torch.equal(model.lm_head.weight, variables["model/wtet"].to(model.dtype))
        assert torch.equal(model.transformer.wte.weight[-1], variables["model/sos"].to(model.dtype))
        shutil.rmtree(tmp_path / "out")


def test_what_a_checkpoint_is_called(folder: Path) -> None:
    prefix = folder / "model.ckpt-7"
    want = read_all(prefix).config
    for name in (folder, f"{prefix}.index", f"{prefix}.data-00001-of-00002"):
        assert from_openai(name).config == want
    with pytest.raises(FileNotFoundError, match=r"model\.ckpt-8\.index: no such file"):
        from_openai(folder / "model.ckpt-8")
    with pytest.raises(FileNotFoundError, match="has no checkpoint of TensorFlow"):
        from_openai(folder.parent)
    shutil.copy(f"{prefix}.index", f"{prefix}0.index")
    with pytest.raises(
        ValueError, match=r"several checkpoints; give one of model\.ckpt-7\.index, model\.ckpt-70\.index"
    ):
        from_openai(folder)


def test_memory(tmp_path: Path) -> None:
    """The peak is little more than the largest tensor."""
    crc: Any = bundle._crc32c
    variables = bundles.network(width=512, inner=2048, heads=4, layers=2)
    bundles.write_bundle(tmp_path / "model", variables, crc=crc)
    largest = max(value.nbytes for value in variables.values())
    tracemalloc.start()
    try:
        from_openai(tmp_path).save_pretrained(tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 1.3 * largest
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 6 * largest


# --- what is wrong -----------------------------------------------------------------------------------------------


def without(*names: str) -> Callable[[dict[str, Tensor]], None]:
    def change(variables: dict[str, Tensor]) -> None:
        for name in names:
            del variables[name]

    return change


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda variables: variables.update({name: change(variables[name])})


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda variables: variables.update({new: variables.pop(old)})


def poisoned(value: Tensor) -> Tensor:
    value = value.clone()
    value.view(-1)[-1] = torch.nan
    return value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model/wpe", "model/h1/ln_2/g"), r"lacks model/h1/ln_2/g, model/wpe$"),
        (without("model/h1/attn/q_proj"), r"lacks model/h1/attn/q_proj$"),
        (renamed("model/wte", "model/wti"), r"variables that no image-gpt of OpenAI's has: model/wti$"),
        (renamed("model/wpe/Adam", "model/wpe/Momentum"), r"has: model/wpe/Momentum$"),
        (renamed("model/h1/ln_1/g", "model/h2/ln_1/g"), r"has the layers \[0, 1, 2\]|lacks model/h1/ln_1/g"),
        (renamed("model/h1/ln_1/g", "model/h01/ln_1/g"), r"has: model/h01/ln_1/g$"),
        (
            changed("model/h1/attn/k_proj", lambda v: v[:1]),
            r"attn/k_proj has the shape \(1, 8, 16\); want \(2, 8, 16\)",
        ),
        (changed("model/h0/mlp/c_fc/w", lambda v: v[None]), r"c_fc/w has the shape \(1, 16, 64\); want \(16, I\)"),
        (changed("model/sos", lambda v: v[:5]), r"model/sos has the shape \(5,\); want \(16\)"),
        (changed("model/wtet", Tensor.double), r"model/wtet has TensorFlow's dtype 2, model/wte has 1"),
        (changed("model/wte", Tensor.long), r"model/wte has TensorFlow's dtype 9; want float32"),
        (
            changed("model/h1/attn/v_proj", poisoned),
            r"data-0000\d-of-00002: model/h1/attn/v_proj: holds NaN or infinity",
        ),
    ],
)
def test_other_variables(tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str) -> None:
    variables = bundles.network()
    change(variables)
    bundles.write_bundle(tmp_path / "model", variables)
    with pytest.raises(ValueError, match=message) as caught:
        read_all(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_layers_and_heads(tmp_path: Path) -> None:
    variables = {name.replace("/h1/", "/h2/"): value for name, value in bundles.network().items()}
    bundles.write_bundle(tmp_path / "model", variables)
    with pytest.raises(ValueError, match=r"has the layers \[0, 2\]; want 0, 1 and so on"):
        from_openai(tmp_path)
    variables = bundles.network()
    for name, value in variables.items():
        if re.search(r"attn/._proj$", name):
            variables[name] = value[:, :7].contiguous()
    bundles.write_bundle(tmp_path / "model", variables)
    with pytest.raises(ValueError, match="has 2 heads of 7 in a width of 16"):
        from_openai(tmp_path)


def test_other_dtypes(folder: Path) -> None:
    for dtype in (torch.int8, torch.float64):
        with pytest.raises(ValueError, match=f"save_pretrained: dtype is {dtype}; want float32"):
            from_openai(folder).save_pretrained(folder / "out", dtype=dtype)
    assert not (folder / "out").exists()


def test_values_too_large(tmp_path: Path) -> None:
    bundles.write_bundle(tmp_path / "model", bundles.network() | {"model/wpe": torch.full((POSITIONS, 16), 1e6)})
    with pytest.raises(ValueError, match=r"transformer\.wpe\.weight: holds .* too large for float16"):
        from_openai(tmp_path).save_pretrained(tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def entries_of(folder: Path) -> bundles.Entries:
    return bundles.write_bundle(folder / "model", bundles.network())


def set_value(entries: bundles.Entries, name: str, change: Callable[[bytes], bytes]) -> bundles.Entries:
    return [(key, change(value) if key == name.encode() else value) for key, value in entries]


def described(dtype: int = 1, shape: tuple[int, ...] = (2,), size: int = 8, shard: int = 0, offset: int = 0) -> bytes:
    return bundles.entry(dtype, shape, shard, offset, size, 0)


def blocks_of(entries: bundles.Entries) -> list[bytes]:
    """The blocks of an index."""
    found: list[bytes] = []

    def keep(number: int, block: bytes) -> bytes:
        found.append(block)
        return block

    bundles.table(entries, damage=keep)
    return found


HUGE = 1 << 40
SHAPES_NAME = "model/wpe"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("", lambda _: bundles.header(0), "claims 0 shards"),
        ("", lambda _: bundles.header(4097), "claims 4097 shards; want 1..4096"),
        ("", lambda _: bundles.header(2, endianness=1), "big-endian"),
        ("", lambda _: bundles.header(2, oldest=2), "wants a reader of version 2"),
        ("", lambda v: v + bundles.message((9, 1)), r"unknown field \(9, wire type 0\)"),
        (SHAPES_NAME, lambda v: v + bundles.message((7, b"")), "model/wpe: is partitioned into slices"),
        (SHAPES_NAME, lambda v: v + bundles.message((4, 1), (4, 2)), "has its field 4 [23] times"),
        (SHAPES_NAME, lambda v: v[:-2], "is cut off"),
        (SHAPES_NAME, lambda v: v + b"\x80" * 11, "a number does not end"),
        (SHAPES_NAME, lambda v: v + b"\x08" + b"\xff" * 9 + b"\x7f", "more than 64 bits"),
        (SHAPES_NAME, lambda _: described(dtype=7), "dtype 7, whose elements have no fixed size"),
        (SHAPES_NAME, lambda _: described(shape=(3,)), r"has the shape \[3\] of 4 bytes each, but 8 bytes"),
        (SHAPES_NAME, lambda _: described(shape=(-2,)), "has the shape"),
        (SHAPES_NAME, lambda _: described(shape=(1,) * 9, size=4), "has the shape"),
        (SHAPES_NAME, lambda _: described(shape=(HUGE, HUGE)), "but 8 bytes"),
        (SHAPES_NAME, lambda _: described(shape=(1,) * 99999), r"is described in \d+ bytes; want 4096 or less"),
        (
            SHAPES_NAME,
            lambda _: described(shape=(HUGE,), size=4 * HUGE),
            "model/wpe: (overlaps|follows)|and model.index says",
        ),
        (SHAPES_NAME, lambda _: described(shard=9), "model/wpe: is in shard 9 of 2"),
        (SHAPES_NAME, lambda _: described(offset=1), "overlaps another variable"),
        (SHAPES_NAME, lambda _: described(offset=HUGE), "follows a gap"),
        (
            SHAPES_NAME,
            lambda v: v.replace(b"\x12", b"\x12\x02\x18\x01", 1)[:0] + bundles.message((2, b"\x18\x01")),
            "unknown shape",
        ),
    ],
)
def test_an_index_that_lies(tmp_path: Path, name: str, value: Callable[[bytes], bytes], message: str) -> None:
    """With right checksums: nothing is believed that the files do not have."""
    entries = set_value(entries_of(tmp_path), name, value)
    (tmp_path / "model.index").write_bytes(bundles.table(entries))
    with pytest.raises(ValueError, match=message) as caught:
        from_openai(tmp_path)
    assert str(tmp_path / "model.index") in str(caught.value)


def test_tables_that_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = entries_of(tmp_path)
    index = tmp_path / "model.index"

    def refused(content: bytes, message: str) -> None:
        index.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            from_openai(tmp_path)
        assert str(index) in str(caught.value)

    table = bundles.table
    refused(b"", "it has no footer")
    refused(table(entries)[:-1], "it has no footer")
    refused(table(entries, kind=1), r"is compressed \(Snappy\); TensorFlow has compressed none since 1\.2")
    refused(table(entries[1:]), "has no header")
    refused(table([]), "has no header")
    refused(table([*entries[:4], entries[3], *entries[4:]]), "names are not in order at b'model/clf/wclf'")
    refused(table([*entries[:4], entries[5], entries[4], *entries[6:]], 1 << 20), "names are not in order")
    refused(table([*entries, (b"\xff\xfe", entries[-1][1])]), "is not UTF-8")
    refused(table([*entries, (b"z" * 2000, entries[-1][1])]), r"claims 0 \+ 2000")
    refused(table(entries, damage=lambda n, block: b"\x01" + block[1:] if n == 0 else block), r"claims 1 \+ 0")
    refused(table(entries, damage=lambda n, block: block[:-4] + b"\xff" * 4), "claims 4294967295 restarts")
    places = blocks_of(entries)[-1]  # each with a name that those in its block do not exceed
    lowered = places.replace(b"model", b"aodel")
    refused(table(entries, damage=lambda n, block: lowered if block == places else block), "names are not in order")
    refused(table(entries, gap=b"junk"), r"a block begins at \d+, and the one before ends at \d+")
    content = table(entries)
    refused(content[:-49] + bytes(5) + content[-49:], "is damaged|its blocks end at|claims the bytes")
    refused(content[:-10] + b"\x01" + content[-9:], "its footer is damaged")
    monkeypatch.setattr(bundle, "_MAX_VARIABLES", 5)
    refused(table(entries), "has more than 5 (variables|blocks)")
    monkeypatch.setattr(bundle, "_MAX_INDEX_BYTES", 1 << 10)
    monkeypatch.setattr(bundle, "_MAX_VARIABLES", 1 << 16)
    refused(table(entries), r"an index of \d+ bytes; at most 1024 are read")


def test_files_that_are_none(folder: Path) -> None:
    shard = folder / "model.ckpt-7.data-00001-of-00002"
    content = shard.read_bytes()
    for change, message in (
        (
            lambda: shard.write_bytes(content + b"\0"),
            r"data-00001-of-00002: has \d+ bytes, and model\.ckpt-7\.index says",
        ),
        (lambda: shard.write_bytes(content[:-1]), "bytes, and"),
        (shard.unlink, "data-00001-of-00002: no such file"),
        (shard.mkdir, "is a folder"),
        (lambda: (shard.rmdir(), os.mkfifo(shard)), "is a pipe, a device or a socket"),
        (lambda: (shard.unlink(), shard.symlink_to("/dev/zero")), "is a pipe, a device or a socket"),
    ):
        change()  # type: ignore[operator]
        with pytest.raises(ValueError, match=message):
            from_openai(folder)
    shard.unlink()
    shard.write_bytes(content)
    index = folder / "model.ckpt-7.index"
    index.unlink()
    os.mkfifo(index)
    with pytest.raises(ValueError, match=r"model\.ckpt-7\.index: is a pipe"):
        from_openai(index)


def test_without_the_compiled_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_C", None)
    with pytest.raises(backend.BackendUnavailableError, match="crc32c"):
        from_openai(folder)


# --- damage ------------------------------------------------------------------------------------------------------


def spoil(data: bytes, draw: random.Random) -> bytes:
    """One of the ways in which files go bad."""
    at, length = draw.randrange(len(data)), draw.choice((1, 2, 8, 64))
    end = at + length
    return draw.choice(
        (
            lambda: data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :],
            lambda: data[:at] + draw.randbytes(length) + data[end:],
            lambda: data[:at] + bytes(length) + data[end:],
            lambda: data[:at],
            lambda: data[:at] + data[end:],
            lambda: data[:at] + draw.randbytes(length) + data[at:],
            lambda: data[:at] + data[end : end + length] + data[at:end] + data[end + length :],
        )
    )()


def test_every_damage_is_noticed(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Of the index or of a shard, in what is used or not; by a ValueError and nothing else."""
    count = 2500 if request.config.getoption("--soak") else 200
    bundles.write_bundle(tmp_path / "model", bundles.network(width=8, inner=12, layers=1), 3)
    good = {path: path.read_bytes() for path in tmp_path.iterdir()}
    draw, tried = random.Random(0), 0
    assert len(good) == 4
    while tried < count:
        path = draw.choice((tmp_path / "model.index", *good))
        bad = spoil(good[path], draw)
        if bad == good[path]:
            continue
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
            read_all(tmp_path)
        path.write_bytes(good[path])
        tried += 1
    read_all(tmp_path)


def test_every_byte_of_the_index(tmp_path: Path) -> None:
    bundles.write_bundle(tmp_path / "model", {"model/a": torch.ones(2), "model/b": torch.ones(3)})
    index = tmp_path / "model.index"
    good = index.read_bytes()
    for at, bit in itertools.product(range(len(good)), (1, 128)):
        index.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
        with pytest.raises(ValueError, match=re.escape(str(index))):
            bundle.Bundle(tmp_path / "model")


def test_malice_is_a_value_error(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Blocks that were changed and then given the right checksums: refused, or as good as before; nothing else."""
    count = 2500 if request.config.getoption("--soak") else 200
    entries = bundles.write_bundle(tmp_path / "model", bundles.network(width=8, inner=12, layers=1), 3)
    draw, messages = random.Random(1), []
    for _ in range(count):
        chosen = draw.randrange(len(entries) // 4)  # fewer than there are blocks

        def change(number: int, block: bytes, chosen: int = chosen) -> bytes:
            return spoil(block, draw) if number == chosen else block

        (tmp_path / "model.index").write_bytes(bundles.table(entries, damage=change))
        try:
            read_all(tmp_path)
        except ValueError as error:
            messages.append(str(error))
    assert all(str(tmp_path) in message for message in messages)
    assert len(messages) > 0.5 * count
