"""Token files, folders of images, and the baselines."""

import io
import math
import os
import threading
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from igpt_fast.image.folders import find_images
from igpt_fast.learning import data as data_module
from igpt_fast.learning.data import TokenData, load_tokens, save_tokens
from igpt_fast.learning.evaluate import histogram_nats, lookup_table_nats
from igpt_fast.learning.folders import held_out, tokens_from_images

BUNDLED = Path(__file__).parents[2] / "igpt_fast" / "assets" / "emoji16.npz"


def some(n: int = 12, side: int = 3, k: int = 5, seed: int = 0) -> TokenData:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, k, (n, side * side), generator=generator)
    clusters = np.linspace(-1, 1, 3 * k, dtype=np.float32).reshape(k, 3)
    return TokenData(tokens, clusters, torch.arange(n) % 4 == 0)


@pytest.mark.parametrize(("k", "dtype"), [(5, "uint8"), (256, "uint8"), (257, "uint16")])
def test_token_files_come_back(tmp_path: Path, k: int, dtype: str) -> None:
    data = some(k=k)
    data.tokens[0, 0] = k - 1
    save_tokens(data, tmp_path / "a.npz", names=[f"n{i}" for i in range(12)])
    again = load_tokens(tmp_path / "a.npz")
    assert torch.equal(again.tokens.long(), data.tokens)
    assert again.tokens.element_size() == np.dtype(dtype).itemsize
    assert torch.equal(again.heldout, data.heldout)
    assert np.array_equal(again.clusters, data.clusters)
    assert again.fingerprint() == data.fingerprint()
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["tokens"].dtype == dtype
        assert arrays["names"][11] == "n11"
    save_tokens(data, tmp_path / "b.npz", names=[f"n{i}" for i in range(12)])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_save_tokens_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.npz"):
        save_tokens(some(), tmp_path / "a.npy")
    with pytest.raises(ValueError, match="1 names for 12 images"):
        save_tokens(some(), tmp_path / "a.npz", names=["x"])
    (tmp_path / "a.npz").write_text("mine")
    with pytest.raises(FileExistsError):
        save_tokens(some(), tmp_path / "a.npz", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert (tmp_path / "a.npz").read_text() == "mine"


def test_fingerprint_sees_every_array() -> None:
    data = some()
    tokens, clusters, heldout = data.tokens.clone(), data.clusters.copy(), data.heldout.clone()
    tokens[3, 3] = (tokens[3, 3] + 1) % 5
    clusters[0, 0] += 0.5
    heldout[1] = True
    others = [
        TokenData(tokens, data.clusters, data.heldout),
        TokenData(data.tokens, clusters, data.heldout),
        TokenData(data.tokens, data.clusters, heldout),
    ]
    assert len({item.fingerprint() for item in [data, *others]}) == 4


def _arrays() -> dict[str, np.ndarray]:
    data = some()
    return {
        "tokens": data.tokens.numpy().astype(np.uint8),
        "clusters": data.clusters,
        "heldout": data.heldout.numpy(),
    }


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("tokens", None, "has no array 'tokens'"),
        ("heldout", None, "has no array 'heldout'"),
        ("tokens", np.zeros((12, 8), np.uint8), "8 tokens are not a square image"),
        ("tokens", np.zeros((12, 0), np.uint8), "tokens must be"),
        ("tokens", np.zeros((0, 9), np.uint8), "tokens must be"),
        ("tokens", np.zeros((12, 9), np.float32), "tokens must be"),
        ("tokens", np.zeros((12, 3, 3), np.uint8), "tokens must be"),
        ("tokens", np.full((12, 9), 5, np.uint8), r"token 5 is not in 0\.\.4"),
        ("tokens", np.full((12, 9), -1, np.int64), "token -1 is not in"),
        ("tokens", np.full((12, 9), 1 << 63, np.uint64), "tokens must be"),
        ("tokens", np.full((12, 9), {}, object), "numbers"),
        ("clusters", np.zeros((5, 3), np.uint8), "clusters: dtype uint8"),
        ("clusters", np.zeros((5, 4), np.float32), "clusters: shape"),
        ("clusters", np.full((5, 3), np.nan, np.float32), "finite"),
        ("heldout", np.zeros(12, np.uint8), "heldout must be"),
        ("heldout", np.zeros(11, bool), "heldout must be"),
        ("heldout", np.ones(12, bool), "at least one image"),
    ],
)
def test_bad_token_files(tmp_path: Path, name: str, value: np.ndarray | None, reason: str) -> None:
    arrays = {**_arrays(), name: value}
    path = tmp_path / "bad.npz"
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"bad\.npz: not a token file: .*{reason}"):
        load_tokens(path)


