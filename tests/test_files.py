"""Files are found or refused with one clear line, read with bounds, and written whole or not at all."""

from __future__ import annotations

import errno
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from igpt_fast import files

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _hub_cache(root: Path, name: str, content: dict[str, bytes]) -> Path:
    """The layout that huggingface_hub leaves after a download."""
    repository = root / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for i, (filename, data) in enumerate(content.items()):
        (repository / "blobs" / f"blob{i}").write_bytes(data)
        (snapshot / filename).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / filename).symlink_to(
            os.path.relpath(repository / "blobs" / f"blob{i}", (snapshot / filename).parent)
        )
    return snapshot


def test_finds_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.json").write_text("{}")
    assert files.find_file(tmp_path, "a.json", subfolder="sub") == tmp_path / "sub" / "a.json"
    assert files.find_file(str(tmp_path), "b.json", required=False) is None
    with pytest.raises(FileNotFoundError, match=r"has no b\.json"):
        files.find_file(tmp_path, "b.json")
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        files.find_file(tmp_path, "b.json", subfolder="none")


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/b", "a\\b", "..", "", "a\0b"])
def test_only_plain_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not a plain file name"):
        files.find_file(tmp_path, name)


def test_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, error, reason in [
        ("folder", ValueError, "a folder"),
        ("pipe", ValueError, "a pipe or a device"),
        ("zero", ValueError, "a pipe or a device"),
        ("loop", FileNotFoundError, "link to nothing, or to itself"),
        ("dangling", FileNotFoundError, "link to nothing, or to itself"),
    ]:
        for required in (True, False):
            with pytest.raises(error, match=f"{name}: is .*{reason}"):
                files.find_file(tmp_path, name, required=required)
    with pytest.raises(FileNotFoundError, match="link to nothing, or to itself"):
        files.find_file(tmp_path / "loop", "a")


def test_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file: is a file; give its folder"):
        files.find_file(tmp_path / "file", "a")
    with pytest.raises(ValueError, match="empty"):
        files.find_file("", "a")
    for name in [str(tmp_path / "none"), "./none", "~/none", "one/two/three", "x" * 5000]:
        with pytest.raises(FileNotFoundError, match="no such folder") as caught:
            files.find_file(name, "a")
        assert len(str(caught.value)) < 400
    with pytest.raises(ValueError, match="neither a folder nor a hub name") as bad:
        files.find_file("not a name!", "a")
    assert "\n" not in str(bad.value)


def test_hub_cache_offline(tmp_path: Path) -> None:
    snapshot = _hub_cache(tmp_path, "some/model", {"config.json": b"{}", "sub/a.bin": b"1"})
    for local_files_only in (True, False):
        where = {"cache_dir": tmp_path, "local_files_only": local_files_only}
        assert files.find_file("some/model", "config.json", **where) == snapshot / "config.json"
        assert files.find_file("some/model", "a.bin", subfolder="sub", **where) == snapshot / "sub" / "a.bin"
        assert files.find_file("some/model", "a.bin", required=False, **where) is None
        for name in ("some/model", "some/other"):
            with pytest.raises(FileNotFoundError, match=rf"{name}: .*a\.bin .*neither in the cache") as caught:
                files.find_file(name, "a.bin", **where)
            assert "\n" not in str(caught.value)
        # Nothing is known about a repository that was never seen: not "it has none".
        with pytest.raises(FileNotFoundError, match="neither in the cache"):
            files.find_file("some/other", "a.bin", required=False, **where)


