"""Damaged, mislabelled and malicious files: an error that names file and reason; nothing runs, nothing is eaten."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from igpt_fast import files
from igpt_fast.checkpoint import pickles
from igpt_fast.checkpoint import tensors as weights

STATE = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}
HTML = b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 304985753\n"


def torch_bytes(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def refused(path: Path, reason: str) -> str:
    start = time.process_time()
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as caught:
        weights.open_weights(path.parent)
    assert time.process_time() - start < 5
    message = str(caught.value)
    assert str(path) in message
    assert message.isprintable()
    assert len(message) < 1500
    return message


# --- safetensors -------------------------------------------------------------------------------------------------


def header(entries: Any, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: Any, begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    stored = weights.open_weights(tmp_path)
    assert stored.source == tmp_path / "model.safetensors"
    assert {name: (t.shape, t.dtype) for name, t in stored.tensors.items()} == {
        "a": ((3, 4), torch.float32),
        "b": ((5,), torch.bfloat16),
    }
    for name, tensor in STATE.items():
        assert torch.equal(stored.tensors[name].read(), tensor)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"\0" * 7, "truncated or damaged"),
        (HTML, "web page"),
        (b"  \n<?xml version='1.0'?>", "web page"),
        (LFS, "git-lfs pointer"),
        (torch_bytes(STATE), "zip file"),
        (pickle.dumps({"a": 1}), "not a safetensors file"),
        (save(STATE)[:-1], "not a usable safetensors file"),
        (save(STATE)[:40], "truncated or damaged"),
        (save(STATE) + b"x", "not a usable safetensors file"),
        (struct.pack("<Q", 1 << 63) + b"{}", "header claims 9223372036854775808 bytes, the file has 10"),
        (struct.pack("<Q", (1 << 64) - 1) + b"{}", "header claims"),
        (struct.pack("<Q", 5 << 20) + b"{" * (5 << 20), "header of 5242880 bytes"),
        (header({"a": entry([1 << 20, 1 << 20], 0, 1 << 42)}, b"1234"), "not a usable"),
        (header({"a": entry([1 << 40], 0, 4)}, b"1234"), "not a usable"),
        (header({"a": entry([1 << 62, 1 << 62], 0, 4)}, b"1234"), "not a usable"),
        (header({"a": entry([1], 4, 0)}, b"1234"), "not a usable"),
        (header({"a": entry([1], -4, 0)}, b"1234"), "not a usable"),
        (header({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"1234"), "not a usable"),
        (header({"a": entry([1], 0, 4, "F33")}, b"1234"), "not a usable"),
        (header({"a": entry([1], 0, 4, "\x1b" * 99_999)}, b"1234"), "not a usable"),
        (header(b"[]"), "not a usable"),
        (header(b"{" * 1000), "not a usable"),
        (header(b'{"a":' * 100_000), "not a usable"),
        (header(b"\xff\xfe"), "not a usable"),
    ],
)
def test_bad_safetensors(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refused(path, rf"model\.safetensors: .*{reason}")


def test_a_genuine_truncated_file_is_not_called_html(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    text = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    text += b" " * (0x413C - len(text))  # a length that begins with the bytes "<A"
    path.write_bytes((struct.pack("<Q", len(text)) + text)[:1000])
    refused(path, "truncated or damaged")


# --- .bin --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_bin(tmp_path: Path, legacy: bool) -> None:
    odd = {**STATE, "c": torch.arange(6.0).view(2, 3).t(), "d": torch.nn.Parameter(torch.ones(2)), "e": torch.tensor(1)}
    (tmp_path / "pytorch_model.bin").write_bytes(torch_bytes(odd, _use_new_zipfile_serialization=not legacy))
    stored = weights.open_weights(tmp_path)
    assert stored.tensors["e"].dtype == "int64"
    for name, tensor in odd.items():
        assert stored.tensors[name].shape == tuple(tensor.shape)
        assert torch.equal(stored.tensors[name].read(), tensor)
        assert not stored.tensors[name].read().requires_grad


def test_state_dict_of_a_module(tmp_path: Path) -> None:
    """An OrderedDict with ``_metadata``, as ``Module.state_dict`` returns it."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert weights.open_weights(tmp_path).tensors.keys() == model.state_dict().keys()