def test_files_that_are_no_token_files(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    with pytest.raises(FileNotFoundError, match=r"bad\.npz"):
        load_tokens(path)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_tokens(tmp_path)
    with pytest.raises(ValueError, match="/dev/zero: is a device"):
        load_tokens("/dev/zero")
    good = io.BytesIO()
    np.savez_compressed(good, **_arrays())  # type: ignore[arg-type]
    content = good.getvalue()
    flipped = bytearray(content)
    flipped[60] ^= 0xFF  # inside the packed data
    for damaged in (b"", b"text" * 50, content[:-30], content[: len(content) // 2], bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"bad\.npz: not a token file: .") as caught:
            load_tokens(path)
        assert "\n" not in str(caught.value)


def test_tokens_in_a_pipe(tmp_path: Path) -> None:
    save_tokens(some(), tmp_path / "a.npz")
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=((tmp_path / "a.npz").read_bytes(),))
    writer.start()
    assert load_tokens(tmp_path / "pipe").fingerprint() == some().fingerprint()
    writer.join()


def _npz(path: Path, tokens_header: dict, body: bytes, method: int = zipfile.ZIP_DEFLATED) -> None:
    """A token file whose tokens have a header of one's own."""
    arrays = _arrays()
    with zipfile.ZipFile(path, "w", method) as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, tokens_header)
        archive.writestr("tokens.npy", header.getvalue() + body)
        for name in ("clusters", "heldout"):
            buffer = io.BytesIO()
            np.save(buffer, arrays[name])
            archive.writestr(f"{name}.npy", buffer.getvalue())


def test_zip_bombs_and_false_headers_are_refused(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "bomb.npz"
    claims = {"descr": "|u1", "fortran_order": False, "shape": (1 << 22, 1 << 20)}
    cases = [
        (claims, b"\0" * 100, zipfile.ZIP_DEFLATED, "claims 4398046511104 bytes; at most 228 are read"),
        ({**claims, "shape": (12, 10**9)}, b"\0" * (100 << 20), zipfile.ZIP_DEFLATED, "claims to unpack to"),
        ({**claims, "shape": (-1, 9)}, b"\0" * 108, zipfile.ZIP_DEFLATED, "has the shape"),
        ({**claims, "shape": (12, 9)}, b"\0" * 108, zipfile.ZIP_LZMA, "packed by a method"),
        ({**claims, "shape": (12, 9), "descr": "|O"}, b"\0" * 864, zipfile.ZIP_DEFLATED, "not numbers"),
    ]
    for header, body, method, reason in cases:
        _npz(path, header, body, method)
        tracemalloc.start()
        with pytest.raises(ValueError, match=rf"bomb\.npz: not a token file: .*{reason}"):
            load_tokens(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
        tracemalloc.stop()


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "flat.npz"
    claims = {"descr": "|u1", "fortran_order": False, "shape": (63 << 12, 1 << 8)}
    _npz(path, claims, b"\0" * (63 << 20))
    assert path.stat().st_size < 1 << 17
    tracemalloc.start()
    with pytest.raises(ValueError, match="claims to unpack to"):
        load_tokens(path)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    # What is believed is held as narrow as it was stored, the fingerprint notwithstanding.
    arrays = {**_arrays(), "tokens": np.zeros((1 << 16, 256), np.uint8), "heldout": np.zeros(1 << 16, bool)}
    np.savez(path, **arrays)  # type: ignore[arg-type]
    tracemalloc.reset_peak()
    assert load_tokens(path).fingerprint()
    assert tracemalloc.get_traced_memory()[1] < 5 * (16 << 20)
    tracemalloc.stop()


def test_memory_that_is_short_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    save_tokens(some(), path)

    def short(*args: object) -> None:
        raise MemoryError("Unable to allocate")

    with monkeypatch.context() as patch:
        patch.setattr(data_module, "_narrow", short)
        with pytest.raises(MemoryError, match="Unable to allocate"):
            load_tokens(path)
    # Python's parser has the same error for a header that it cannot parse.
    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", short)
    with pytest.raises(ValueError, match=r"a\.npz: not a token file: tokens\.npy: not a usable \.npy file: "):
        load_tokens(path)


@pytest.mark.parametrize("dtype", ["i1", "u1", "<u2", ">u2", ">i4", "u4", "<i8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_tokens_of_any_integer_type(tmp_path: Path, dtype: str, order: str) -> None:
    """The type they are stored in changes neither the tokens nor the fingerprint."""
    arrays = _arrays()
    arrays["tokens"] = np.array(arrays["tokens"], dtype=dtype, order=order)  # type: ignore[call-overload]
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    data = load_tokens(tmp_path / "a.npz")
    assert data.tokens.dtype == torch.uint8
    assert torch.equal(data.tokens.long(), some().tokens)
    assert data.fingerprint() == some().fingerprint()


def test_baselines_with_as_many_colours_as_the_type_holds() -> None:
    wide = some(n=40, k=256)
    narrow = TokenData(wide.tokens.to(torch.uint8), wide.clusters, wide.heldout)
    assert lookup_table_nats(narrow) == lookup_table_nats(wide)
    assert histogram_nats(narrow) == histogram_nats(wide)


def test_bundled_data() -> None:
    data = load_tokens(BUNDLED)
    # Training states name it; another value would make them useless.
    assert data.fingerprint() == "ff27a49fd7cd6ad7d4441cafaa7a4e80addaf7da1545996f7aee67d5b92c4248"
    assert (len(data.tokens), data.side, data.n_clusters, int(data.heldout.sum())) == (3812, 16, 128, 380)
    assert data.clusters[0].tolist() == [1.0, 1.0, 1.0]
    # Both sets hold out the same emoji.
    assert torch.equal(data.heldout[:1906], data.heldout[1906:])
    assert lookup_table_nats(data) == pytest.approx(1.684, abs=0.001)
    assert histogram_nats(data) == pytest.approx(3.916, abs=0.001)


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (10, 6)) -> Image.Image:
    return Image.new("RGB", size, colour)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    (root / "deep" / "er").mkdir(parents=True)
    (root / ".hidden").mkdir()
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    for i in range(20):
        where = root if i % 2 else root / "deep" / "er"
        picture(colours[i % 4]).save(where / f"{i:02}.{('png', 'bmp')[i % 3 == 0]}")
    picture((9, 9, 9)).save(root / ".hidden" / "no.png")
    picture((9, 9, 9)).save(root / "._no.png")
    (root / "readme.txt").write_text("not a picture")
    return root


def test_find_images(folder: Path, tmp_path: Path) -> None:
    found = find_images(folder)
    assert len(found) == 20
    assert found == sorted(found)
    assert {path.suffix for path in found} == {".png", ".bmp"}
    picture((1, 2, 3)).save(folder / "UPPER.JPG")
    assert folder / "UPPER.JPG" in find_images(folder)
    with pytest.raises(NotADirectoryError, match="no such directory"):
        find_images(tmp_path / "none")


def test_tokens_from_images(folder: Path) -> None:
    data = tokens_from_images(folder, 2, 4, holdout=0.2, seed=0)
    assert data.tokens.shape == (20, 4)
    names = [path.relative_to(folder).as_posix() for path in find_images(folder)]
    assert data.heldout.tolist() == [held_out(name, 0.2) for name in names]
    assert 0 < int(data.heldout.sum()) < 10
    # Four flat colours, four clusters: every picture is one token, and comes back as what it was.
    colours = np.rint((data.clusters[data.tokens.numpy()] + 1) * 127.5).astype(int)
    for name, pixels in zip(names, colours, strict=True):
        with Image.open(folder / name) as original:
            assert (pixels == original.getpixel((0, 0))).all(), name
    given = tokens_from_images(folder, 2, 4, holdout=0.2, clusters=data.clusters[::-1].copy())
    assert torch.equal(given.tokens, 3 - data.tokens)
    assert torch.equal(tokens_from_images(folder, 2, 4, holdout=0.2, seed=1).heldout, data.heldout)


def test_the_middle_square_is_cut_out(tmp_path: Path) -> None:
    wide = Image.new("RGB", (30, 10), "red")
    wide.paste(Image.new("RGB", (10, 10), "blue"), (10, 0))
    wide.save(tmp_path / "wide.png")
    wide.rotate(90, expand=True).save(tmp_path / "tall.png")
    clusters = np.array([[1, -1, -1], [-1, -1, 1]], dtype=np.float32)
    data = tokens_from_images(tmp_path, 4, 2, holdout=0.0, clusters=clusters)
    assert bool((data.tokens == 1).all())


def test_holdout_is_stable_when_files_are_added(folder: Path) -> None:
    clusters = np.array([[1, -1, -1], [-1, -1, 1]], dtype=np.float32)

    def split() -> dict[str, bool]:
        data = tokens_from_images(folder, 2, 2, holdout=0.3, clusters=clusters)
        return dict(zip(map(str, find_images(folder)), data.heldout.tolist(), strict=True))

    before = split()
    for i in range(15):
        picture((i, i, i)).save(folder / f"a{i}.png")
    after = split()
    assert before.items() <= after.items()
    names = [f"n{i}" for i in range(20000)]
    assert sum(held_out(name, 0.1) for name in names) == pytest.approx(2000, abs=130)
    assert not any(held_out(name, 0.0) for name in names)
    # A larger fraction only adds.
    assert all(held_out(name, 0.2) for name in names if held_out(name, 0.1))


def test_unreadable_images_are_named(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 20)
    (folder / "text.jpg").write_text("hello")
    (folder / "line\nbreak.gif").write_text("hello")
    with pytest.raises(ValueError, match=r"3 of 23 images cannot be read: .*broken\.png.*text\.jpg"):
        tokens_from_images(folder, 2, 4)
    with pytest.warns(UserWarning, match="^skipped") as caught:
        data = tokens_from_images(folder, 2, 4, skip_unreadable=True)
    assert len(data.tokens) == 20
    assert data.skipped == 3
    lines = [str(warning.message) for warning in caught]
    for line, name in zip(lines, ("broken.png", "line break.gif", "text.jpg"), strict=True):
        assert line == f"skipped {folder / name}: not a readable image: no known image format"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (folder / "broken.png").unlink()
        (folder / "text.jpg").unlink()
        (folder / "line\nbreak.gif").unlink()
        assert tokens_from_images(folder, 2, 4, skip_unreadable=True).skipped == 0


def test_tokens_from_images_refuses(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="side is 0"):
        tokens_from_images(folder, 0, 4)
    with pytest.raises(ValueError, match="holdout is"):
        tokens_from_images(folder, 2, 4, holdout=1.0)
    with pytest.raises(ValueError, match="4 colours"):
        tokens_from_images(folder, 2, 50)
    with pytest.raises(ValueError, match="n_clusters is 4, but 2 clusters"):
        tokens_from_images(folder, 2, 4, clusters=np.eye(3, dtype=np.float32)[:2])
    (tmp_path / "false").mkdir()
    (tmp_path / "false" / "a.png").write_text("hello")
    with pytest.warns(UserWarning, match="a.png"), pytest.raises(ValueError, match="none of its 1 images can be read"):
        tokens_from_images(tmp_path / "false", 2, 4, skip_unreadable=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        tokens_from_images(tmp_path / "empty", 2, 4)
    with pytest.raises(NotADirectoryError):
        tokens_from_images(tmp_path / "none", 2, 4)
    (tmp_path / "one").mkdir()
    name = next(f"{i}.png" for i in range(1000) if held_out(f"{i}.png", 0.5))
    picture((1, 2, 3)).save(tmp_path / "one" / name)
    with pytest.raises(ValueError, match="leaves none of the 1 images"):
        tokens_from_images(tmp_path / "one", 2, 2, holdout=0.5)


def test_lookup_table_by_hand() -> None:
    """One training and one held-out image of 2x2 in two colours, every count done on paper."""
    data = TokenData(
        torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0]]),
        np.array([[0, 0, 0], [1, 1, 1]], dtype=np.float32),
        torch.tensor([False, True]),
    )
    s = 16.0
    overall = [2 / 6, 4 / 6]

    def smooth(seen: int, context: int, prior: float) -> float:
        return (seen + s * prior) / (context + s)

    # Pixel 0: left and up outside; seen once, colour 0. Outside on the left twice (0, 1), above twice (0, 1).
    p0 = smooth(1, 1, smooth(1, 2, overall[0]))
    # Pixel 1 (colour 1): left 0, up outside; left 0 once, colour 1; outside above twice, once colour 1.
    p1 = smooth(1, 1, (smooth(1, 1, overall[1]) + smooth(1, 2, overall[1])) / 2)
    # Pixel 2 (colour 0): left outside, up 0: seen once, colour 1; outside on the left twice, once colour 0; up 0 once.
    p2 = smooth(0, 1, (smooth(1, 2, overall[0]) + smooth(0, 1, overall[0])) / 2)
    # Pixel 3 (colour 0): left 0, up 1: the pair was never seen (there it was 1, 1); left 0 once (1), up 1 once (1).
    p3 = smooth(0, 0, (smooth(0, 1, overall[0]) + smooth(0, 1, overall[0])) / 2)
    expected = -sum(map(math.log, (p0, p1, p2, p3))) / 4
    assert lookup_table_nats(data) == pytest.approx(expected, rel=1e-12)
    # Histogram: each position was seen once: (count + 1/2) / (1 + 1).
    assert histogram_nats(data) == pytest.approx(-math.log(0.75 * 0.75 * 0.25 * 0.25) / 4, rel=1e-12)


def test_baselines_are_distributions() -> None:
    """For one-pixel images the probabilities of all colours sum to one, whatever was counted."""
    tokens = torch.tensor([[0]] * 5 + [[2]] * 3 + [[0], [1], [2]])
    heldout = torch.arange(11) >= 8
    for baseline in (lookup_table_nats, histogram_nats):
        total = 0.0
        for colour in range(3):
            part = torch.cat([tokens[:8], torch.tensor([[colour]])])
            data = TokenData(part, np.zeros((3, 3), np.float32), torch.arange(9) == 8)
            total += math.exp(-baseline(data))
        assert total == pytest.approx(1.0)
        everything = TokenData(tokens, np.zeros((3, 3), np.float32), heldout)
        assert baseline(everything) > 0.0
        nothing = TokenData(tokens, np.zeros((3, 3), np.float32), torch.zeros(11, dtype=torch.bool))
        assert math.isnan(baseline(nothing))