@pytest.mark.clock
def test_unreachable_hub_is_quick_and_clear(tmp_path: Path) -> None:
    _hub_cache(tmp_path, "some/model", {"config.json": b"{}"})
    code = f"""
import threading
import time
from igpt_fast import files
files.find_file("some/model", "config.json", cache_dir={str(tmp_path)!r})
import huggingface_hub.errors
start = time.perf_counter()
try:
    files.find_file("some/other", "config.json", cache_dir={str(tmp_path)!r})
except FileNotFoundError as error:
    print(f"{{time.perf_counter() - start}}|{{error}}|")
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment = {k: v for k, v in environment.items() if not k.lower().endswith("_proxy")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seconds, message, _ = done.stdout.split("|")
    assert float(seconds) < 10
    assert message.startswith("some/other: no such folder; and config.json")
    assert "reachable" in message
    assert "\n" not in message


def test_read_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, "ä"]}', encoding="utf-8")
    assert files.read_json(path) == {"a": [1, "ä"]}
    assert files.read_json(path, max_bytes=path.stat().st_size) == {"a": [1, "ä"]}
    with pytest.raises(ValueError, match=r"a\.json: not usable JSON: larger than"):
        files.read_json(path, max_bytes=path.stat().st_size - 1)
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "none.json")
    for content in [b"", b"{", b"[1]", b"\xff\xfe{}", b'{"a":' * 100_000, b'{"a": ' + b"1" * 5000 + b"}", b"<html>"]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.json: not usable JSON"):
            files.read_json(path)
    with path.open("wb") as file:
        file.truncate(1 << 30)
    start = time.process_time()
    with pytest.raises(ValueError, match="larger than 1 MiB"):
        files.read_json(path, max_bytes=1 << 20)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"a": NaN}', "a is nan; want a finite number, at most 1.8e+308"),
        ('{"a": {"b": [1, -Infinity]}}', "b is -inf; want"),
        ('{"a": 1e400}', "a is inf; want"),
        ('{"a": ' + "9" * 400 + "}", "a is 9999"),
        ('{"a": ' + "[" * 64 + "]" * 64 + "}", "more than 64 levels"),
        ('{"a": ' * 65 + "1" + "}" * 65, "more than 64 levels"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "has c twice"),
    ],
)
def test_json_that_others_read_otherwise(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"a\.json: not usable JSON: ") as caught:
        files.read_json(path)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 300
    path.write_text('{"a": [' + "[" * 61 + "]" * 61 + ", -0, -0.0, 1.7e308, 1" + "0" * 308 + "]}")
    assert files.read_json(path)["a"][1] == 0


def test_many_names_are_counted_at_once() -> None:
    """The page reads what anybody sends: to look for each name among all took a minute for a MiB."""
    names = ", ".join(f'"{number}": 1' for number in (*range(50_000), 7))
    start = time.process_time()
    with pytest.raises(ValueError, match="has 7 twice"):
        files.parse_json(b"{" + names.encode() + b"}")
    assert time.process_time() - start < 2


def test_open_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    with files.open_input(tmp_path / "file") as file:
        assert file.read() == b"abc"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for size, most in ((10, 10), (11, 10)):
        writer = threading.Thread(target=pipe.write_bytes, args=(b"x" * size,))
        writer.start()
        if size > most:
            with pytest.raises(ValueError, match="pipe: the pipe holds more than"):
                files.open_input(pipe, most)
        else:
            with files.open_input(pipe, most) as file:
                assert file.seek(0, os.SEEK_END) == size
        writer.join()
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    for name, error, reason in [
        (tmp_path, IsADirectoryError, "is a folder, not a file"),
        (tmp_path / "none", FileNotFoundError, "none: no such file"),
        (tmp_path / "file" / "below", FileNotFoundError, "below: no such file"),
        (tmp_path / "dangling", FileNotFoundError, "dangling: is a link to nothing"),
        (tmp_path / "loop", ValueError, "loop: not a usable file name"),
        (tmp_path / "socket", ValueError, "socket: is a device or a socket"),
        ("/dev/zero", ValueError, "/dev/zero: is a device or a socket"),
        ("/dev/kmsg", ValueError if os.path.exists("/dev/kmsg") else FileNotFoundError, "/dev/kmsg: "),
        ("a\0b", ValueError, "not a usable file name"),
        ("x" * 5000, ValueError, "not a usable file name"),
    ]:
        with pytest.raises(error, match=reason) as caught:
            files.open_input(name)
        assert len(str(caught.value)) < 1000
    listener.close()
    with pytest.raises(ValueError, match="/dev/zero: is a device"):
        files.read_json("/dev/zero")


def test_open_input_looks_at_what_it_has_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may have put a device, or a pipe that nobody writes to, in the file's place by then."""
    regular = tmp_path / "file"
    regular.write_bytes(b"1")
    os.mkfifo(tmp_path / "pipe")
    before = regular.stat()
    monkeypatch.setattr(Path, "stat", lambda *_, **__: before)
    for other in ("/dev/zero", tmp_path / "pipe"):
        with pytest.raises(ValueError, match="has become another kind of file"):
            files.open_input(other)


def test_replacing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with files.replacing(path) as partial:
        partial.write_text("1")
        assert not path.exists()
    assert path.read_text() == "1"

    def interrupted() -> None:
        with files.replacing(path) as partial:
            partial.write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(FileExistsError, match="exists already"), files.replacing(path, overwrite=False):
        pass
    with pytest.raises(IsADirectoryError, match="is a folder"), files.replacing(tmp_path):
        pass
    with pytest.raises(FileNotFoundError), files.replacing(tmp_path / "none" / "a"):
        pass
    assert path.read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