class Call:
    """Pickles to a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def nested_tuples() -> bytes:
    """A state dict whose key is a tuple that takes 2**100 steps to hash."""
    build = b"\x80\x02}" + b")q\x00" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(100))
    return build + b"K\x01s."


def in_zip(data: bytes, *, compress: bool = False, more: dict[str, bytes] | None = None) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        archive.writestr("x/data.pkl", data)
        archive.writestr("x/version", b"3\n")
        for name, content in (more or {}).items():
            archive.writestr(name, content)
    return file.getvalue()


def claims(change: Callable[[bytearray], None]) -> bytes:
    content = bytearray(torch_bytes(STATE))
    change(content)
    return bytes(content)


def _huge_entry(content: bytearray) -> None:
    at = content.find(b"PK\x01\x02")
    content[at + 20 : at + 28] = b"\xf0\xff\xff\x7f" * 2  # both sizes of the first entry: 2 GiB


def _huge_directory(content: bytearray) -> None:
    at = content.rfind(b"PK\x05\x06")
    content[at + 12 : at + 16] = struct.pack("<I", 1 << 30)


OS_SYSTEM = Call(os.system, "touch {marker}")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: b"", "it is empty"),
        (lambda: HTML, "web page"),
        (lambda: LFS, "git-lfs pointer"),
        (lambda: b"garbage" * 100, "not a usable PyTorch checkpoint"),
        (lambda: save(STATE), "not a usable PyTorch checkpoint"),
        (lambda: torch_bytes(STATE)[:-30], "not a usable PyTorch checkpoint"),
        (lambda: torch_bytes(STATE)[:200], "truncated"),
        (lambda: torch_bytes(STATE, _use_new_zipfile_serialization=False)[:-3], "not a usable PyTorch checkpoint"),
        (lambda: torch_bytes(STATE, _use_new_zipfile_serialization=False)[:100], "not a usable PyTorch checkpoint"),
        (lambda: pickle.dumps(STATE, protocol=2), "neither a zip nor PyTorch's older format"),
        (lambda: pickle.dumps(OS_SYSTEM, protocol=2), r"pickle uses|neither a zip|system"),
        (lambda: torch_bytes({"a": OS_SYSTEM}), r"names posix\.system, which no state dict needs"),
        (lambda: torch_bytes({"a": OS_SYSTEM}, _use_new_zipfile_serialization=False), r"names posix\.system"),
        (lambda: torch_bytes({"a": Call(eval, "1")}), r"names __builtin__\.eval"),
        (lambda: torch_bytes({"a": bytearray(10)}), r"names .*bytearray"),
        (lambda: in_zip(pickle.dumps(OS_SYSTEM, protocol=4)), "protocol 4"),
        (lambda: in_zip(b"\x80\x02c__builtin__\nbytearray\n\x8a\x06" + b"\0\0\0\0\0\x01" + b"\x85R."), "bytearray"),
        (lambda: in_zip(b"\x80\x02\x8a\x06" + b"\0\0\0\0\0\x01" + b"."), "holds the number 1099511627776"),
        (lambda: in_zip(nested_tuples()), "same tuples again"),
        (lambda: in_zip(b"\x80\x02" + b"]" * (5 << 20) + b"."), r"data\.pkl of 5242883 bytes"),
        (lambda: in_zip(b"\x80\x02}.", compress=True), r"data\.pkl is compressed"),
        (lambda: in_zip(b"\x80\x02}.", compress=True, more={"x/data/0": b"\0" * (64 << 20)}), "zip bomb"),
        (lambda: in_zip(b"\x80\x02}.", more={"y/data.pkl": b"\x80\x02}."}), r"2 data\.pkl"),
        (lambda: in_zip(b"\x80\x02K\x01."), "holds a value of type int, not a state dict"),
        (lambda: torch_bytes([torch.ones(1)]), "value of type list"),
        (lambda: torch_bytes({"model": STATE, "step": 1}), "entry model is a value of type dict"),
        (lambda: torch_bytes({1: torch.ones(1)}), "entry 1 is"),
        (lambda: torch_bytes({"a": torch.ones(1).expand(1 << 15, 1 << 15)}), "a: the tensors claim more bytes"),
        (lambda: torch_bytes({str(i): torch.ones(1).expand(1000) for i in range(9)}), "the tensors claim more bytes"),
        (lambda: torch_bytes({"a": torch.eye(2).to_sparse()}), "sparse"),
        (lambda: claims(_huge_entry), "not a usable PyTorch checkpoint: .*(zip bomb|claim)"),
        (lambda: claims(_huge_directory), "zip directory of 1073741824 bytes"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_bad_bin(tmp_path: Path, make: Callable[[], bytes], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(make())
    refused(path, rf"pytorch_model\.bin: .*{reason}")
    assert [p.name for p in tmp_path.iterdir()] == ["pytorch_model.bin"]  # no {marker}: nothing ran


def test_scan_of_other_files_than_state_dicts(tmp_path: Path) -> None:
    """What a training run keeps: containers, plain values, and a tuple that several entries share."""
    path = tmp_path / "train.pt"
    betas = (0.9, 0.95)
    value = {"model": STATE, "groups": [{"betas": betas, "lr": 0.1, "fused": None} for _ in range(3)], "seed": 99999}
    for zipped in (True, False):
        torch.save(value, path, _use_new_zipfile_serialization=zipped)
        assert pickles.scan_torch_file(path, largest=99999) == zipped
        with pytest.raises(ValueError, match=r"^its pickle holds the number 99999; at most 99998 is believed"):
            pickles.scan_torch_file(path, largest=99998)
    path.write_bytes(in_zip(nested_tuples()))
    with pytest.raises(ValueError, match=r"^its pickle uses the same tuples again"):
        pickles.scan_torch_file(path, largest=1 << 32)
    path.write_bytes(torch_bytes({"a": OS_SYSTEM}))
    with pytest.raises(ValueError, match=r"^its pickle names posix\.system"):
        pickles.scan_torch_file(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"^it is empty$"):
        pickles.scan_torch_file(path)
    with pytest.raises(FileNotFoundError):
        pickles.scan_torch_file(tmp_path / "none")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(in_zip(b"\x80\x02}.", more={"x/constants.pkl": b"\x80\x02)."}))
    refused(path, "TorchScript")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_a_value_error_or_harmless(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    good = save(STATE) if kind == "safetensors" else torch_bytes(STATE, _use_new_zipfile_serialization=kind == "zip")
    content = bytearray(good)
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    path.write_bytes(content)
    try:
        read = {name: (tensor, tensor.read()) for name, tensor in weights.open_weights(tmp_path).tensors.items()}
    except ValueError as error:
        reason, read = str(error), {}
    else:
        reason = str(path)
    assert str(path) in reason
    for tensor, value in read.values():
        assert tuple(value.shape) == tensor.shape
        assert value.numel() <= len(content)


def test_a_damaged_zip_header(tmp_path: Path) -> None:
    """Found by the test above: zipfile raises EOFError where it has to skip more than there is."""
    good = torch_bytes(STATE, _use_new_zipfile_serialization=True)
    for at in range(len(good)):
        for value in (0, 1, 29, 128, 255):
            if at < 64 or at > len(good) - 64:
                content = bytearray(good)
                content[at] = value
                (tmp_path / "pytorch_model.bin").write_bytes(content)
                reason = "pytorch_model.bin"
                try:
                    weights.open_weights(tmp_path)
                except ValueError as error:
                    reason = str(error)
                assert "pytorch_model.bin" in reason


# --- sharded -----------------------------------------------------------------------------------------------------


def sharded(folder: Path, weight_map: Any, **shards: dict[str, torch.Tensor]) -> Path:
    for name, state in shards.items():
        save_file(state, folder / f"{name}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_sharded(tmp_path: Path) -> None:
    one, two = ({name: STATE[name]} for name in "ab")
    index = sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}, one=one, two=two)
    stored = weights.open_weights(tmp_path)
    assert stored.source == index
    assert stored.tensors["b"].file == tmp_path / "two.safetensors"
    assert torch.equal(stored.tensors["b"].read(), STATE["b"])


@pytest.mark.parametrize(
    "shard",
    [
        "../one.safetensors",
        "/etc/passwd",
        "/tmp/one.safetensors",
        "sub/one.safetensors",
        "sub\\one.safetensors",
        "..",
        "",
        ".one.safetensors",
        "one.bin",
        "one.safetensors\n",
        "one.safetensors\0.bin",
        "https://example.org/one.safetensors",
        7,
        None,
        ["one.safetensors"],
    ],
)
def test_shard_names(tmp_path: Path, shard: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": STATE["a"]}, tmp_path / "one.safetensors")
    refused(sharded(folder, {"a": shard}), r"index\.json: a: not a plain \.safetensors file name: ")


def test_shards_and_index_disagree(tmp_path: Path) -> None:
    one, two = ({name: STATE[name]} for name in "ab")
    sharded(tmp_path, {"a": "two.safetensors", "b": "one.safetensors"}, one=one, two=two)
    refused(tmp_path / "two.safetensors", r"lacks tensors that model\.safetensors\.index\.json lists there: a$")
    sharded(tmp_path, {"a": "one.safetensors"}, one=STATE)
    refused(tmp_path / "one.safetensors", r"holds tensors that .* does not list there: b$")
    sharded(tmp_path, {"a": "three.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"has no three\.safetensors"):
        weights.open_weights(tmp_path)
    (tmp_path / "three.safetensors").mkdir()
    refused(tmp_path / "three.safetensors", "is a folder, not a file")


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": "a"}])
def test_index_without_a_map(tmp_path: Path, content: Any) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(content))
    refused(index, "has no weight_map")


def test_index_of_a_gigabyte(tmp_path: Path) -> None:
    index = tmp_path / "pytorch_model.bin.index.json"
    with index.open("wb") as file:
        file.truncate(1 << 30)
    refused(index, "larger than 4 MiB")


def test_index_with_too_many_shards(tmp_path: Path) -> None:
    refused(sharded(tmp_path, {str(i): f"{i}.safetensors" for i in range(5000)}), "lists 5000 shards")


def test_weights_that_are_a_folder_or_a_loop(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    refused(tmp_path / "model.safetensors", "link to nothing, or to itself")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path / "model.safetensors", "is a folder, not a file")


def test_names_in_messages_are_short_and_printable() -> None:
    text = files.listed(["x" * 10_000, "line\nbreak", "\x1b[31mred"])
    assert len(text) < 200
    assert text.isprintable()
    assert files.listed(str(i) for i in range(10)) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
