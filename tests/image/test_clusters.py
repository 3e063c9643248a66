"""The palette: quantize and dequantize on arrays and tensors, fitting, and the files."""

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from igpt_fast.image import clusters as clusters_module
from igpt_fast.image.clusters import dequantize, fit_clusters, load_clusters, quantize, save_clusters


def palette(k: int = 512, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (k, 3)).astype(np.float32)


def nearest(values: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """The definition, with its N x K temporary; float64."""
    return ((values.astype(np.float64)[..., None, :] - clusters.astype(np.float64)) ** 2).sum(-1).argmin(-1)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9).map(lambda s: (*s, 3))))
def test_uint8_is_exact(images: np.ndarray) -> None:
    clusters = palette(37)
    tokens = quantize(images, clusters)
    assert tokens.dtype == np.int64
    np.testing.assert_array_equal(tokens, nearest(images / 127.5 - 1.0, clusters))
    torch.testing.assert_close(quantize(torch.from_numpy(images), clusters), torch.from_numpy(np.asarray(tokens)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_floats(dtype: str) -> None:
    images = np.random.default_rng(1).uniform(-1, 1, (3, 5, 7, 3)).astype(dtype)
    clusters = palette(64)
    tokens = quantize(images, clusters)
    values = images.astype(np.float32)
    chosen = ((values - clusters[tokens]).astype(np.float64) ** 2).sum(-1)
    best = ((values - clusters[nearest(values, clusters)]).astype(np.float64) ** 2).sum(-1)
    assert np.all(chosen <= best * (1 + 1e-6) + 1e-12)
    assert np.mean(tokens == nearest(values, clusters)) > 0.99


def test_a_strided_readonly_reversed_array() -> None:
    images = np.random.default_rng(1).integers(0, 256, (8, 9, 6), dtype=np.uint8)
    images.flags.writeable = False
    view = images[::-2, :, ::-2]
    np.testing.assert_array_equal(quantize(view, palette()), quantize(view.copy(), palette()))


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint32", "uint64", ">i4"])
def test_integers_are_colours(dtype: str) -> None:
    images = np.random.default_rng(1).integers(0, 128 if dtype == "int8" else 256, (5, 7, 3)).astype(dtype)
    tokens = quantize(images.astype(np.uint8), palette())
    np.testing.assert_array_equal(quantize(images, palette()), tokens)
    assert quantize(images[:0], palette()).shape == (0, 7)
    if dtype.startswith("int"):
        assert torch.equal(quantize(torch.from_numpy(images), palette()), torch.from_numpy(tokens))


def test_bfloat16_and_grad_tensors() -> None:
    x = (torch.rand(5, 3) * 2 - 1).to(torch.bfloat16).requires_grad_()
    np.testing.assert_array_equal(quantize(x, palette()).numpy(), quantize(x.detach().float(), palette()).numpy())


def test_the_lowest_index_wins_a_tie() -> None:
    clusters = np.array([[1.0, 1, 1], [-1, -1, -1], [-1, -1, -1]])
    assert quantize(np.zeros((2, 3), np.uint8), clusters).tolist() == [1, 1]
    assert quantize(np.zeros((2, 3), np.float32), np.array([[0.5, 0, 0], [-0.5, 0, 0]])).tolist() == [0, 0]


def peak_memory() -> int:
    """Bytes: the largest resident size since ``/proc/self/clear_refs`` was last written to."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak memory counter")
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_there_is_no_n_by_k_temporary(dtype: str) -> None:
    images = np.zeros((200_000, 3), dtype)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    quantize(images, palette())
    assert peak_memory() - before < 200_000 * 512 // 4


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        ([[0, 0, 0]], TypeError, "list"),
        (np.zeros((2, 4), np.uint8), ValueError, "(2, 4)"),
        (np.uint8(3), TypeError, "uint8"),
        (np.full((2, 3), 256, np.int64), ValueError, "images holds integers from 256 to 256; want 0..255"),
        (np.full((2, 3), -1, np.int16), ValueError, "from -1 to -1"),
        (np.full((2, 3), 2**64 - 1, np.uint64), ValueError, "want 0..255"),
        (torch.full((2, 3), -1, dtype=torch.int32), ValueError, "from -1 to -1"),
        (np.zeros((2, 3), bool), TypeError, "bool"),
        (np.zeros((2, 3), complex), TypeError, "complex128"),
        (torch.tensor(1.0), ValueError, "()"),
        (np.full((2, 3), 1.1), ValueError, "[-1, 1]"),
        (np.full((2, 3), np.nan), ValueError, "finite"),
        (torch.full((2, 3), torch.inf), ValueError, "finite"),
        (np.full((2, 3), 200.0), ValueError, "127.5"),
    ],
)
def test_quantize_refuses(images: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        quantize(images, palette())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("clusters", "error"),
    [
        (np.zeros((4, 3), np.uint8), TypeError),
        ([[0, 0, 0], [255, 255, 255]], TypeError),
        ([["0.1", "0.2", "0.3"]], TypeError),
        ([[None, 0.1, 0.2]], TypeError),
        ([[True, False, True]], TypeError),
        ([[10**400, 0.1, 0.2]], TypeError),
        ([[0.1, 0.2], [0.1]], TypeError),
        ({"a": 1}, TypeError),
        (None, TypeError),
        (np.zeros((0, 3)), ValueError),
        (np.zeros((4, 4)), ValueError),
        (np.zeros(3), ValueError),
        ([[np.nan, 0.0, 0.0]], ValueError),
        ([[1e300, 0.0, 0.0]], ValueError),
        ([[0.0, 0.0, 0.0], [255.0, 255.0, 255.0]], ValueError),
        ([[0.0, -1.01, 0.0]], ValueError),
        (np.zeros((65537, 3), np.float32), ValueError),
    ],
)
def test_unusable_clusters(clusters: object, error: type[Exception]) -> None:
    for call in (
        lambda: quantize(np.zeros((2, 3), np.uint8), clusters),
        lambda: dequantize(np.zeros(2, np.int64), clusters),
    ):
        with pytest.raises(error, match="clusters"):
            call()


def test_a_palette_of_bytes_names_both_ranges() -> None:
    with pytest.raises(ValueError, match=r"clusters: values in 0\.\.255; want floats in \[-1, 1\].* 0\.\.255"):
        quantize(np.zeros((2, 3), np.uint8), [[0.0, 0.0, 0.0], [255.0, 255.0, 255.0]])


def test_dequantize_inverts_quantize() -> None:
    colours = np.arange(512) * 6_700_417 % 256**3  # an odd step: all different
    colours = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1).astype(np.uint8)
    clusters = colours / 127.5 - 1.0
    tokens = np.random.default_rng(1).integers(0, 512, (3, 4, 5))
    images = dequantize(tokens, clusters)
    assert images.dtype == np.uint8
    assert images.shape == (3, 4, 5, 3)
    np.testing.assert_array_equal(images, colours[tokens])
    np.testing.assert_array_equal(quantize(images, clusters), tokens)
    np.testing.assert_array_equal(dequantize(torch.from_numpy(tokens).int(), torch.tensor(clusters)).numpy(), images)


@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        (np.array([4]), ValueError),
        (np.array([-1]), ValueError),
        (np.array([2**64 - 1], np.uint64), ValueError),
        (torch.tensor([4]), ValueError),
        (np.array([0.0]), TypeError),
        (np.array([True]), TypeError),
        (torch.tensor([0.0]), TypeError),
        ([0], TypeError),
    ],
)
def test_dequantize_refuses(tokens: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="dequantize"):
        dequantize(tokens, palette(4))


def blobs(n: int = 20_000) -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = np.array([[20, 30, 40], [200, 30, 60], [90, 220, 120], [240, 240, 10]])
    return np.clip(centres[rng.integers(0, 4, n)] + rng.normal(0, 3, (n, 3)), 0, 255).astype(np.uint8)


def test_fitting_finds_the_colours_and_repeats_itself() -> None:
    pixels = blobs()
    threads = torch.get_num_threads()
    first = fit_clusters(pixels.reshape(100, 200, 3), 4, seed=3)
    second = fit_clusters(torch.from_numpy(pixels), 4, seed=3)
    assert torch.get_num_threads() == threads
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, second)
    centres = sorted(((first + 1) * 127.5).round().tolist())
    np.testing.assert_allclose(centres, [[20, 30, 40], [90, 220, 120], [200, 30, 60], [240, 240, 10]], atol=1.5)
    assert not np.array_equal(np.sort(fit_clusters(pixels, 16, seed=0)), np.sort(fit_clusters(pixels, 16, seed=1)))


def test_pinned_colours_come_first_and_are_exact() -> None:
    pixels = np.concatenate([blobs(), np.full((5000, 3), 255, np.uint8)])
    fitted = fit_clusters(pixels, 6, pinned=[(255, 255, 255), (0, 0, 0)])
    assert fitted[:2].tolist() == [[1, 1, 1], [-1, -1, -1]]
    assert (((fitted[2:] + 1) * 127.5).max(axis=0) < 252).all()


def test_integers_and_whole_floats_are_fitted_as_bytes() -> None:
    expected = fit_clusters(blobs(), 4)
    for dtype in ("int16", "int64", "uint32", "float32", "float64"):
        np.testing.assert_array_equal(fit_clusters(blobs().astype(dtype), 4), expected)


def squared_error(pixels: np.ndarray, clusters: np.ndarray) -> float:
    return float(np.mean((dequantize(quantize(pixels, clusters), clusters).astype(float) - pixels) ** 2))


def test_a_sample_does_not_depend_on_the_order_and_is_nearly_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters_module, "_SAMPLE", 2000)
    monkeypatch.setattr(clusters_module, "_CHUNK", 1 << 10)
    pixels = blobs()
    fitted = fit_clusters(pixels, 8, seed=1)
    shuffled = np.random.default_rng(0).permutation(pixels).reshape(10, 2000, 3)[:, ::-1]
    np.testing.assert_array_equal(fit_clusters(shuffled, 8, seed=1), fitted)
    assert not np.array_equal(fit_clusters(pixels, 8, seed=2), fitted)
    whole = fit_clusters(pixels, 8, seed=1, all_pixels=True)
    assert not np.array_equal(whole, fitted)
    assert squared_error(pixels, fitted) < 1.1 * squared_error(pixels, whole)


def test_rare_colours_are_found_where_the_sample_misses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters_module, "_SAMPLE", 100)
    monkeypatch.setattr(clusters_module, "_EACH", 1)
    pixels = np.full((50_000, 3), 255, np.uint8)
    pixels[:6] = np.arange(18).reshape(6, 3) * 10
    fitted = fit_clusters(pixels, 7)
    assert squared_error(pixels[6:], fitted) == 0
    assert squared_error(pixels[:6], fitted) < 500


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak memory counter")
def test_fitting_to_many_pixels_takes_no_copy_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters_module, "_SAMPLE", 10_000)
    pixels = np.tile(blobs(), (300, 1))
    fit_clusters(pixels[:1000], 2)  # loads scikit-learn
    tracemalloc.start()
    fit_clusters(pixels, 2)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4 * (1 << 24) + pixels.nbytes  # how often each colour occurs, and what is small


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"images": blobs() + 0.5}, ValueError, "fit_clusters: images holds floats from"),
        ({"images": blobs().astype(np.int64) - 1}, ValueError, "fit_clusters: images holds integers from -1"),
        ({"images": blobs().astype(complex)}, TypeError, "fit_clusters: images has dtype complex128"),
        ({"images": blobs()[:, :2]}, ValueError, "shape"),
        ({"n_clusters": 1}, ValueError, "n_clusters"),
        ({"n_clusters": 2.5}, TypeError, "n_clusters"),
        ({"n_clusters": True}, TypeError, "n_clusters"),
        ({"images": np.zeros((9, 3), np.uint8)}, ValueError, "1 colours"),
        ({"seed": -1}, ValueError, "fit_clusters: seed is -1; want an integer in 0..2^32-1"),
        ({"seed": 1 << 32}, ValueError, "seed is 4294967296"),
        ({"seed": 0.5}, ValueError, "seed is 0.5"),
        ({"seed": True}, ValueError, "seed is True"),
        ({"seed": None}, ValueError, "seed is None"),
        ({"pinned": [(0, 0, 0), (0, 0, 0)]}, ValueError, "twice"),
        ({"pinned": [(0, 0, 256)]}, ValueError, "0..255"),
        ({"pinned": [(0.5, 0, 0)]}, ValueError, "0..255"),
        ({"pinned": [(0, 0)]}, ValueError, "pinned"),
        ({"pinned": [(0, 0), (1,)]}, ValueError, "pinned"),
        ({"pinned": [(0, 0, i) for i in range(4)]}, ValueError, "want an integer in 5..65536"),
    ],
)
def test_fit_refuses(change: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        fit_clusters(**{"images": blobs(), "n_clusters": 4, **change})
    assert words in str(caught.value)


def test_files_give_back_what_was_written(tmp_path: Path) -> None:
    clusters = palette(16)
    save_clusters(torch.from_numpy(clusters), tmp_path / "c.npy")
    np.testing.assert_array_equal(load_clusters(tmp_path / "c.npy"), clusters)
    np.save(tmp_path / "f.npy", np.asfortranarray(clusters.astype(">f8")))
    np.testing.assert_array_equal(load_clusters(tmp_path / "f.npy"), clusters)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"clusters": clusters.tolist()}))
    np.testing.assert_array_equal(load_clusters(tmp_path / "preprocessor_config.json"), clusters)
    with pytest.raises(FileExistsError):
        save_clusters(clusters, tmp_path / "c.npy", overwrite=False)
    with pytest.raises(ValueError, match=r"\.npy"):
        save_clusters(clusters, tmp_path / "c.txt")
    for name in ("k.NPY", "k.Npy"):
        save_clusters(clusters, tmp_path / name)
        np.testing.assert_array_equal(load_clusters(tmp_path / name), clusters)
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="shape"):
        save_clusters(clusters[:1], tmp_path / "one.npy")
    assert sorted(os.listdir(tmp_path)) == ["c.npy", "f.npy", "preprocessor_config.json"]


def npy(header: str, payload: bytes = b"") -> bytes:
    text = header.encode().ljust(118 - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + payload


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.npy", b""),
        ("text.npy", b"hello"),
        ("cut.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }", b"\0" * 20)),
        ("tera.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 3), }", b"\0" * 24)),
        (
            "pickle.npy",
            npy("{'descr': '|O', 'fortran_order': False, 'shape': (2, 3), }", b"cos\nabort\n(tR."),
        ),
        ("code.npy", npy("__import__('os').abort()")),
        ("nan.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }", b"\xff" * 24)),
        ("ints.npy", npy("{'descr': '|u1', 'fortran_order': False, 'shape': (2, 3), }", b"\x01" * 6)),
        ("shape.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 2), }", b"\0" * 24)),
        ("huge.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }", b"\0" * 4_000_000)),
        ("bytes.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }", b"\0\0\x7f\x43" * 6)),
        ("x.json", b"[1, 2"),
        ("bytes.json", b'{"clusters": [[0.0, 0.0, 0.0], [255.0, 255.0, 255.0]]}'),
        ("none.json", b"{}"),
        ("nan.json", b'{"clusters": [[NaN, 0.1, 0.1], [0.1, 0.1, 0.1]]}'),
        ("deep.json", b"[" * 100_000),
    ],
)
def test_hostile_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_clusters(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_clusters(tmp_path / "nothing.npy")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_clusters(tmp_path)
    for name in ("zero.npy", "zero.json"):
        (tmp_path / name).symlink_to("/dev/zero")
        with pytest.raises(ValueError, match=rf"{name}: is a device"):
            load_clusters(tmp_path / name)


def test_the_public_names_are_in_image() -> None:
    from igpt_fast import image

    for name in ("quantize", "dequantize", "fit_clusters", "load_clusters", "save_clusters"):
        assert getattr(image, name) is getattr(clusters_module, name)