def test_permissions_are_those_of_any_new_file(tmp_path: Path, umask: int) -> None:
    """Without touching the umask, which belongs to all threads."""
    code = f"""
import os
from igpt_fast import files
os.umask({umask})
os.umask = None
with files.replacing({str(tmp_path / "a")!r}) as partial:
    partial.write_text("1")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize(
    "name", ["x" * 251 + ".npy", "x." + "y" * 253, "ü" * 125 + ".json", "." * 255, "." + "é" * 127]
)
def test_any_legal_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("old")
    with files.replacing(tmp_path / name) as partial:
        partial.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "new"


def _raise(error: OSError) -> Any:
    raise error


def test_a_failed_write_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for make, number in [
        (lambda p: OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (lambda p: OSError(errno.EFBIG, "File too large", str(p)), errno.EFBIG),
        (lambda p: PermissionError(errno.EACCES, "Permission denied", p), errno.EACCES),
    ]:
        with pytest.raises(OSError) as caught, files.replacing(path) as partial:
            _raise(make(partial))
        assert (caught.value.errno, caught.value.filename) == (number, str(path))
        assert caught.value.__cause__ is not caught.value
        assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match=r"a\.bin: encoder error"), files.replacing(path):
        raise OSError("encoder error -2")
    with pytest.raises(FileNotFoundError, match=r"elsewhere") as other, files.replacing(path):
        _raise(FileNotFoundError(errno.ENOENT, "No such file", "elsewhere"))
    assert other.value.filename == "elsewhere"
    with pytest.raises(FileNotFoundError) as missing, files.replacing(tmp_path / "none" / "a"):
        pass
    assert missing.value.filename == str(tmp_path / "none" / "a")


def test_a_write_beyond_the_limit_names_the_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.bin"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=r"a\.bin'$") as caught, files.replacing(path) as partial:
            partial.write_bytes(b"0" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert not list(tmp_path.iterdir())


def npy(header: str, payload: bytes = b"", version: int = 1) -> io.BytesIO:
    text = header.encode().ljust(118 - 1) + b"\n"
    return io.BytesIO(b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 * version, "little") + text + payload)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "u1", "?", "<i8"])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_read_npy(shape: tuple[int, ...], dtype: str, order: Any) -> None:
    array = np.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype), order=order)
    file = io.BytesIO()
    np.save(file, array)
    file.seek(0)
    got = files.read_npy(file, array.nbytes)
    assert (got.dtype, got.shape) == (array.dtype, shape)
    np.testing.assert_array_equal(got, array)
    if array.nbytes:
        file.seek(0)
        with pytest.raises(ValueError, match=f"claims {array.nbytes} bytes; at most {array.nbytes - 1} are read"):
            files.read_npy(file, array.nbytes - 1)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (io.BytesIO(), "magic"),
        (io.BytesIO(b"hello world"), "magic"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", b"\0" * 7), "truncated: 7 bytes of 8"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (10**12,), }"), "."),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"), "claims 4000000000000 bytes"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }"), "shape"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 1000000000000000000000), }"), "."),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"cos\nabort\n(tR."), "not numbers"),
        (npy("{'descr': '<U4', 'fortran_order': False, 'shape': (1,), }"), "not numbers"),
        (npy("__import__('os').abort()"), "."),
        (npy("(" * 117), "."),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", b"\0" * 4, version=3), "version"),
    ],
)
def test_read_npy_refuses(file: io.BytesIO, reason: str) -> None:
    file.seek(0)
    with pytest.raises(ValueError, match=rf"not a usable \.npy file: .*{reason}") as caught:
        files.read_npy(file, 1000)
    assert "\n" not in str(caught.value)


def test_first_line() -> None:
    assert files.first_line(ValueError("\n one\ntwo")) == "one"
    assert files.first_line(MemoryError()) == "MemoryError"


def test_replacing_a_link_leaves_its_target(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("old")
    (tmp_path / "link").symlink_to("blob")
    with files.replacing(tmp_path / "link") as partial:
        partial.write_text("new")
    assert (tmp_path / "link").read_text() == "new"
    assert (tmp_path / "blob").read_text() == "old"


def test_replacing_together_is_all_or_nothing(tmp_path: Path) -> None:
    names = [tmp_path / "a", tmp_path / "b"]
    for path in names:
        path.write_text("old")
    outdated = tmp_path / "index"
    outdated.write_text(json.dumps({}))

    def full() -> None:
        with files.replacing_together(names, outdated=[outdated]) as partials:
            partials[0].write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        full()
    assert [p.read_text() for p in names] == ["old", "old"]
    assert outdated.exists()
    with files.replacing_together(names, outdated=[outdated]) as partials:
        for partial in partials:
            partial.write_text("new")
        assert [p.read_text() for p in names] == ["old", "old"]
    assert [p.read_text() for p in names] == ["new", "new"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
